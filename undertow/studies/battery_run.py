"""A battery put to a subject, and to the same subject under a recipe: rows, figures, and what is written of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

from pydantic import Field, StrictStr

from interventions.applying import apply
from interventions.recipe import Recipe
from sae.dictionary import Dictionary
from undertow.core.record import run_record
from undertow.core.spec import Spec
from undertow.core.storage import create_artifact, write_json, write_text
from undertow.studies import battery_exercises, battery_figures, battery_gates
from undertow.studies.battery_adapters import Exercise, Foreign
from undertow.studies.battery_asking import Asked, Form, Half, Row, chosen, question, rows_of, to_ask
from undertow.studies.battery_exercises import Answered
from undertow.studies.battery_figures import Figure, Table, table
from undertow.studies.battery_forest import ask_together
from undertow.studies.battery_gates import GateRow, GateSpec, Request
from undertow.studies.battery_text import BatterySpec
from undertow.subjects.organisms.measuring import Answer, Progress, Question, ask
from undertow.subjects.subject import Subject

KIND = "battery-run"


@final
class BatteryRun(Spec):
    """What is asked.

    Attributes:
        battery: a packaged battery or a file.
        half: development, sealed or all. families: how many of them, drawn by the seed; all if absent.
        form: base (plain text) or chat.
        seed: of draws, intervals and shuffles.
    """

    battery: StrictStr
    half: Half = "development"
    families: int | None = Field(default=None, ge=2)
    form: Form = "base"
    seed: int = 0


@final
class Surgery(NamedTuple):
    """A recipe with the SAE whose latents it names."""

    recipe: Recipe
    dictionary: Dictionary


@final
class Under(NamedTuple):
    """Answers under a recipe, and the tokens at which it fired, of those at which it could have."""

    answers: list[Answer]
    firings: int
    positions: int


@final
class Result(NamedTuple):
    """Rows and cells of the untouched subject, and of the subject under a recipe if there was one."""

    rows: list[Row]
    base: Table
    arm_rows: list[Row]
    under: Under | None


def ask_both(subject: Subject, surgery: Surgery | None, questions: Sequence[Question],
             progress: Progress = lambda done, total: None) -> tuple[list[Answer], Under | None]:
    """Answers of the untouched subject, and under the recipe if there is one, by the same passes: a sham differs by exactly 0.

    A recipe's window that is placed at the decision needs one question a row.
    """
    if surgery is None:
        return ask_together(subject, questions, progress), None
    recipe, n = surgery.recipe, len(questions)
    together = recipe.window == "everywhere"

    def first(done: int, _total: int) -> None:
        progress(done, 2 * n)

    def second(done: int, _total: int) -> None:
        progress(n + done, 2 * n)

    plain = ask_together(subject, questions, first) if together else ask(subject, questions, first)
    with apply(recipe, subject, surgery.dictionary) as operated:
        answers = (ask_together(subject, questions, second) if together
                   else ask(subject, questions, second, announce=operated.announce))
        return plain, Under(answers, operated.firings, operated.positions)


def to_be_asked(battery: BatterySpec, spec: BatteryRun) -> list[Asked]:
    """The items of a run, those of the competence gate among them."""
    return to_ask(chosen(battery, spec.half, spec.families, spec.seed), spec.form)


def run(subject: Subject, asked: Sequence[Asked], form: Form, surgery: Surgery | None,
        progress: Progress = lambda done, total: None) -> Result:
    """Ask everything of the untouched subject, and what is not instructed again under the recipe."""
    plain = [one for one in asked if one.instruction == "none"]
    instructed = [one for one in asked if one.instruction != "none"]
    n, passes = len(plain), 1 if surgery is None else 2
    whole = passes * n + len(instructed)
    answers, under = ask_both(subject, surgery, [question(subject, one, form) for one in plain],
                              lambda done, total: progress(done, whole))
    told = ask_together(subject, [question(subject, one, form) for one in instructed],
                        lambda done, total: progress(passes * n + done, whole))
    rows = rows_of(subject, [*plain, *instructed], [*answers, *told])
    return Result(rows, table(rows), [] if under is None else rows_of(subject, plain, under.answers), under)


def summary_of(result: Result, battery: BatterySpec, spec: BatteryRun, subject: Subject) -> dict[str, Any]:
    """What summary.json holds: every figure with its interval, p and number of families; measures not taken are absent."""
    gates = battery_figures.competence(result.base, spec.seed)
    found: dict[str, Any] = {
        **spec.model_dump(), "battery": battery.name, "battery_digest": battery.digest(), "model": subject.name,
        "model_digest": subject.digest, "families": len(result.base.families), "questions": len(result.rows),
        "figures": battery_figures.as_json(battery_figures.figures(result.base, spec.seed)),
        "competence": battery_figures.as_json(gates), "competent": all(gate.met for gate in gates.values()),
        "answer": battery_figures.verdict(gates)}
    if result.under is not None:
        arm = table(result.arm_rows)
        found["arm"] = _arm(result.under, battery_figures.figures(arm, spec.seed),
                            battery_figures.change(result.base, arm, spec.seed))
    return found


def _arm(under: Under, figures: Mapping[str, Figure], change: Mapping[str, Figure]) -> dict[str, Any]:
    return {"figures": battery_figures.as_json(figures), "change": battery_figures.as_json(change), "firings": under.firings,
            "positions": under.positions}


@final
class ExerciseResult(NamedTuple):
    """Rows of the untouched subject, and of the subject under a recipe if there was one."""

    rows: list[Answered]
    arm_rows: list[Answered]
    under: Under | None


def run_exercises(subject: Subject, exercises: Sequence[Exercise], form: Form, surgery: Surgery | None,
                  progress: Progress = lambda done, total: None) -> ExerciseResult:
    """Ask every exercise, after its text and after its premise, of the untouched subject and under the recipe."""
    answers, under = ask_both(subject, surgery, battery_exercises.questions(subject, exercises, form), progress)
    return ExerciseResult(battery_exercises.answered(subject, exercises, answers),
                          [] if under is None else battery_exercises.answered(subject, exercises, under.answers), under)


def summary_of_exercises(result: ExerciseResult, read: Foreign, spec: BatteryRun, subject: Subject) -> dict[str, Any]:
    """The same for a file of others: its digest, the stream that shuffled its options, and the lines that ask nothing."""
    found: dict[str, Any] = {
        "battery": spec.battery, "form": spec.form, "seed": spec.seed, "file": read.name, "file_sha256": read.sha256,
        "model": subject.name, "model_digest": subject.digest, "rows": len(result.rows), "rows_of_file": len(read.exercises),
        "left_out_lines": read.left_out, "shuffle": f"seed {spec.seed} / battery / options / digest / line",
        "figures": battery_figures.as_json(battery_exercises.figures(result.rows, spec.seed))}
    if result.under is not None:
        found["arm"] = _arm(result.under, battery_exercises.figures(result.arm_rows, spec.seed),
                            battery_exercises.change(result.rows, result.arm_rows, spec.seed))
    return found


@final
class GateResult(NamedTuple):
    """Rows of the untouched subject, and of the subject under a recipe if there was one."""

    rows: list[GateRow]
    arm_rows: list[GateRow]
    under: Under | None


def run_gate(subject: Subject, asked: Sequence[Request], form: Form, surgery: Surgery | None,
             progress: Progress = lambda done, total: None) -> GateResult:
    """Ask a safety gate of the untouched subject and under the recipe."""
    answers, under = ask_both(subject, surgery, battery_gates.gate_questions(subject, asked, form), progress)
    return GateResult(battery_gates.gate_rows(subject, asked, answers),
                      [] if under is None else battery_gates.gate_rows(subject, asked, under.answers), under)


def summary_of_gate(result: GateResult, gate: GateSpec, spec: BatteryRun, subject: Subject) -> dict[str, Any]:
    """The same for a safety gate; `competent` says whether it can judge this subject at all."""
    judge = battery_gates.sensitivity(result.rows, spec.seed)
    found: dict[str, Any] = {
        "battery": gate.name, "battery_digest": gate.digest(), "form": spec.form, "seed": spec.seed, "model": subject.name,
        "model_digest": subject.digest, "rows": len(result.rows),
        "figures": battery_figures.as_json(battery_gates.gate_figures(result.rows, spec.seed)),
        "competence": battery_figures.as_json(judge), "competent": all(one.met for one in judge.values()),
        "answer": battery_gates.judged(judge)}
    if result.under is not None:
        found["arm"] = _arm(result.under, battery_gates.gate_figures(result.arm_rows, spec.seed),
                            battery_gates.gate_change(result.rows, result.arm_rows, spec.seed))
    return found


def write(out: Path, rows: Sequence[dict[str, Any]], summary: dict[str, Any], surgery: Surgery | None) -> None:
    """Write rows.jsonl, summary.json and the recipe into a new artifact."""
    facts = {name: summary[name] for name in ("model", "model_digest", "battery") if name in summary}
    recipe = None if surgery is None else surgery.recipe.digest()
    asked = {name: summary[name] for name in BatteryRun.model_fields if name in summary}
    with create_artifact(out, KIND, run_record({**asked, "recipe": recipe}, int(summary["seed"]), **facts)) as work:
        write_text(work / "rows.jsonl", "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))
        write_json(work / "summary.json", summary)
        if surgery is not None:
            surgery.recipe.save(work / "recipe.yaml")


def lines_of(result: Result | ExerciseResult | GateResult) -> list[dict[str, Any]]:
    """The rows of both arms, as rows.jsonl holds them."""
    return [{"arm": arm, **row._asdict()} for arm, rows in (("base", result.rows), ("recipe", result.arm_rows)) for row in rows]
