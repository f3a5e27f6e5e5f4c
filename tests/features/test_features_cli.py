"""`features show` and `features search`, and the search behind it, on a tiny subject and an SAE made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from features.codes import dictionary_digest, dictionary_name
from features.searching import Query, search
from sae.corpus import TextSpec
from sae.dictionary import LinearDictionary, Provenance, TopK
from sae.formats import save_folder
from tests import tiny
from undertow.cli.main import main
from undertow.core.errors import DictionaryError, TextError
from undertow.subjects import Subject, load_subject, tap

SITE = "blocks.1.hook_resid_post"
D_SAE, K, DEAD = 48, 4, 47


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("features_cli")
    tiny.save_subject(made / "llama", "llama")
    tiny.save_text(made / "text.jsonl", copies=4)
    text = TextSpec(source=str(made / "text.jsonl"), context=32, held_out=0.3)
    save_folder(dictionary(made, {"text": text.model_dump()}), made / "sae")
    save_folder(dictionary(made, {}), made / "silent")
    return made


def dictionary(folder: Path, extra: dict[str, Any]) -> LinearDictionary:
    """Random unit directions; the last latent can never fire."""
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)))
    bias = torch.zeros(D_SAE)
    bias[DEAD] = -1e4
    return LinearDictionary(rows.T.contiguous(), bias, rows, torch.zeros(tiny.D_MODEL), TopK(K),
                            Provenance(str(folder / "llama"), SITE, 32, True, extra))


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERTOW_CACHE", str(folder / "cache"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*words: str) -> tuple[int, str, str]:
        code = main(["features", *words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_show(folder: Path, run: Any) -> None:
    code, out, err = run("show", str(folder / "sae"), "3", str(DEAD), "--random", "1")
    assert code == 0, err
    name = dictionary_name(str(folder / "sae"), dictionary(folder, {}))
    assert f"{name}:3" in out
    assert "strongest, one a passage" in out
    assert "«" in out
    assert "never fired on" in out
    assert "promotes" in out
    assert f"held-out tokens of {folder / 'text.jsonl'}" in out.replace("\n", "")


def test_show_json_is_the_last_line_and_cached(folder: Path, run: Any) -> None:
    words = ("show", str(folder / "sae"), "3", "--random", "4", "--json", "--seed", "2")
    code, out, _ = run(*words)
    first = json.loads(out.splitlines()[-1])
    assert code == 0
    assert len(first["cards"]) == 5
    assert first["cards"][0]["latent"] == 3
    assert len({card["latent"] for card in first["cards"]}) == 5
    card = first["cards"][0]
    assert card["density"] == card["count"] / first["tokens"]
    assert card["top"][0]["value"] == card["maximum"]
    code, out, err = run(*words)
    again = json.loads(out.splitlines()[-1])
    assert again["cards"] == first["cards"]
    assert "reading" not in err
    assert "collecting" not in err


def test_show_writes_a_folder(folder: Path, run: Any, tmp_path: Path) -> None:
    words = ("show", str(folder / "sae"), "3", "--out", str(tmp_path / "cards"))
    assert run(*words)[0] == 0
    assert json.loads((tmp_path / "cards" / "cards.json").read_text())[0]["latent"] == 3
    assert "promotes" in (tmp_path / "cards" / "cards.txt").read_text()
    code, _, err = run(*words)
    assert code == 2
    assert "exists and is not empty" in err


@pytest.mark.parametrize(("words", "message"), [
    (["sae", "48"], "no feature 48: this SAE has 48\n  choose from 0 to 47"),
    (["sae"], "no latent was named"),
    (["sae", "--random", "49"], "--random 49 asks for more latents than there are (48)"),
    (["sae", "3", "--text", "nowhere.jsonl"], "nowhere.jsonl"),
    (["sae", "3", "--site", "blocks.2.hook_resid_post"], "the SAE was trained at blocks.1.hook_resid_post"),
    (["silent", "3"], "does not say which text it was trained on\n  name one with --text"),
    (["nothing", "3"], "no SAE called"),
])
def test_show_refuses(folder: Path, run: Any, words: list[str], message: str) -> None:
    code, out, err = run("show", str(folder / words[0]), *words[1:])
    assert code == 2
    assert message in err
    assert "Traceback" not in err + out


def test_show_says_that_the_text_is_gone(folder: Path, run: Any, tmp_path: Path) -> None:
    text = TextSpec(source=str(tmp_path / "gone.jsonl"), context=32)
    save_folder(dictionary(folder, {"text": text.model_dump()}), tmp_path / "sae")
    code, _, err = run("show", str(tmp_path / "sae"), "3")
    assert code == 2
    assert "the text that the SAE was trained on cannot be opened" in err
    assert "name another with --text" in err
    assert run("show", str(tmp_path / "sae"), "3", "--text", str(folder / "text.jsonl"))[0] == 0


def test_search_command(folder: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path))
    code, out, err = run("search", str(folder / "sae"), "Ana came in from the rain.", "--top", "5")
    assert code == 0, err
    assert "How rare these are is not known yet" in out.replace("\n", " ")
    assert run("show", str(folder / "sae"), "3")[0] == 0
    code, out, _ = run("search", str(folder / "sae"), "Ana came in from the rain.", "--top", "5", "--json")
    found = json.loads(out.splitlines()[-1])
    assert len(found["features"]) == 5
    assert all(0 <= feature["density"] <= 1 for feature in found["features"])
    assert "".join(token["text"] for token in found["tokens"]) == "Ana came in from the rain."
    assert run("search", str(folder / "sae"), "")[0] == 2


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return load_subject(str(folder / "llama"), device="cpu")


def test_search_against_dense_codes(folder: Path, subject: Subject) -> None:
    sae = dictionary(folder, {})
    text = "The keeper trimmed the lamp.\nÉté."
    found = search(Query(subject, subject.site(SITE), sae, "toy", None), text, per_token=2)
    ids = subject.encode(text)
    assert len(ids) <= 32
    dense = sae.encode(tap(subject, torch.tensor([ids]), subject.site(SITE))[0, 1:])
    assert found.n_tokens == len(ids) - 1
    assert {feature.latent for feature in found.features} == set(dense.amax(dim=0).nonzero()[:, 0].tolist())
    for feature in found.features:
        assert feature.value == pytest.approx(float(dense[:, feature.latent].max()), rel=1e-5)
        assert feature.token == int(dense[:, feature.latent].argmax())
        assert feature.fired_on == int((dense[:, feature.latent] > 0).sum())
        assert feature.density is None
    assert [f.value for f in found.features] == sorted((f.value for f in found.features), reverse=True)
    for token, row in zip(found.tokens, dense, strict=True):
        assert [firing.latent for firing in token.firings] == row.topk(2).indices.tolist()
    assert "".join(token.text for token in found.tokens) == "The keeper trimmed the lamp.↵Été."


def test_search_leaves_massive_activations_out(folder: Path, subject: Subject) -> None:
    text = "The keeper trimmed the lamp."
    sae = dictionary(folder, {"norm_ceiling": 0.0})
    found = search(Query(subject, subject.site(SITE), sae, "toy", None), text, per_token=2)
    assert (found.n_tokens, found.features) == (0, ())
    assert not any(token.measured or token.firings for token in found.tokens)


def test_search_reads_long_texts_in_rows(folder: Path, subject: Subject) -> None:
    text = " ".join(tiny.STORIES[:3])
    n = len(subject.encode(text)) - 1
    assert n > 64  # more than two rows of the SAE's 32 tokens
    found = search(Query(subject, subject.site(SITE), dictionary(folder, {}), "toy", None), text, per_token=1)
    assert len(found.tokens) == n


def test_search_refuses(folder: Path, subject: Subject) -> None:
    with pytest.raises(TextError, match="no token to measure"):
        search(Query(subject, subject.site(SITE), dictionary(folder, {}), "toy", None), "", per_token=1)
    narrow = LinearDictionary(torch.ones(3, 5), torch.zeros(5), torch.ones(5, 3), torch.zeros(3), TopK(1),
                              Provenance.unknown())
    with pytest.raises(DictionaryError, match="width 3"):
        search(Query(subject, subject.site(SITE), narrow, "toy", None), "The keeper", per_token=1)


def test_digest_covers_every_weight_and_nothing_else(folder: Path) -> None:
    base = dictionary(folder, {})
    assert dictionary_digest(base) == dictionary_digest(dictionary(folder, {"seed": 7}))
    parts = {**base.tensors(), "activation": base.activation, "provenance": base.provenance}
    for name in base.tensors():
        moved = LinearDictionary(**{**parts, name: base.tensors()[name] + 1e-6})
        assert dictionary_digest(moved) != dictionary_digest(base), name
    assert dictionary_digest(LinearDictionary(**{**parts, "activation": TopK(K + 1)})) != dictionary_digest(base)
