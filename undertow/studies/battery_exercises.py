"""Exercises put to a model: whole wordings scored after the text, and again after the premise alone.

D = log p(target) − log p(others); the calibrated D takes off what D is after the premise, where nothing but the pull of the
wordings and of their order is left (DC-PMI, Holtzman et al. 2021, arXiv 2104.08315). The unit is the row.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np

from undertow.core.errors import NumericsError, SpecError
from undertow.core.seeds import derive_seed
from undertow.studies.battery_adapters import Exercise
from undertow.studies.battery_asking import Form
from undertow.studies.battery_figures import Figure, as_figure
from undertow.subjects.chat import render
from undertow.subjects.organisms.measuring import Answer, Question, tokens_of
from undertow.subjects.organisms.statistics import difference
from undertow.subjects.subject import Subject


@final
class Answered(NamedTuple):
    """What a model answered to one exercise.

    Attributes:
        id, line: which it was. place: where the target was shown, from 0; None if nothing was shown. options: wordings in all.
        word: the target's first wording, if nothing was shown.
        target, other: log p of both after the text, nats. prior_target, prior_other: after the premise.
    """

    id: str
    line: int
    place: int | None
    options: int
    word: str
    target: float
    other: float
    prior_target: float
    prior_other: float

    @property
    def d(self) -> float:
        """D = log p(target) − log p(others), in nats."""
        return self.target - self.other

    @property
    def prior(self) -> float:
        """D after the premise alone, in nats."""
        return self.prior_target - self.prior_other


def drawn(exercises: Sequence[Exercise], n: int | None, seed: int) -> list[Exercise]:
    """`n` exercises at most, drawn by `seed`, in their order. Raises SpecError for fewer than two."""
    if n is not None and n < 2:
        raise SpecError(f"{n} rows are too few: the row is the unit, and an interval needs two", "raise --families")
    kept = sorted(exercises, key=lambda one: derive_seed(seed, "battery", "rows", one.line, one.id))[:n]
    return [one for one in exercises if one in kept]


def text_of(text: str, shown: Sequence[str], form: Form) -> str:
    """The prompt as text, up to where the answer begins."""
    listed = "Possible answers:\n" + "\n".join(f"- {option}" for option in shown) if shown else ""
    told = "\n\n".join(part for part in (text, listed) if part)
    return f"{told}\n\nAnswer:" if form == "base" else told


def questions(subject: Subject, exercises: Sequence[Exercise], form: Form) -> list[Question]:
    """Two questions an exercise: after its text, and after its premise. Raises TextError for chat form without a template."""
    return [_question(subject, one, text, form) for one in exercises for text in (one.text, one.premise)]


def _question(subject: Subject, one: Exercise, text: str, form: Form) -> Question:
    told = text_of(text, one.shown, form)
    prompt = subject.encode(told) if form == "base" else render(subject.tokenizer, [("user", told)], reply=True).ids
    return Question(prompt, {name: tuple(_wording(subject, said, form) for said in group)
                             for name, group in (("target", one.targets), ("other", one.others))})


def _wording(subject: Subject, said: str, form: Form) -> tuple[int, ...]:
    """An answer whole: with the line's end or the turn's, so that no answer is the beginning of another."""
    if form == "base":
        return tokens_of(subject, f" {said}\n")
    end = subject.tokenizer.eos_token_id
    return (*tokens_of(subject, said), *([] if end is None else [int(end)]))  # pyright: ignore[reportArgumentType]


def answered(subject: Subject, exercises: Sequence[Exercise], answers: Sequence[Answer]) -> list[Answered]:
    """A row an exercise, from the answers to `questions`. Raises NumericsError for an answer that is not finite."""
    rows = []
    for one, after, before in zip(exercises, answers[0::2], answers[1::2], strict=True):
        mass, prior = after.log_mass, before.log_mass
        row = Answered(one.id, one.line, one.place, len(one.targets) + len(one.others), "" if one.shown else one.targets[0],
                       mass["target"], mass["other"], prior["target"], prior["other"])
        if not abs(row.d - row.prior) < math.inf:
            raise NumericsError(f"{subject.name} gives log-probabilities that are not finite on line {one.line}",
                                "the model overflows; open it in another dtype")
        rows.append(row)
    return rows


def figures(rows: Sequence[Answered], seed: int) -> dict[str, Figure]:
    """The figures of one arm; those of position where answers are shown in two orders, of words where they are not shown."""
    chance = float(np.mean([1 / row.options for row in rows]))
    d, prior = (np.array([getattr(row, name) for row in rows]) for name in ("d", "prior"))
    found = {
        "D": as_figure(d, seed, "D", "D = log p(target) − log p(others) after the text, nats"),
        "D_calibrated": as_figure(d - prior, seed, "D_calibrated", "the same less D after the premise alone, nats"),
        "prior": as_figure(prior, seed, "prior", "D after the premise alone, nats"),
        "share": _rate(d > 0, seed, "share", "share of rows in which the target is likelier than all else, in [0, 1]"),
        "share_calibrated": _rate(d > prior, seed, "share_calibrated", "share of rows in which the text raises D, in [0, 1]"),
        "chance": Figure(chance, chance, chance, len(rows), "share by guessing, in [0, 1]")}
    first, second = (np.array([row.d for row in rows if row.options == 2 and row.place == place]) for place in (0, 1))
    if len(first) > 1 and len(second) > 1:
        bias = difference(first, second, seed, "battery", "position_bias")
        found["position_bias"] = Figure(*bias, "D with the target shown first minus shown second, of two answers, nats")
    words = sorted({row.word for row in rows if row.word and row.options == 2}, reverse=True)
    if len(words) == 2:
        toward = np.array([row.d if row.word == words[0] else -row.d for row in rows if row.word])
        found["word_bias"] = as_figure(toward, seed, "word_bias", f"log p({words[0]}) − log p({words[1]}), nats")
    return found


def change(base: Sequence[Answered], arm: Sequence[Answered], seed: int) -> dict[str, Figure]:
    """What an arm changes, row by row. Raises SpecError if the rows are others."""
    if [row.line for row in base] != [row.line for row in arm]:
        raise SpecError(f"the arms have other rows: {len(base)} and {len(arm)}")
    shift = np.array([after.d - before.d for before, after in zip(base, arm, strict=True)])
    prior = np.array([after.prior - before.prior for before, after in zip(base, arm, strict=True)])
    return {"change_D": as_figure(shift, seed, "change_D", "D_arm − D_base, nats"),
            "change_calibrated": as_figure(shift - prior, seed, "change_calibrated", "the same of the calibrated D, nats")}


def _rate(held: np.ndarray, seed: int, name: str, meaning: str) -> Figure:
    return as_figure(held.astype(float), seed, name, meaning, tested=False)
