"""What `undertow bench dashboard` measures: real builds, real answers, synthetic stores that hold; a peer that cannot run."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from dashboards.bench import (
    SHARED_FROM,
    Material,
    ask_peer,
    build,
    random_dictionary,
    served,
    store_bytes,
    whole_passes,
    widened,
    write_job,
)
from dashboards.layout import BYTES_PER_FEATURE, COLUMNS
from dashboards.notes import Marks
from dashboards.table import Query, select
from sae.plan import open_held_out
from tests.cli.answers import runner
from tests.dashboards.conftest import SITE, Made
from undertow.core.errors import DictionaryError, TextError


@pytest.fixture
def material(made: Made) -> Material:
    corpus = open_held_out(made.dictionary.provenance, made.subject, None, None, False)
    return Material(made.dictionary, made.subject, made.subject.site(SITE), corpus, whole_passes(made.subject, 32, 1000))


def test_a_build_reads_the_rows_and_takes_nothing_from_a_cache(material: Material, made: Made, tmp_path: Path) -> None:
    first, again = (build(material, tmp_path / name) for name in ("a", "b"))
    assert min(first.seconds, again.seconds, again.cpu_seconds) > 0
    assert material.tokens().shape == (32, 32) == first.store.tokens.shape
    shown = first.store.tokens >= 0
    assert (first.store.tokens == material.tokens().numpy())[shown].all()
    assert (first.store.columns["count"] == again.store.columns["count"]).all() and first.store.columns["count"].sum() > 0
    own, whole = store_bytes(first.store)
    assert BYTES_PER_FEATURE <= own < whole and own < BYTES_PER_FEATURE + 200 * len(COLUMNS), "npy headers, no more"
    with pytest.raises(TextError, match="whole token rows"):
        material._replace(rows=10_000).tokens()


@pytest.mark.parametrize("n", [300, SHARED_FROM])
def test_a_widened_store_answers(made: Made, tmp_path: Path, n: int) -> None:
    wide = widened(made.store, n, tmp_path / "wide")
    assert wide.d_sae == n and isinstance(wide.columns["count"], np.memmap)
    assert set(np.unique(wide.columns["peak_token"])) <= set(np.unique(made.store.columns["peak_token"]))
    query = Query(sort="maximum", order="down", maximum_from=0.1)
    shown = select(wide, Marks({}, frozenset()), query).window(0, 5)
    assert (np.diff(wide.columns["maximum"][shown]) <= 0).all()
    with served(wide) as ask:
        assert ask("features?sort=maximum&order=down") > 0
        assert ask(f"f/{n - 1}") > 0
        with pytest.raises(DictionaryError, match="answered with 404"):
            ask(f"f/{n}")


def test_random_directions(made: Made) -> None:
    dictionary = random_dictionary(made.subject, SITE, 40, 3)
    assert dictionary.d_sae == 40 and torch.allclose(dictionary.W_dec.norm(dim=1), torch.ones(40))
    assert ((dictionary.encode(torch.randn(9, made.subject.d_model)) > 0).sum(1) <= 3).all()


def test_the_job_of_the_peer(material: Material, tmp_path: Path) -> None:
    job = write_job(material, 5, tmp_path / "job")
    said = json.loads(job.read_text())
    assert (said["features"], said["site"], said["threads"]) == (5, SITE, torch.get_num_threads())
    assert (np.load(tmp_path / "job" / "tokens.npy") == material.tokens().numpy()).all()
    assert json.loads((tmp_path / "job" / "sae" / "cfg.json").read_text())["rescale_acts_by_decoder_norm"] is True
    longer = replace(material.dictionary, W_dec=2 * material.dictionary.W_dec)
    with pytest.raises(DictionaryError, match="decoder rows are"):
        write_job(material._replace(dictionary=longer), 5, tmp_path / "refused")
    assert not (tmp_path / "refused").exists()


def test_a_peer_that_cannot_run_says_why(material: Material, tmp_path: Path) -> None:
    job = write_job(material, 5, tmp_path / "job")
    with pytest.raises(DictionaryError, match="is no program") as missing:
        ask_peer(str(tmp_path / "nothing"), job)
    assert "pip install torch==" in missing.value.hint
    job.write_text("{}")
    with pytest.raises(DictionaryError, match=r"SAEDashboard could not run: .+"):
        ask_peer(sys.executable, job)


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = runner(capsys, "bench", "dashboard")("--rounds", "1", "--tokens", "1024", "--json", "--peer", tmp_path / "none")
    assert answer.code == 0, answer.err
    names = [row["name"] for row in answer.json["rows"]]
    assert "undertow: build and write" in names and "filter and sort of 1,048,576 features" in names
    assert not any("SAEDashboard" in name for name in names) and "is no program" in answer.json["notes"][0]
    assert answer.json["aims"]["store ≤ 2,000 bytes a feature"] is True and len(answer.json["aims"]) == 3
