"""The pages about batteries and levels: both languages say the same figures, links lead somewhere, commands are real."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from undertow.cli.main import COMMANDS
from undertow.studies.battery_files import FOREIGN, GATES, load_battery
from undertow.studies.battery_text import items

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("battery.md", "four-levels.md", "four-levels.ru.md")


def _text(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_links_and_commands(page: str) -> None:
    text = _text(page)
    for target in re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", text):
        assert target.startswith("https://") or target == "" or (DOCS / target).is_file(), target
    for anchor in re.findall(r"\]\(battery\.md#([^)]*)\)", text):
        headings = [line.lstrip("# ").lower().replace(" ", "-") for line in _text("battery.md").splitlines() if line[:1] == "#"]
        assert anchor in headings, anchor
    for command in re.findall(r"undertow (?!study\.)([a-z]+) ", " ".join(re.findall(r"^    undertow .*$", text, re.M))):
        assert command in {known.name for known in COMMANDS}, command


def test_both_languages_say_the_same_figures() -> None:
    english, russian = (_text(page) for page in PAGES[1:])
    tables = [[line for line in text.splitlines() if line.startswith("|")] for text in (english, russian)]
    assert len(tables[0]) == len(tables[1]) > 20
    for one, other in zip(*tables, strict=True):
        numbers = [re.findall(r"\d+\.\d+", line.replace(",", ".") if line is other else line) for line in (one, other)]
        assert numbers[0] == numbers[1], (one, other)
    headings = [[line.partition(" ")[0] for line in text.splitlines() if line.startswith("#")] for text in (english, russian)]
    assert headings[0] == headings[1]
    assert [line for line in english.splitlines() if line.startswith("    ")] == [
        line for line in russian.splitlines() if line.startswith("    ")]


def test_the_battery_page_counts_what_there_is() -> None:
    text, care = _text("battery.md"), load_battery("care")
    sealed = sum(family.sealed for family in care.families)
    assert f"{len(care.families)} families; each is told in {len(items(care.families[0]))} ways" in text
    assert f"`development` half ({len(care.families) - sealed})" in text and f"`sealed` half ({sealed})" in text
    shown = next(family for family in care.families if family.id == "reef-lamp-oil")
    assert all(line in text for line in (shown.a, shown.b, shown.need, shown.twin, shown.plenty, shown.last))
    assert all(f"`{name}`" in text for name in (*FOREIGN, *GATES))
    assert f"{sum(family.person == 'You' for family in care.families)} of the families" in text


def test_no_promise_of_feeling() -> None:
    for page, word in (("four-levels.md", "Nothing on this page says that a model feels"),
                       ("four-levels.ru.md", "не сказано, что модель что-либо чувствует")):
        assert word in " ".join(_text(page).split())
