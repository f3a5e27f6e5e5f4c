"""docs/dashboard.md does not drift: its pictures are there and small, its keys are those of the pages, its options exist."""

from __future__ import annotations

import re
from pathlib import Path

from dashboards.rendering import TEMPLATES

DOCS = Path(__file__).resolve().parents[2] / "docs"
TEXT = (DOCS / "dashboard.md").read_text(encoding="utf-8")


def test_pictures_are_there_and_small() -> None:
    linked = re.findall(r"\((screenshots/[^)]+\.png)\)", TEXT)
    assert len(linked) >= 10 and len(set(linked)) == len(linked)
    for name in linked:
        assert 0 < (DOCS / name).stat().st_size < 200_000, name
        assert (DOCS / name).read_bytes().startswith(b"\x89PNG")
    taken = sorted(path.stem for path in (DOCS / "screenshots").glob("*.png"))
    for stem in taken:
        if stem.endswith("-light"):
            assert stem.replace("-light", "-dark") in taken, "every view in both themes"


def test_keys_are_those_of_the_help() -> None:
    page = (TEMPLATES / "base.html").read_text(encoding="utf-8")
    rows = re.findall(r'<th scope="row">(.*?)</th>', page)
    help_keys = {key for row in rows for key in re.findall(r"<kbd>(.*?)</kbd>", row)}
    table = TEXT[TEXT.index("| key |"):TEXT.index("Reading needs no script")]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    said = {key for line in lines for key in re.findall(r"`(.+?)`", line.split("|")[1])}
    assert said == help_keys and len(said) > 20


def test_words_of_an_address_and_formats_exist() -> None:
    for kind in ("csv", "html", "neuronpedia", "neuronpedia-vectors"):
        assert f"--format {kind}" in TEXT
    assert "/compare?s=" in TEXT and "/s/STORE/features" in TEXT
