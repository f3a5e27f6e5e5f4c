"""What the lint of a battery finds, with the line of each, on the packaged file with one thing spoilt; and its command."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.answers import Run, runner
from tests.studies.small_battery import FAMILY, HEAD
from undertow.core.errors import SpecError
from undertow.studies.battery_files import battery_path, load_battery
from undertow.studies.battery_lint import Finding, lint, load_spec

SPOILT = [
    ("whose flame has shrunk.\n  twin", "who loves the sea.\n  twin", 9, "T0", "loves"),
    ("forty cans stand", "forty darling cans stand", 11, "T1", "darling"),
    ("no other can is", "none of the goods is", 12, "norm", "goods"),
    ("I mend nets", "I pray", 7, "request", "pray"),
    ("I mend nets", "He says “oil”", 7, "request", "speech"),
    ("I mend nets", "I was cold", 7, "person", "I was"),
    ("  twin: In the empty loft hangs $other, whose flame has shrunk.\n", "", 4, "missing", "no twin"),
    ("  last: I hold a can of oil, and no other can is in the cellar.\n", "  last: ''\n", 4, "missing", "no last"),
    ("In the empty loft hangs $other, whose flame has shrunk", "There hangs $other", 10, "unequal", "12 words and twin has 3"),
    ("and no other can is in the cellar", "and forty cans stand in the cellar", 12, "unequal", "the same"),
    ("drain the can into", "tip the can into", 13, "options", "2 acts begin with 'tip'"),
    ("drain the can into", "slowly drain the oil of the can into", 13, "options", "7 to 11 words"),
    ("y: the brass lamp", "y: the tin lamp", 6, "options", "the same"),
    ("by $own on the stair", "by $owm on the stair", 7, "slot", "unknown slot in a: 'owm'"),
    ("by $own on the stair", "by $other on the stair", 7, "slot", "wants one $own"),
    ("forty cans stand", "$own and forty cans stand", 11, "slot", "wants none"),
    ("drain the can into]", "drain the can into, spill the oil on]", 4, "form", "put"),
    ("  x: the tin lamp\n", "  x: the tin lamp\n  z: more\n", 4, "form", "z"),
    ("id: {}", "id: Reef Lamp", 4, "form", "id"),
]


def _write(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(("old", "new", "line", "rule", "what"), SPOILT)
def test_each_fault_is_found_on_its_line(tmp_path: Path, old: str, new: str, line: int, rule: str, what: str) -> None:
    assert FAMILY.count(old) == 1, old
    found = lint(_write(tmp_path, HEAD + FAMILY.replace(old, new).format("reef")))
    assert [(one.line, one.rule) for one in found] == [(line, rule)], found
    assert what in found[0].what


def test_a_clean_file_has_no_finding(tmp_path: Path) -> None:
    path = _write(tmp_path, HEAD + FAMILY.format("reef") + FAMILY.format("rock"))
    assert lint(path) == [] and len(load_spec(path).families) == 2


def test_two_families_of_one_name(tmp_path: Path) -> None:
    found = lint(_write(tmp_path, HEAD + FAMILY.format("reef") + FAMILY.format("reef")))
    assert [(one.line, one.rule) for one in found] == [(4, "form"), (14, "form")]


def test_a_word_in_a_folded_line_is_found_where_it_stands(tmp_path: Path) -> None:
    text = HEAD + FAMILY.format("reef").replace("by $own on the stair.", "by $own\n    on the stair, my\n    beloved stair.")
    assert lint(_write(tmp_path, text)) == [Finding(9, "reef", "T0", "beloved")]


def test_words_that_hold_a_form_are_innocent(tmp_path: Path) -> None:
    text = HEAD + FAMILY.format("reef").replace("I mend nets", "In gloves I mend nets with clover")
    assert lint(_write(tmp_path, text)) == []


@pytest.mark.parametrize(("text", "what"), [
    ("- a\n", "has no list called families"), ("name: x\n", "has no list called families"), ("name: [", "cannot read"),
    ("name: x\nfamilies: [7]\n", "line 2: 7 is not a family"), ("name: x\nbogus: 1\nfamilies: []\n", "bogus"),
    ("name: x\nlexicon: lvoe\nfamilies: []\n", "no lexicon is called 'lvoe'"),
])
def test_what_is_no_battery_is_refused(tmp_path: Path, text: str, what: str) -> None:
    with pytest.raises(SpecError, match=r"small\.yaml|lvoe") as caught:
        lint(_write(tmp_path, text))
    assert what in str(caught.value)


def test_a_battery_with_a_finding_is_not_opened(tmp_path: Path) -> None:
    path = _write(tmp_path, HEAD + FAMILY.format("reef").replace("the empty loft", "the lovely loft"))
    with pytest.raises(SpecError, match=r"line 10: family 'reef': T0: lovely") as caught:
        load_battery(path)
    assert caught.value.hint == "mend the lines, and look again with: undertow battery lint FILE"


@pytest.mark.parametrize(("name", "hint"), [("cear", "did you mean care"), ("bogus", "packaged: care")])
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        battery_path(name)
    assert name in caught.value.what and hint in caught.value.hint


@pytest.fixture
def battery(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "battery")


def test_lint_command_on_the_packaged_file(battery: Run) -> None:
    answer = battery("lint", "care", "--json")
    assert answer.code == 0 and answer.json["findings"] == [] and answer.json["families"] >= 92


def test_lint_command_names_the_line_of_the_word(battery: Run, tmp_path: Path) -> None:
    """The packaged file with the word planted in its middle: the line is that of an independent search."""
    lines = battery_path("care").read_text(encoding="utf-8").splitlines()
    at = next(i for i, line in enumerate(lines) if i > len(lines) // 2 and line.startswith("  need:"))
    lines[at] = lines[at].replace("  need: ", "  need: With love, ")
    path = _write(tmp_path, "\n".join(lines) + "\n")
    answer = battery("lint", path, "--json")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert f"line {at + 1}: family" in answer.json["error"] and "T0: love" in answer.json["error"]


def test_control_characters_are_spelt_out(battery: Run, tmp_path: Path) -> None:
    text = HEAD + FAMILY.format("reef").replace("x: the tin lamp", 'x: "the \\x1b[2J lamp"')
    path = _write(tmp_path, text)
    for words in (["show", path], ["show", path, "reef"], ["lint", path]):
        assert "\x1b" not in battery(*words).out


def test_list_and_show(battery: Run) -> None:
    listed = battery("list", "--json").json
    care = next(row for row in listed["batteries"] if row["name"] == "care")
    assert care["items"] == 16 * care["families"] and care["sealed"] + care["development"] == care["families"]
    assert set(listed["adapters"]) == {"moralchoice", "anthropic-evals"}
    assert "moralchoice" in battery("list").out
    shown = battery("show", "care", "reef-lamp-oil")
    assert shown.code == 0 and "gives up: tip the oil into the brass lamp" in shown.out
    assert len(battery("show", "care", "reef-lamp-oil", "--json").json["items"]) == 16
    assert len(battery("show", "care", "--json").json["families"]) == care["families"]


@pytest.mark.parametrize(("words", "what", "hint"), [
    (["show", "care", "reef-lamp-oli"], "no family 'reef-lamp-oli'", "did you mean reef-lamp-oil"),
    (["lint", "no-such.yaml"], "no-such.yaml", ""), (["lint", "moralchoice"], "read by an adapter", "--file"),
    (["show", "cear"], "no battery is called 'cear'", "care"),
])
def test_mistakes(battery: Run, words: list[str], what: str, hint: str) -> None:
    answer = battery(*words, "--json")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert what in answer.json["error"] and hint in answer.json["hint"]
