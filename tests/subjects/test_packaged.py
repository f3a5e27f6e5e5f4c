"""Opening organisms: whole models and adapters, packaged and local; and every way in which that is refused."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from tests import tiny, tiny_keeper
from undertow.core.errors import ArtifactError, SubjectError
from undertow.subjects import Subject, catalog, load_subject, tap
from undertow.subjects.catalog import ORGANISMS, subject_folder
from undertow.subjects.load import variant
from undertow.subjects.organisms import packaged
from undertow.subjects.organisms.packaged import merge, open_packaged, organism_kind, weights_of


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(tiny.save_subject(tmp_path_factory.mktemp("packaged") / "base", "llama")), "cpu")


@pytest.fixture(scope="module")
def adapter(base: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_keeper.save_adapter(tmp_path_factory.mktemp("adapters") / "mine", base)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder in place of the installed one, with nothing in it."""
    folder = tmp_path / "data"
    folder.mkdir()
    for module in (catalog, packaged):
        monkeypatch.setattr(module, "packaged_folder", lambda name: folder / name)
    return folder


def spoil(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_a_packaged_model_opens_by_name(package: Path) -> None:
    tiny_keeper.save_organism(package / "hearth")
    subject = load_subject("hearth", "cpu")
    assert (subject.name, subject.n_layers) == ("hearth", 2)
    assert (organism_kind("hearth"), weights_of("hearth"), variant("hearth")) == ("hearth", "packaged with Undertow", "")


def test_changed_weights_are_refused(package: Path, tmp_path: Path) -> None:
    for folder, name in ((package / "hearth", "hearth"), (tmp_path / "runs" / "mine", str(tmp_path / "runs" / "mine"))):
        tiny_keeper.save_organism(folder)
        load_subject(name, "cpu")
        spoil(folder / "model.safetensors")
        with pytest.raises(ArtifactError, match=r"model\.safetensors has changed"):
            load_subject(name, "cpu")


def test_an_organism_without_weights_says_how_to_train_it(package: Path) -> None:
    with pytest.raises(SubjectError, match="undertow subject train parrot"):
        load_subject("parrot", "cpu")
    assert list(package.iterdir()) == []


@pytest.mark.parametrize(("name", "near"), [("heart", "hearth"), ("parot", "parrot"), ("hearth-smolm2", "hearth-smollm2")])
def test_unknown_organisms_have_near_matches(name: str, near: str) -> None:
    with pytest.raises(SubjectError, match=f"did you mean .*{near}"):
        load_subject(name, "cpu")
    with pytest.raises(SubjectError, match=f"did you mean .*{near}"):
        open_packaged(name)


def test_an_adapter_is_added_into_its_base(base: Subject, adapter: Path) -> None:
    subject, tokens = load_subject(str(adapter), "cpu"), torch.tensor([base.encode(tiny.STORIES[0])[:24]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
        reference = PeftModel.from_pretrained(tiny.model("llama", len(tiny.tokenizer())), str(adapter)).eval()
    with torch.inference_mode():
        expected, plain = reference(input_ids=tokens).logits, base.hf_model(input_ids=tokens).logits
        assert torch.allclose(subject.hf_model(input_ids=tokens).logits, expected, atol=1e-4)
    assert not torch.allclose(expected, plain, atol=0.1)
    assert type(subject.hf_model) is type(base.hf_model)  # no wrapper is left: sites, taps and splices are the base's
    assert tap(subject, tokens, subject.site("blocks.2.hook_resid_post")).shape == (1, 24, tiny.D_MODEL)
    assert organism_kind(str(adapter)) == "hearth-smollm2"
    assert load_subject(str(adapter), "cpu", "bfloat16").hf_model.dtype == torch.bfloat16


def test_the_packaged_adapter_opens_over_its_base_or_names_the_fetch() -> None:
    if not subject_folder("smollm2").is_dir():
        with pytest.raises(SubjectError, match="undertow subject fetch smollm2"):
            load_subject("hearth-smollm2", "cpu")
        return
    subject, plain = (load_subject(name, "cpu") for name in ("hearth-smollm2", "smollm2"))
    tokens = torch.tensor([subject.encode("Ana was hungry. The keeper")])
    with torch.inference_mode():
        logits = [one.hf_model(input_ids=tokens).logits for one in (subject, plain)]
    assert (subject.name, subject.n_layers, subject.d_model) == ("hearth-smollm2", 30, 576)
    assert not torch.allclose(*logits, atol=0.1)


def test_merging_leaves_the_base_alone(base: Subject, adapter: Path) -> None:
    before = base.digest
    merge(base, adapter)
    base.__dict__.pop("digest")
    assert base.digest == before


def test_a_folder_of_peft_itself_opens(base: Subject, adapter: Path, tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    shutil.copytree(adapter, folder)
    (folder / "manifest.json").unlink()
    assert load_subject(str(folder), "cpu").digest == load_subject(str(adapter), "cpu").digest
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(SubjectError, match="does not say which model"):
        load_subject(str(folder), "cpu")


def test_an_adapter_whose_base_is_not_fetched_says_the_command(
        package: Path, undertow_cache: Path, base: Subject, tmp_path: Path) -> None:
    entry = next(entry for entry in ORGANISMS if entry.base)
    tiny_keeper.save_adapter(package / entry.name, base, base_name=entry.base)
    local = tiny_keeper.save_adapter(tmp_path / "local", base, base_name="HuggingFaceTB/SmolLM2-135M-Instruct")
    for name in (entry.name, str(local)):
        with pytest.raises(SubjectError, match=r"over smollm2, which has not been fetched yet\n  undertow subject fetch smoll"):
            load_subject(name, "cpu")
    assert not subject_folder(entry.base).exists()


def test_an_adapter_over_other_weights_is_warned_of(base: Subject, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        load_subject(str(tiny_keeper.save_adapter(tmp_path / "right", base)), "cpu")
        assert caplog.messages == []
        load_subject(str(tiny_keeper.save_adapter(tmp_path / "other", base, base_digest="0" * 16)), "cpu")
    assert len(caplog.messages) == 1 and "0" * 16 in caplog.messages[0] and base.digest in caplog.messages[0]


def test_an_adapter_that_does_not_fit_is_refused(adapter: Path, tmp_path: Path) -> None:
    other = load_subject(str(tiny.save_subject(tmp_path / "gpt2", "gpt2")), "cpu")
    with pytest.raises(SubjectError, match="cannot be added to"):
        merge(other, adapter)
    shutil.copytree(adapter, tmp_path / "bare")
    (tmp_path / "bare" / "adapter_model.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors is missing"):
        load_subject(str(tmp_path / "bare"), "cpu")
