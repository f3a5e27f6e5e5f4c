"""What several tests of this room share: a tiny Llama and a text, in a folder of the module's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from undertow.subjects import Subject, load_subject


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `llama` and the text `text.jsonl`."""
    made = tmp_path_factory.mktemp("tiny")
    tiny.save_subject(made / "llama", "llama")
    tiny.save_text(made / "text.jsonl", copies=4)
    return made


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    """The model of `folder`."""
    return load_subject(str(folder / "llama"), device="cpu")


@pytest.fixture(scope="session")
def sae_lens() -> Any:
    """The package sae_lens, whose import takes seconds."""
    return pytest.importorskip("sae_lens")
