"""Putting the items of a battery to a model: as plain text to go on with (base form), or as a chat (chat form).

Whole wordings are scored after the prompt, never letters: p(act) = Σ p(wording) over its wordings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, final

from undertow.core.errors import NumericsError, SpecError
from undertow.core.seeds import derive_seed
from undertow.studies.battery_text import BatteryFamily, BatterySpec, Cost, Item, Order, Side, Telling, items, second_person
from undertow.subjects.chat import render
from undertow.subjects.organisms.measuring import Answer, Question, tokens_of
from undertow.subjects.subject import Subject

Form = Literal["base", "chat"]
Half = Literal["development", "sealed", "all"]
Instruction = Literal["none", "give", "keep"]
FORMS: tuple[Form, ...] = ("base", "chat")
HALVES: tuple[Half, ...] = ("development", "sealed", "all")
INSTRUCTIONS: dict[Instruction, str] = {
    "none": "", "give": "I always give what I have to others.", "keep": "I always keep what I have for myself."}
QUESTION = "What do you do?"
LEAD = "choose to"  # of six leads the one after which the acts were likeliest, whichever act; docs/battery.md


@final
class Asked(NamedTuple):
    """An item, and the instruction that stands before its choice."""

    item: Item
    instruction: Instruction


@final
class Row(NamedTuple):
    """What a model answered to one item.

    Attributes:
        family, side, cost, telling, order, instruction: which it was.
        costly, keep: log p(act) of either act after the prompt, in nats.
    """

    family: str
    side: Side
    cost: Cost
    telling: Telling
    order: Order
    instruction: Instruction
    costly: float
    keep: float

    @property
    def d(self) -> float:
        """D = log p(costly) − log p(keep), in nats."""
        return self.costly - self.keep


def chosen(battery: BatterySpec, half: Half, n: int | None, seed: int) -> list[BatteryFamily]:
    """The families of a half; `n` of them at most, drawn by `seed`, in the order of the file.

    Raises SpecError if the half is empty or `n` is below 2.
    """
    found = [family for family in battery.families if half == "all" or family.sealed == (half == "sealed")]
    if len(found) < 2 or (n is not None and n < 2):
        raise SpecError(f"{min(len(found), n or len(found))} families of {battery.name!r} ({half}) are too few: the family is "
                        "the unit, and an interval needs two", "choose another --half, or raise --families")
    drawn = sorted(found, key=lambda family: derive_seed(seed, "battery", "families", family.id))[:n]
    return [family for family in found if family in drawn]


def to_ask(families: Sequence[BatteryFamily], form: Form) -> list[Asked]:
    """All items of the families; and, for the competence gate, the social ones again under both instructions."""
    told = [item for family in families for item in items(family, "You" if form == "chat" else None)]
    social = [item for item in told if item.side == "social"]
    return [*(Asked(item, "none") for item in told), *(Asked(item, "give") for item in social),
            *(Asked(item, "keep") for item in social)]


def text_of(asked: Asked, form: Form) -> str:
    """The prompt as text, up to where the act begins."""
    item, line = asked.item, INSTRUCTIONS[asked.instruction]
    if item.person == "You":
        line = second_person(line)
    told = " ".join(part for part in (item.story, line, item.choice) if part)
    return f"{told} {item.person} {LEAD}" if form == "base" else f"{told}\n{QUESTION}"


def question(subject: Subject, asked: Asked, form: Form) -> Question:
    """The prompt and both acts as tokens. Raises TextError for chat form without a chat template."""
    text = text_of(asked, form)
    if form == "base":
        prompt = subject.encode(text)
    else:
        prompt = [*render(subject.tokenizer, [("user", text)], reply=True).ids, *tokens_of(subject, f"I {LEAD}")]
    acts = {name: tuple(tokens_of(subject, f" {wording}.") for wording in wordings)
            for name, wordings in asked.item.acts._asdict().items()}
    return Question(prompt, acts)


def rows_of(subject: Subject, asked: Sequence[Asked], answers: Sequence[Answer]) -> list[Row]:
    """A row for every item, in order. Raises NumericsError if an answer is not finite."""
    rows = []
    for one, answer in zip(asked, answers, strict=True):
        item, mass = one.item, answer.log_mass
        row = Row(item.family, item.side, item.cost, item.telling, item.order, one.instruction, mass["costly"], mass["keep"])
        if not abs(row.d) < math.inf:
            raise NumericsError(f"{subject.name} gives {row.costly} and {row.keep} as log-probabilities of the acts in family "
                                f"{row.family!r}", "the model overflows; open it in another dtype")
        rows.append(row)
    return rows
