"""Public names that are imported when first used."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from undertow.core.lazy import lazy_names


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package with a module `inner` that defines `thing`."""
    package = tmp_path / "a_room_for_a_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "inner.py").write_text("thing = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    return package.name


def test_names_and_modules(room: str) -> None:
    get = lazy_names(room, {"thing": "inner"})
    assert f"{room}.inner" not in sys.modules
    assert get("thing") == 3
    assert f"{room}.inner" in sys.modules
    with pytest.raises(AttributeError, match=f"module '{room}' has no attribute 'thnig'"):
        get("thnig")


def test_a_name_that_a_module_would_hide_is_refused() -> None:
    with pytest.raises(ValueError, match="both a name and a module called train"):
        lazy_names("room", {"train": "train"})
