"""Labels with history, notes, stars: kept by SAE, added only, refused when too long."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dashboards.notes import MAX_LABEL, Marks, Notes, notes_path
from undertow.core.errors import SpecError, StorageError


def test_labels_have_a_history(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "deep" / "notes.sqlite")
    assert notes.marks("a") == Marks({}, frozenset())
    for text in ("first", "  second \n try ", ""):
        notes.add_label("a", 7, text)
    notes.add_label("a", 8, "another")
    notes.add_label("b", 7, "other SAE")
    assert [entry.text for entry in notes.labels("a", 7)] == ["", "second try", "first"]
    assert notes.marks("a").labels == {8: "another"}, "an empty label takes the one before back"
    assert Notes(tmp_path / "deep" / "notes.sqlite").marks("b").labels == {7: "other SAE"}
    assert notes.labels("a", 7)[0].written.endswith("+00:00")


def test_notes_and_stars(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.sqlite")
    notes.add_note("a", 1, "one")
    notes.add_note("a", 1, "'); DROP TABLE notes; --")
    assert [entry.text for entry in notes.notes("a", 1)] == ["'); DROP TABLE notes; --", "one"]
    for on in (True, True, False, True):
        notes.star("a", 3, on)
    notes.star("a", 4, False)
    assert notes.marks("a").starred == {3}


def test_refusals(tmp_path: Path) -> None:
    notes = Notes(tmp_path / "notes.sqlite")
    with pytest.raises(SpecError, match="at most 200"):
        notes.add_label("a", 1, "x" * (MAX_LABEL + 1))
    with pytest.raises(SpecError, match="the note is blank"):
        notes.add_note("a", 1, " \n")
    assert notes.marks("a").labels == {}
    (tmp_path / "text").write_text("this is no database, and long enough to be seen as one " * 30)
    with pytest.raises(StorageError, match="--notes"):
        Notes(tmp_path / "text")


def test_writers_at_once(tmp_path: Path) -> None:
    path = tmp_path / "notes.sqlite"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: Notes(path).add_label("a", i, f"label {i}"), range(40)))
    assert len(Notes(path).marks("a").labels) == 40


def test_where_they_live(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERTOW_DATA", "/somewhere")
    assert notes_path() == Path("/somewhere/notes.sqlite")
    monkeypatch.delenv("UNDERTOW_DATA")
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert notes_path() == Path("/data/undertow/notes.sqlite")
