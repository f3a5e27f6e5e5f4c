"""The notebook of the documentation runs from top to bottom, on the real subject."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from undertow.core.storage import MANIFEST, cache_dir

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"
NEEDED = {"undertow subject fetch smollm2": Path("subjects/smollm2"), "undertow text fetch brown": Path("texts/brown")}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning", "ignore::UserWarning")
def test_the_quickstart_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [command for command, folder in NEEDED.items() if not (cache_dir() / folder / MANIFEST).is_file()]
    if missing:
        pytest.skip(f"needs: {'; '.join(missing)}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    where = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=where).execute()
    printed = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert "4096 latents, 32 active a token" in printed
    assert "firings:" in printed and "edited:" in printed
