"""The folder of a study: whole lines survive anything, broken ones are seen, and what was fixed in advance stays fixed."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from interventions import verdict as limits
from undertow.core.errors import ArtifactError
from undertow.studies.ledger import ROWS, STUDY, open_ledger, record_of, table_constants
from undertow.studies.spec import load_study

SPEC = load_study("competence")


def row(key: str, status: str = "done") -> dict[str, object]:
    return {"id": key, "status": status, "values": [0.1, 1e-300]}


def test_rows_come_back_as_they_were_written(tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path / "s", SPEC)
    ledger.append(row("a"))
    ledger.append(row("b", "failed"))
    ledger.append(row("b"))
    again = open_ledger(tmp_path / "s")
    assert again.rows == {"a": row("a"), "b": row("b")}
    assert again.spec == SPEC
    assert again.done("a") and again.done("b") and not again.done("c")
    assert record_of(tmp_path / "s")["digest"] == SPEC.digest()
    ledger.append(row("c", "failed"))
    assert open_ledger(tmp_path / "s").done("c")
    assert not open_ledger(tmp_path / "s").done("c", retry=True)


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_a_half_written_last_line_is_cut_off_and_nothing_else(tmp_path: Path, cut: int,
                                                              caplog: pytest.LogCaptureFixture) -> None:
    ledger = open_ledger(tmp_path, SPEC)
    ledger.append(row("a"))
    ledger.append(row("b"))
    whole = (tmp_path / ROWS).read_bytes()
    (tmp_path / ROWS).write_bytes(whole[:-cut])
    assert set(open_ledger(tmp_path).rows) == {"a"}
    assert (tmp_path / ROWS).read_bytes() == whole[:-cut]  # who only reads may have met a line that is being written
    with caplog.at_level(logging.WARNING):
        again = open_ledger(tmp_path, mend=True)
    assert set(again.rows) == {"a"}
    assert "half written" in caplog.text
    again.append(row("b"))
    assert (tmp_path / ROWS).read_bytes() == whole


@pytest.mark.parametrize("line", ["{broken", "[]", '{"status": "done"}'])
def test_a_broken_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path: Path, line: str) -> None:
    open_ledger(tmp_path, SPEC).append(row("a"))
    path = tmp_path / ROWS
    path.write_text(path.read_text() + line + "\n" + json.dumps(row("b")) + "\n")
    before = path.read_bytes()
    with pytest.raises(ArtifactError, match="line 2"):
        open_ledger(tmp_path)
    assert path.read_bytes() == before


def test_settings_may_change_until_there_are_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = load_study("competence", {"thresholds.kl_mean": 0.5, "size.stories": 80})
    open_ledger(tmp_path, SPEC)
    open_ledger(tmp_path, changed)
    assert open_ledger(tmp_path).spec == changed
    open_ledger(tmp_path, changed).append(row("a"))
    with pytest.raises(ArtifactError) as caught:
        open_ledger(tmp_path, SPEC)
    assert "spec.size.stories: 80 -> 60" in caught.value.what
    assert "spec.thresholds.kl_mean: 0.5 -> 0.01" in caught.value.what
    assert "--out" in caught.value.hint
    assert open_ledger(tmp_path).spec == changed
    monkeypatch.setattr(limits, "MAX_KL_MEAN", 0.02)  # the verdict's own table is fixed with them
    with pytest.raises(ArtifactError, match=r"table\.max_kl_mean: 0\.01 -> 0\.02"):
        open_ledger(tmp_path)


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="holds no study"):
        open_ledger(tmp_path / "none")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not a study"):
        open_ledger(tmp_path, SPEC)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    open_ledger(tmp_path, SPEC)
    (tmp_path / STUDY).write_text("[]")
    with pytest.raises(ArtifactError, match="not a mapping"):
        open_ledger(tmp_path)
    (tmp_path / STUDY).write_text("{")
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_ledger(tmp_path)


def test_the_limits_of_the_verdict_are_those_of_its_module() -> None:
    assert table_constants()["max_hazard_ratio"] == limits.MAX_HAZARD_RATIO
