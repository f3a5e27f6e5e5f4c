"""Harvesting: what is stored against the model itself, and what is left behind when it goes wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from sae import harvesting
from sae.corpus import Corpus, TextSpec, TokenBatch, open_corpus
from sae.harvesting import SHARD_ROWS, StoreSpec, harvest, rows_per_pass, store_key
from sae.store import ActivationStore
from undertow.core.errors import ArtifactError, NumericsError, SpecError, StorageError, TextError
from undertow.subjects import Site, Subject, load_subject, tap
from undertow.subjects.tapping import tap_sites

CONTEXT = 32
ALL = 10**6
PASS_ROWS = 32  # 1,024 tokens
FLOAT32 = StoreSpec(dtype="float32")
SITE = Site(1, "resid_post")


@pytest.fixture(scope="module")
def corpus(folder: Path, subject: Subject) -> Corpus:
    spec = TextSpec(source=str(folder / "text.jsonl"), context=CONTEXT)
    return open_corpus(spec, "train", subject.tokenizer, subject.bos_id)


@pytest.fixture(scope="module")
def whole(folder: Path, subject: Subject, corpus: Corpus) -> ActivationStore:
    """All of the text, in one go, exact."""
    return harvest(subject, SITE, corpus, ALL, folder / "cache", form=FLOAT32)


@pytest.fixture
def broken(folder: Path) -> Subject:
    """A subject of the test's own, to be spoilt."""
    return load_subject(str(folder / "llama"), device="cpu")


