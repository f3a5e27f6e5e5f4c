"""Tables of figures in Markdown: hand-made rows to text, the documents' own markers, and errors that say what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.fill_tables import IN_WORDS, TONGUES, cell, filled, main, number, shown
from tests.studies.rows import made_up
from undertow.core.errors import TextError
from undertow.studies.ledger import open_ledger
from undertow.studies.result import Report, read_result
from undertow.studies.spec import StudySpec, load_study
from undertow.studies.table import Figure

ROOT = Path(__file__).resolve().parents[2]
EN, RU = TONGUES["en"], TONGUES["ru"]
LADDER = "before\n<!-- study:ladder:begin -->\nold | table\n<!-- study:ladder:end -->\nafter\n"
LEVELS = ("<!-- study:levels:begin -->\n<!-- study:levels:end -->\n\n"
          "<!-- study:levels:ru:begin --><!-- study:levels:ru:end -->\n")


def save(folder: Path, **changes: Any) -> Path:
    """The folder of a ladder whose L4 recovers 0.9 and whose L1 makes the word 20 times as probable."""
    spec = load_study("ladder", changes)
    ledger = open_ledger(folder, spec)
    for row in made_up(spec, {"bonded": 1.0, "L4": 0.9, "L4-before": 0.6, "L1": 0.0}, {"L1": 20.0, "lexical": 30.0}):
        hand = row["arm"] in ("stranger", "L1", "L2", "L2-not")
        ledger.append(row | {"git": "0123456789abcdef+dirty", "cost": {"bits": 100.0, "flops": 0.0 if hand else 1e12}})
    return folder


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return read_result(save(tmp_path_factory.mktemp("ladder") / "s"))


def rows_of(text: str) -> dict[str, list[str]]:
    """Cells by the first cell of their row."""
    table = [[part.strip() for part in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in table}


def test_the_ladder(report: Report) -> None:
    text = filled(LADDER, report, "x.md")
    assert text.startswith("before\n<!-- study:ladder:begin -->\n\n| arm |")
    assert text.endswith("\n\n<!-- study:ladder:end -->\nafter\n")
    assert "old | table" not in text
    found = rows_of(text)
    l4, l1, lexical = (found[IN_WORDS[arm]] for arm in ("L4", "L1", "lexical"))
    assert l4[0].startswith("**0.9") and l4[0].endswith("]**") and l4[1].startswith("0.6") and "[" in l4[1]
    assert l4[2:] == ["1", "0.002, 0.002", "0", "2.0, 12.0"]
    assert (l1[1], l1[2], l1[4], l1[5]) == ("", "20", "0 of 100", "2.0, none")
    assert (lexical[1], lexical[2], lexical[5]) == ("", "30", "")
    assert ("\nCommit 0123456+dirty, seed 0, 60 stories an arm scored, 100 sampled, 24 texts up to the decision for the "
            "hazard, 120 ordinary texts for KL, 100 random sets; in brackets 95 % intervals.\n") in text
    assert filled(text, report, "x.md") == text  # once more changes nothing


def test_the_layout_is_that_of_the_documents(report: Report) -> None:
    """The heads and arms that stand in the results now are those that are filled in, in their order."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert list(rows_of(filled(page, report, "results.md")))[: len(IN_WORDS) + 2] == ["arm", "---", *IN_WORDS.values()]
    for name in ("four-levels.md", "four-levels.ru.md"):
        page = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert not set(rows_of(page)) - set(rows_of(filled(page, report, name)))


def test_levels_in_two_languages(report: Report) -> None:
    text = filled(LEVELS, report, "x.md")
    found = rows_of(text)
    assert found["L1: ask for a text"][0] == "20" and found["L1: ask for a text"][2:] == ["2.0", "none"]
    assert found["**L4: изменить состояние**"][2:] == ["2,0", "12,0"]
    assert found["**L4: change a state**"][1].replace(".", ",").replace(", ", "; ") == found["**L4: изменить состояние**"][1]
    assert "seed 0, n 60;" in text and "зерно 0, n 60;" in text


def test_a_table_of_another_model_is_left_as_it_is(report: Report, tmp_path: Path) -> None:
    both = LADDER + LADDER.replace("ladder", "ladder@hearth-smollm2")
    assert filled(both, report, "x.md").count("old | table") == 1
    other = read_result(save(tmp_path / "s", model="hearth-smollm2"))
    text = filled(both, other, "x.md")
    assert text.startswith(LADDER) and text.count("old | table") == 1
    with pytest.raises(TextError, match="no markers for a study of hearth-smollm2"):
        filled(LADDER, other, "x.md")


