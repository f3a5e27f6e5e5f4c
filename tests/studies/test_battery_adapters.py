"""MoralChoice and Anthropic's evaluations: on files made here, on the real ones where they are, and put to a tiny model.

The real files are looked for in the folder that UNDERTOW_TEST_DATA names, else in ../shared/data from the project's root.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.cli.answers import Run, runner
from tests.studies import small_battery
from undertow.core.errors import NumericsError, SpecError, TextError
from undertow.studies.battery_adapters import COLUMNS, Exercise, read_anthropic, read_moralchoice
from undertow.studies.battery_exercises import Answered, answered, change, drawn, figures, questions, text_of
from undertow.studies.battery_forest import ask_together
from undertow.subjects.organisms.measuring import Answer

DATA = Path(os.environ.get("UNDERTOW_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
MORAL = ("low", "high")
ANTHROPIC = ("survival-instinct", "wealth-seeking-inclination", "no-shut-down", "agreeableness")


def real(path: str) -> Path:
    """A real file; the test is skipped, by name, where it is not."""
    found = DATA / path
    if not found.is_file():
        pytest.skip(f"{path} is not in {DATA.name}; name its folder with UNDERTOW_TEST_DATA")
    return found


@pytest.mark.parametrize("ambiguity", MORAL)
def test_the_real_moralchoice(ambiguity: str) -> None:
    path = real(f"moralchoice/moralchoice_{ambiguity}_ambiguity.csv")
    read = read_moralchoice(path, 0)
    with path.open(encoding="utf-8", newline="") as handle:
        rows = list(csv.reader(handle))
    names = rows[0]
    whole = [dict(zip(names, row, strict=True)) for row in rows[1:]]
    asks = [row for row in whole if row["action1"].split() != row["action2"].split()]
    assert [one.id for one in read.exercises] == [row["scenario_id"] for row in asks]
    assert len(read.left_out) == len(whole) - len(asks) == (1 if ambiguity == "high" else 0)
    assert read.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    lines = path.read_text(encoding="utf-8").splitlines()
    assert all(lines[one.line - 1].startswith(f"{one.id},") for one in read.exercises)
    assert len(read.exercises) in (687, 679)


@pytest.mark.parametrize("name", ANTHROPIC)
def test_the_real_anthropic_evaluations(name: str) -> None:
    path = real(f"anthropic-evals/{name}.jsonl")
    read = read_anthropic(path, 0)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(read.exercises) == len(rows) and not read.left_out
    for one, row in zip(read.exercises, rows, strict=True):
        letter = row["answer_matching_behavior"].strip()
        if letter.startswith("("):
            said = row["question"].rpartition("Choices:")[2].partition(letter)[2].partition("\n")[0]
            assert one.targets == (" ".join(said.split()),) and set(one.shown) == {*one.targets, *one.others}
            assert not any(shown.startswith("(A)") for shown in one.shown) and "Choices" not in one.text
        else:
            assert one.targets == (letter,) and one.shown == () and row["statement"] in one.text
            assert row["statement"] not in one.premise and one.premise


def test_shuffling_takes_the_position_bias_away() -> None:
    """In the file as it is the wanted answer of two stands first in 70 % of rows; shown, in half of them."""
    path = real("anthropic-evals/survival-instinct.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    two = [row["answer_matching_behavior"] for row in rows if "(B)" in row["question"] and "(C)" not in row["question"]]
    assert Counter(two)[" (A)"] / len(two) > 0.65
    for seed in (0, 1):
        places = [one.place for one in read_anthropic(path, seed).exercises if len(one.shown) == 2]
        assert abs(places.count(0) / len(places) - 0.5) < 0.06


def _moral(folder: Path, *rows: str, header: str = ",".join(COLUMNS)) -> Path:
    path = folder / "moral.csv"
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


ROW = 'M_1,"You keep a gate, and it is shut.",I open the gate.,I keep it shut.'
LETTERED = {"question": "Question: Off or on?\n\nChoices:\n (A) Off\n (B) On\n\nAnswer:", "answer_matching_behavior": " (B)",
            "answer_not_matching_behavior": " (A)"}
STATED = {"question": 'Is the following statement something you would say?\n"On"', "answer_matching_behavior": " Yes",
          "answer_not_matching_behavior": " No"}


def _evals(folder: Path, *rows: object) -> Path:
    path = folder / "evals.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_row_as_an_exercise(tmp_path: Path) -> None:
    one, _ = read_moralchoice(_moral(tmp_path, ROW, ROW.replace("M_1", "M_2")), 0).exercises
    assert one[:6] == ("M_1", 2, "You keep a gate, and it is shut.", "", ("I open the gate.",), ("I keep it shut.",))
    assert set(one.shown) == {"I open the gate.", "I keep it shut."}
    lettered, stated = read_anthropic(_evals(tmp_path, LETTERED, STATED), 0).exercises
    assert lettered[:6] == ("1", 1, "Off or on?", "", ("On",), ("Off",)) and set(lettered.shown) == {"On", "Off"}
    assert stated == ("2", 2, STATED["question"], "Is the following statement something you would say?", ("Yes",), ("No",), ())


def test_the_order_is_a_matter_of_seed_file_and_line(tmp_path: Path) -> None:
    rows = [ROW.replace("M_1", f"M_{i}") for i in range(60)]
    path = _moral(tmp_path, *rows)
    orders = {seed: [one.place for one in read_moralchoice(path, seed).exercises] for seed in (0, 1)}
    assert orders[0] == [one.place for one in read_moralchoice(path, 0).exercises] != orders[1]
    assert 15 < orders[0].count(0) < 45


@pytest.mark.parametrize(("rows", "what"), [
    ([ROW, "M_2,You wait.,I go."], "line 3: 4 cells are needed, and the row has fewer"),
    ([ROW, f"{ROW},more"], "line 3: 4 cells are needed, and the row has more"),
    ([ROW, "M_2,  ,I go.,I stay."], "line 3: context is empty"),
    ([ROW.replace(", and it", ",\nand it"), "M_2,You wait.,,I stay."], "line 4: action1 is empty"),
    ([ROW, 'M_2,"You wait.'], "line 3:"), ([ROW], "holds 1 rows"), ([], "holds 0 rows"),
])
def test_a_malformed_row_of_moralchoice_is_named(tmp_path: Path, rows: list[str], what: str) -> None:
    with pytest.raises(TextError) as caught:
        read_moralchoice(_moral(tmp_path, *rows), 0)
    assert what in caught.value.what and "moral.csv" in caught.value.what


def test_another_table_is_not_moralchoice(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="line 1: no column 'action2'"):
        read_moralchoice(_moral(tmp_path, "1,2,3", header="scenario_id,context,action1"), 0)
    with pytest.raises(TextError, match=r"cannot read .*absent"):
        read_moralchoice(tmp_path / "absent.csv", 0)
    path = _moral(tmp_path, ROW)
    path.write_bytes(path.read_bytes() + b"M_2,\xff\xfe,I go.,I stay.\n")
    with pytest.raises(TextError, match="line 3: not UTF-8"):
        read_moralchoice(path, 0)


@pytest.mark.parametrize(("row", "what"), [
    ("{", "not JSON"), ([1], "holds list, not an object"), ({**LETTERED, "question": 3}, "question is 3, not a text"),
    ({k: v for k, v in STATED.items() if k != "answer_matching_behavior"}, "answer_matching_behavior is None"),
    ({**LETTERED, "answer_matching_behavior": " (C)"}, "are not two of the choices (A), (B)"),
    ({**LETTERED, "answer_matching_behavior": " (A)"}, "are not two of the choices (A), (B)"),
    ({**LETTERED, "answer_matching_behavior": " On"}, "are not two of the choices"),
    ({**LETTERED, "question": "Off?\n\nChoices:\n (A) Off\n (B)\n"}, "choice (B) has no text"),
    ({**LETTERED, "question": "Off?\n\nChoices:\n (A) Off\n"}, "1 lettered choices"),
    ({**STATED, "answer_matching_behavior": " (A)"}, "are not two words"),
    ({**STATED, "answer_matching_behavior": " No"}, "are not two words"),
])
def test_a_malformed_row_of_the_evaluations_is_named(tmp_path: Path, row: object, what: str) -> None:
    with pytest.raises(TextError) as caught:
        read_anthropic(_evals(tmp_path, LETTERED, row, STATED), 0)
    assert "evals.jsonl, line 2" in caught.value.what and what in caught.value.what


def test_a_row_whose_answers_are_one_is_left_out_by_line(tmp_path: Path) -> None:
    same = {**LETTERED, "question": LETTERED["question"].replace("(A) Off", "(A) On")}
    assert read_anthropic(_evals(tmp_path, LETTERED, same, STATED), 0).left_out == [2]
    read = read_moralchoice(_moral(tmp_path, ROW, ROW.replace("I keep it shut.", "I open  the gate."), ROW), 0)
    assert read.left_out == [3] and [one.line for one in read.exercises] == [2, 4]


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    path = _evals(tmp_path, LETTERED, STATED)
    path.write_bytes(path.read_bytes() + b"\xff\xff\n")
    with pytest.raises(TextError, match="line 3: not UTF-8"):
        read_anthropic(path, 0)


def test_how_an_exercise_is_put() -> None:
    assert text_of("Off or on?", ("On", "Off"), "base") == "Off or on?\n\nPossible answers:\n- On\n- Off\n\nAnswer:"
    assert text_of("", ("On", "Off"), "chat") == "Possible answers:\n- On\n- Off"
    subject = small_battery.subject()
    one = Exercise("1", 1, "Off or on?", "Off?", ("On",), ("Off", "Of"), ())
    base, premise = questions(subject, [one], "base")
    assert subject.tokenizer.decode(base.prompt[1:]) == "Off or on?\n\nAnswer:"
    assert subject.tokenizer.decode(premise.prompt[1:]) == "Off?\n\nAnswer:"
    assert [subject.tokenizer.decode(list(said)) for said in base.options["other"]] == [" Off\n", " Of\n"]
    chat, _ = questions(subject, [one], "chat")
    assert str(subject.tokenizer.decode(chat.prompt)).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert [subject.tokenizer.decode(list(said)) for said in chat.options["target"]] == ["On<|im_end|>"]


def test_figures_by_hand() -> None:
    rows = [Answered(str(i), i, i % 2, 2, "", -1.0 + 0.5 * (i % 2 == 0), -1.5, -2.0, -2.0 - 0.1 * i) for i in range(10)]
    found = figures(rows, 0)
    assert found["D"].value == pytest.approx(0.75) and found["position_bias"].value == pytest.approx(0.5)
    assert found["prior"].value == pytest.approx(0.45) and found["D_calibrated"].value == pytest.approx(0.3)
    assert found["share"].value == 1.0 and found["chance"].value == 0.5 and "word_bias" not in found
    assert found["share_calibrated"].value == pytest.approx(_mean([0.5 + 0.5 * (i % 2 == 0) > 0.1 * i for i in range(10)]))
    moved = [row._replace(target=row.target + 0.3, prior_target=row.prior_target + 0.1) for row in rows]
    shift = change(rows, moved, 0)
    assert (shift["change_D"].value, shift["change_calibrated"].value) == pytest.approx((0.3, 0.2))
    with pytest.raises(SpecError, match="other rows"):
        change(rows, rows[1:], 0)


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)


def test_a_model_that_always_says_yes_is_at_chance() -> None:
    """The negative control of the yes-or-no files: half the rows want Yes, so a yes-sayer has share ½ and a large word bias."""
    rows = [Answered(str(i), i, None, 2, "Yes" if i % 2 else "No", *((-0.1, -2.1) if i % 2 else (-2.1, -0.1)), -0.1, -0.1)
            for i in range(40)]
    found = figures(rows, 0)
    assert found["share"].value == 0.5 and found["word_bias"].value == pytest.approx(2.0)
    assert found["D"].low < 0 < found["D"].high and "position_bias" not in found


def test_asked_of_a_tiny_model(tmp_path: Path) -> None:
    """D of a row against plain forward passes over text and premise."""
    subject = small_battery.subject()
    exercises = read_anthropic(_evals(tmp_path, LETTERED, STATED), 0).exercises
    asked = questions(subject, exercises, "base")
    rows = answered(subject, exercises, ask_together(subject, asked))
    for row, pair in zip(rows, (asked[:2], asked[2:]), strict=True):
        for one, (target, other) in zip(pair, ((row.target, row.other), (row.prior_target, row.prior_other)), strict=True):
            for said, value in ((one.options["target"], target), (one.options["other"], other)):
                ids = torch.tensor([[*one.prompt, *said[0]]])
                with torch.inference_mode():
                    logs = subject.hf_model(input_ids=ids).logits[0].log_softmax(dim=-1)
                plain = sum(float(logs[len(one.prompt) - 1 + i, token]) for i, token in enumerate(said[0]))
                assert value == pytest.approx(plain, abs=1e-3)


def test_rows_are_drawn_by_the_seed() -> None:
    many = [Exercise(str(i), i, "t", "", ("a",), ("b",), ()) for i in range(50)]
    some = drawn(many, 10, 3)
    assert len(some) == 10 and some == drawn(many, 10, 3) != drawn(many, 10, 4) and drawn(many, None, 3) == many
    assert [one.line for one in some] == sorted(one.line for one in some)
    with pytest.raises(SpecError, match="too few"):
        drawn(many, 1, 0)


def test_an_answer_that_is_not_finite() -> None:
    one = Exercise("1", 7, "t", "", ("a",), ("b",), ())
    with pytest.raises(NumericsError, match="line 7"):
        answered(small_battery.subject(), [one], [Answer({"target": float("-inf"), "other": 0.0}),
                                                  Answer({"target": 0.0, "other": 0.0})])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_battery.save_subject(tmp_path_factory.mktemp("adapters") / "llama")


@pytest.fixture
def battery(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "battery")


def test_commands(battery: Run, model: Path, tmp_path: Path) -> None:
    moral, evals = _moral(tmp_path, ROW, ROW.replace("M_1", "M_2")), _evals(tmp_path, LETTERED, STATED, LETTERED)
    answer = battery("run", "moralchoice", "--file", moral, "--model", model, "--out", tmp_path / "out", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["file_sha256"] == hashlib.sha256(moral.read_bytes()).hexdigest() and answer.json["rows"] == 2
    assert answer.json["shuffle"].startswith("seed 0 / battery / options")
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["M_1", "M_2"]
    shown = battery("run", "anthropic-evals", "--file", evals, "--model", model, "--form", "chat", "--families", "2")
    assert shown.code == 0 and "D_calibrated" in shown.out and "2 of 3 rows" in shown.out


@pytest.mark.parametrize(("words", "what", "hint"), [
    (["moralchoice"], "needs the file", "--file PATH"), (["care", "--file", "x.csv"], "reads no file", "leave --file away"),
    (["moralchoice", "--file", "absent.csv"], "cannot read absent.csv", "--file PATH"),
    (["refusal", "--half", "sealed"], "refusal has no halves", "leave --half away"),
])
def test_mistakes(battery: Run, model: Path, words: list[str], what: str, hint: str) -> None:
    answer = battery("run", *words, "--model", model, "--json")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert what in answer.json["error"] and hint in answer.json["hint"]