class Taps:
    """Counts the forward passes of the harvest."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        monkeypatch.setattr(harvesting, "tap_sites", self)

    def __call__(self, *args: Any) -> list[Tensor]:
        self.calls += 1
        return tap_sites(*args)


def everything(store: ActivationStore) -> Tensor:
    return torch.cat([block for _, block in store.chunks(500)])


def stores(cache: Path) -> list[str]:
    """Finished stores in a cache."""
    return [path.name for path in (cache / "activations").glob("[!.]*")]


def embedding(subject: Subject) -> Tensor:
    return subject.hf_model.get_input_embeddings().weight.data


def rare_token(store: ActivationStore, first_row: int = 0) -> int:
    """A token that is measured at least 8 times, and nowhere before `first_row`."""
    counts = Counter(store.tokens[store.measured].tolist())
    early = set(store.tokens[:first_row].flatten().tolist())
    return next(token for token, count in sorted(counts.items(), key=lambda item: item[1]) if count >= 8 and token not in early)


def test_stored_activations_are_the_models(whole: ActivationStore, subject: Subject, corpus: Corpus) -> None:
    stored = everything(whole)
    tapped = [tap(subject, batch.tokens, SITE, batch.attend)[batch.measured] for batch in corpus.batches(PASS_ROWS)]
    assert torch.equal(stored, torch.cat(tapped))
    rows = torch.cat([batch.tokens for batch in corpus.batches(7)])
    assert torch.equal(whole.tokens, rows)
    for i in (0, 57, whole.n // 2, whole.n - 1):  # one row alone, up to the position, by transformers' own report
        row, position = whole.where[i].tolist()
        with torch.inference_mode():
            hidden = subject.hf_model(input_ids=rows[row:row + 1, :position + 1], output_hidden_states=True).hidden_states
        torch.testing.assert_close(stored[i], hidden[SITE.layer + 1][0, -1], rtol=1e-4, atol=1e-5)


def test_measured_positions(whole: ActivationStore, subject: Subject) -> None:
    assert subject.bos_id is not None
    ordinary = ~torch.isin(whole.tokens, torch.tensor(sorted(subject.special_ids)))
    padding = torch.zeros_like(ordinary)
    last = whole.documents[-1]
    padding[-1, int((last >= 0).nonzero().max()) + 1:] = True
    assert padding.any()  # the text does not fill its last row
    expected = ordinary & ~padding
    expected[:, 0] = False
    assert torch.equal(whole.measured, expected)
    assert (whole.tokens[:, 1:] == subject.bos_id).any()  # documents end within rows, and that BOS is left out
    assert (whole.documents[whole.measured] >= 0).all()
    assert whole.n == int(expected.sum())
    assert whole.record["n"] == whole.n
    assert whole.record["massive"] == 0


def test_record(whole: ActivationStore, subject: Subject, corpus: Corpus) -> None:
    norms = everything(whole).norm(dim=1)
    first_shard = whole.where[:, 0] < SHARD_ROWS
    assert whole.record["norm_mean"] == pytest.approx(float(norms.mean()), rel=1e-5)
    assert whole.record["norm_ceiling"] == pytest.approx(10 * float(norms[first_shard].median()), rel=1e-6)
    assert whole.record["subject_digest"] == subject.digest
    assert whole.record["text_digest"] == corpus.digest
    assert whole.record["site"] == "blocks.1.hook_resid_post"


def test_bfloat16_by_default(whole: ActivationStore, subject: Subject, corpus: Corpus, tmp_path: Path) -> None:
    store = harvest(subject, SITE, corpus, 2000, tmp_path)
    assert torch.equal(everything(store), everything(whole)[:store.n].bfloat16().float())


def test_the_memory_allowed_makes_shards_smaller(whole: ActivationStore, subject: Subject, corpus: Corpus,
                                                 tmp_path: Path) -> None:
    """The same activations, in shards of 4 rows and from passes no larger; and what cannot be kept to is refused."""
    width, context = whole.d_in, corpus.spec.context
    row = 4 * 4 * width * context / 1e6  # MB: four copies in float32
    assert [StoreSpec(memory_mb=n * row * 1.001).shard_rows(context, width) for n in (1, 2, 3, 7, 8, 63, 64, 900)] == [
        1, 2, 2, 4, 8, 32, 64, 64]
    store = harvest(subject, SITE, corpus, ALL, tmp_path, form=StoreSpec(dtype="float32", memory_mb=5 * row))
    sizes = [int(store.measured[start:start + 4].sum()) for start in range(0, len(store.measured), 4)]
    assert [len(shard.values) for shard in store._shards] == sizes and len(sizes) > 4
    assert torch.equal(store.tokens, whole.tokens) and torch.equal(store.measured, whole.measured)
    torch.testing.assert_close(store.take(torch.arange(store.n)), whole.take(torch.arange(whole.n)))
    with pytest.raises(SpecError, match=r"one row of 32 activations of width \d+ takes .* MB while it is harvested"):
        harvest(subject, SITE, corpus, ALL, tmp_path / "none", form=StoreSpec(memory_mb=row / 2))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("wanted", [1, 992, 993, 3000])
def test_stops_at_the_end_of_the_pass(wanted: int, whole: ActivationStore, subject: Subject, corpus: Corpus,
                                      tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    store = harvest(subject, SITE, corpus, wanted, tmp_path, lambda done, total: seen.append((done, total)), FLOAT32)
    per_row = whole.measured.sum(dim=1)
    passes = next(p for p in range(1, 99) if int(per_row[:p * PASS_ROWS].sum()) >= wanted)
    assert len(store.tokens) == passes * PASS_ROWS
    assert len(seen) == passes
    assert seen[-1] == (wanted, wanted)
    assert torch.equal(everything(store), everything(whole)[:store.n])


@pytest.mark.parametrize("rows", [4, 16, 64])
def test_rows_a_pass_do_not_matter(rows: int, whole: ActivationStore, subject: Subject, corpus: Corpus, tmp_path: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harvesting, "rows_per_pass", lambda subject, context: rows)
    store = harvest(subject, SITE, corpus, ALL, tmp_path, form=FLOAT32)
    assert torch.equal(store.measured, whole.measured)
    torch.testing.assert_close(everything(store), everything(whole), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("context", "rows"), [(16, 64), (32, 32), (48, 16), (256, 4), (8192, 1)])
def test_passes_fill_shards(subject: Subject, context: int, rows: int) -> None:
    assert rows_per_pass(subject, context) == rows
    assert SHARD_ROWS % rows == 0


def test_massive_activations_are_left_out_and_counted(whole: ActivationStore, broken: Subject, corpus: Corpus,
                                                      tmp_path: Path) -> None:
    token = rare_token(whole)
    embedding(broken)[token] *= 1000
    store = harvest(broken, SITE, corpus, ALL, tmp_path, form=FLOAT32)
    massive = whole.measured & (whole.tokens == token)
    assert massive.any()
    assert store.record["massive"] == int(massive.sum())
    assert torch.equal(store.measured, whole.measured & ~massive)
    assert store.n == whole.n - int(massive.sum())
    norms = everything(store).norm(dim=1)
    assert float(norms.max()) <= store.record["norm_ceiling"]
    assert store.record["norm_mean"] == pytest.approx(float(norms.mean()), rel=1e-5)
    raw = torch.cat([tap(broken, b.tokens, SITE, b.attend)[b.measured] for b in corpus.batches(PASS_ROWS)])
    assert torch.equal(everything(store), raw[~massive[whole.measured]])


def test_a_second_call_reads_the_cache(whole: ActivationStore, folder: Path, subject: Subject, corpus: Corpus,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    taps = Taps(monkeypatch)
    again = harvest(subject, SITE, corpus, ALL, folder / "cache", form=FLOAT32)
    assert taps.calls == 0
    assert again.path == whole.path
    assert torch.equal(everything(again), everything(whole))


def test_key_names_all_that_matters(subject: Subject, broken: Subject, corpus: Corpus, folder: Path) -> None:
    held_out = open_corpus(corpus.spec, "held_out", subject.tokenizer, subject.bos_id)
    narrow = open_corpus(corpus.spec.model_copy(update={"context": 16}), "train", subject.tokenizer, subject.bos_id)
    base = store_key(subject, SITE, corpus, 100, FLOAT32)
    assert base == store_key(broken, SITE, corpus, 100, FLOAT32)
    changed = load_subject(str(folder / "llama"), device="cpu")
    embedding(changed)[5] += 1e-3
    others = [store_key(changed, SITE, corpus, 100, FLOAT32),
              store_key(subject, Site(1, "resid_pre"), corpus, 100, FLOAT32),
              store_key(subject, SITE, held_out, 100, FLOAT32), store_key(subject, SITE, narrow, 100, FLOAT32),
              store_key(subject, SITE, corpus, 101, FLOAT32), store_key(subject, SITE, corpus, 100, StoreSpec()),
              store_key(subject, SITE, corpus, 100, StoreSpec(dtype="float32", memory_mb=0.1))]
    assert len({base, *others}) == 8


def interrupt(subject: Subject, corpus: Corpus, cache: Path, passes: int) -> Path:
    """Break a harvest off after some passes; returns its working folder."""
    left = iter(range(passes - 1))

    def progress(done: int, total: int) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        harvest(subject, SITE, corpus, ALL, cache, progress, FLOAT32)
    assert stores(cache) == []
    return next((cache / "activations").glob(".*.partial"))


def test_an_interrupted_harvest_goes_on(whole: ActivationStore, subject: Subject, corpus: Corpus, tmp_path: Path,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    total = -(-len(whole.tokens) // PASS_ROWS)
    work = interrupt(subject, corpus, tmp_path, passes=7)  # two passes a shard: three are whole, the seventh is lost
    assert len(json.loads((work / "progress.json").read_text())) == 3
    taps = Taps(monkeypatch)
    store = harvest(subject, SITE, corpus, ALL, tmp_path, form=FLOAT32)
    assert taps.calls == total - 6
    assert not work.exists()
    files = [json.loads((s.path / "manifest.json").read_text())["files"] for s in (whole, store)]
    assert files[0] == files[1]  # digests of every file
    assert {p.name for p in store.path.iterdir()} == {*files[0], "manifest.json"}
    untimed = [{k: v for k, v in s.record.items() if k not in ("written", "git")} for s in (whole, store)]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize("name", ["acts-00001.safetensors", "rows-00000.safetensors"])
@pytest.mark.parametrize("damage", ["change", "remove"])
def test_a_changed_shard_of_an_interrupted_harvest_is_refused(name: str, damage: str, subject: Subject, corpus: Corpus,
                                                              tmp_path: Path) -> None:
    work = interrupt(subject, corpus, tmp_path, passes=5)
    if damage == "change":
        data = bytearray((work / name).read_bytes())
        data[-3] ^= 1
        (work / name).write_bytes(bytes(data))
    else:
        (work / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} of an interrupted harvest has changed") as caught:
        harvest(subject, SITE, corpus, ALL, tmp_path, form=FLOAT32)
    assert caught.value.hint.endswith(f"rm -r {work}")
    assert stores(tmp_path) == []


def test_a_harvest_killed_while_it_was_being_finished(whole: ActivationStore, subject: Subject, corpus: Corpus,
                                                      tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        """Stands for the end of the process."""

    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "rows-00001.safetensors":
            raise Killed
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(Killed):
        harvest(subject, SITE, corpus, ALL, tmp_path, form=FLOAT32)
    monkeypatch.undo()
    assert stores(tmp_path) == []
    store = harvest(subject, SITE, corpus, ALL, tmp_path, form=FLOAT32)
    assert torch.equal(everything(store), everything(whole))


@pytest.mark.parametrize("site", [Site(0, "resid_pre"), SITE])
def test_nan_is_named_by_row_position_and_document(site: Site, whole: ActivationStore, broken: Subject, corpus: Corpus,
                                                   tmp_path: Path) -> None:
    first_row = 2 * SHARD_ROWS  # so that two shards are whole by then
    token = rare_token(whole, first_row)
    embedding(broken)[token] = float("nan")
    row, position = ((whole.tokens == token) & whole.measured).nonzero()[0].tolist()
    assert row >= first_row
    if site.layer:  # attention multiplies what it masks by zero, and so spreads a NaN over its whole row
        position = int(whole.measured[row].nonzero()[0])
    document = corpus.document_ids[int(whole.documents[row, position])]
    with pytest.raises(NumericsError) as caught:
        harvest(broken, site, corpus, ALL, tmp_path)
    assert f"the first in row {row}, position {position}, document {document!r}" in caught.value.what
    assert f"activations at {site.name} are not finite" in caught.value.what
    assert "the text at that row" in caught.value.hint
    assert stores(tmp_path) == []


def test_infinity_where_nothing_is_measured_is_no_matter(broken: Subject, corpus: Corpus, tmp_path: Path) -> None:
    """Negative control: before the first block an infinity stays where it is, and BOS is not measured."""
    assert broken.bos_id is not None
    embedding(broken)[broken.bos_id] = float("inf")
    store = harvest(broken, Site(0, "resid_pre"), corpus, 500, tmp_path)
    assert torch.isfinite(everything(store)).all()


def test_too_little_space_is_said_beforehand(subject: Subject, corpus: Corpus, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    taps = Taps(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=10**12, used=10**12 - 10**9, free=10**9))
    with pytest.raises(StorageError, match=r"needs 64.00 GB and the disk has 1.00 GB free"):
        harvest(subject, SITE, corpus, 10**9, tmp_path)
    assert taps.calls == 0
    assert list(tmp_path.iterdir()) == []


def test_a_text_without_anything_to_measure(subject: Subject, corpus: Corpus, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    real = Corpus.batches

    def unmeasured(self: Corpus, rows: int, skip_rows: int = 0) -> Iterator[TokenBatch]:
        for batch in real(self, rows, skip_rows):
            yield dataclasses.replace(batch, measured=torch.zeros_like(batch.measured))

    monkeypatch.setattr(Corpus, "batches", unmeasured)
    with pytest.raises(TextError, match="no token to measure"):
        harvest(subject, SITE, corpus, 100, tmp_path)
    assert stores(tmp_path) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
from sae.corpus import TextSpec, open_corpus
from sae.harvesting import StoreSpec, harvest
from undertow.core.errors import StorageError
from undertow.subjects import load_subject

model, text, cache, limit = sys.argv[1:]
subject = load_subject(model, device="cpu")
corpus = open_corpus(TextSpec(source=text, context=32), "train", subject.tokenizer, subject.bos_id)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), resource.RLIM_INFINITY))
try:
    site, form = subject.site("blocks.1.hook_resid_post"), StoreSpec(dtype="float32")
    harvest(subject, site, corpus, 10**6, Path(cache), form=form)
except StorageError as error:
    print(f"refused: {error}")
"""


def test_full_disk(whole: ActivationStore, folder: Path, subject: Subject, corpus: Corpus, tmp_path: Path) -> None:
    """A file-size limit stands for the full disk: the kernel refuses the write in the same place."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(folder / "llama"), str(folder / "text.jsonl"), str(tmp_path), "60000"],
        capture_output=True, text=True, timeout=120, check=False, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "refused: cannot write" in done.stdout
    assert "file too large" in done.stdout
    assert "UNDERTOW_CACHE" in done.stdout
    assert stores(tmp_path) == []
    store = harvest(subject, SITE, corpus, ALL, tmp_path, form=FLOAT32)  # the next one heals it
    assert torch.equal(everything(store), everything(whole))