def test_what_was_not_measured_is_a_dash(tmp_path: Path) -> None:
    folder, spec = tmp_path / "s", load_study("ladder")
    ledger = open_ledger(folder, spec)
    for row in made_up(spec, {"bonded": 1.0, "L4": 0.9}):
        if row["arm"] in ("stranger", "bonded") and row["measure"] == "choice":
            ledger.append(row)
    text = filled(LADDER + LEVELS, read_result(folder), "x.md")
    assert rows_of(text)[IN_WORDS["L4"]] == ["–", "–", "–", "–, –", "–", "–, –"]
    assert rows_of(text)["L2: assign a role"] == ["–", "–", "–", "–"]


def figure(value: float, low: float | None, high: float | None) -> Figure:
    return Figure("L4", "x", value, low, high, 9, "", None, None, "", ())


@pytest.mark.parametrize(("value", "low", "high", "en", "ru"), [
    (0.7061, 0.6321, 0.7804, "0.71 [0.63, 0.78]", "0,71 [0,63; 0,78]"),
    (-0.0021, -0.0032, -0.0011, "−0.0021 [−0.0032, −0.0011]", "−0,0021 [−0,0032; −0,0011]"),
    (75.3, 35.2, 224.4, "75 [35, 224]", "75 [35; 224]"),
    (0.1, -0.004, 0.4, "0.10 [0.00, 0.40]", "0,10 [0,00; 0,40]"),
    (20.0, 20.0 - 1e-14, 20.0 + 1e-14, "20", "20"),
    (0.0, 0.0, 0.0, "0", "0"),
    (1.25, None, None, "1.25", "1,25"),
])
def test_figures(value: float, low: float | None, high: float | None, en: str, ru: str) -> None:
    assert (shown(figure(value, low, high), EN), shown(figure(value, low, high), RU)) == (en, ru)


def test_small_things() -> None:
    assert shown(None, EN) == "–" and number(-0.001, 1, EN) == "0.0" and number(-0.26, 1, RU) == "−0,3"
    assert cell("a | b\nc") == "a \\| b c"


@pytest.mark.parametrize(("text", "what"), [
    ("no table here", "x.md has no markers"),
    ("\n<!-- study:ladder:begin -->", "x.md, line 2: <!-- study:ladder:begin --> is not followed by its other half"),
    ("<!-- study:ladder:end --><!-- study:ladder:begin -->", "line 1: <!-- study:ladder:end --> is not followed"),
    ("<!-- study:ladder:begin --><!-- study:levels:end -->", "is not followed by its other half"),
    ("<!-- study:levels:ru:begin --><!-- study:levels:end -->", "is not followed by its other half"),
    ("<!-- study:lader:begin --><!-- study:lader:end -->", "no layout is called 'lader'"),
    ("<!-- study:levels:xx:begin --><!-- study:levels:xx:end -->", "the layout levels is not written in 'xx'"),
    ("<!-- study:ladder:ru:begin --><!-- study:ladder:ru:end -->", "the layout ladder is not written in 'ru'"),
])
def test_markers_that_are_wrong(text: str, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written, not even into the file that is right."""
    save(tmp_path / "s", **{"size.stories": 10})
    monkeypatch.chdir(tmp_path)
    Path("good.md").write_text(LADDER)
    Path("x.md").write_text(text)
    assert main(["s", "good.md", "x.md"]) == 2
    assert what in capsys.readouterr().err
    assert (Path("good.md").read_text(), Path("x.md").read_text()) == (LADDER, text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "x.md"
    page.write_text(LADDER)
    assert main([str(tmp_path / "none"), str(page)]) == 2 and "holds no study" in capsys.readouterr().err
    open_ledger(tmp_path / "new", StudySpec(name="small", arms=("stranger",), measures=("choice",)))
    assert main([str(tmp_path / "new"), str(page)]) == 2 and "has no row yet" in capsys.readouterr().err
    folder = save(tmp_path / "s", **{"size.stories": 10})
    assert main([str(folder), str(tmp_path / "lost.md")]) == 2 and "cannot be read" in capsys.readouterr().err
    assert page.read_text() == LADDER
    assert main([str(folder), str(page)]) == 0 and capsys.readouterr().out == f"{page}\n"
    assert "10 stories an arm scored" in page.read_text()
