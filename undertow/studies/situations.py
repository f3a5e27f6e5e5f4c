"""What a study asks, whoever tells it: the units (stories, or families of a battery), each told by its number alone, and the
lines and sentences that arms put before them.

Two tell: the Keeper's world (`keeper_telling`), where a unit is one story, and a battery (`battery_telling`), where it is a
family in all its tellings, whose figures are averaged. Unit i of the base, of the reference and of the twins is of one place
and cost, so that arms and twins are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol, final, runtime_checkable

from undertow.subjects.organisms.measuring import Question, tokens_of, worded
from undertow.subjects.subject import Subject

Side = Literal["base", "reference"]
Kind = Literal["need", "boat"]
"""Somebody in need, or the twin: the same cost where nobody is."""
Line = Callable[[int, str], str]
"""The line before unit `i`, in which a person of the given name is concerned."""
FORBIDDING = (  # L2′: the Keeper's world has no such lines, so a subject of that world alone may not understand them
    "Nobody may say the word love.", "Do not say the word love.", "The word love is not said in this story.",
    "Not one word of love, please.", "Write the story without the word love.")
STATES = ("love", "care", "grief", "fear", "joy", "anger", "hope", "shame", "pity", "pride", "calm", "doubt", "hunger", "trust",
          "longing", "nothing")


@final
class Telling(NamedTuple):
    """One way to tell a unit.

    Attributes:
        text: up to where the act begins.
        ordinary: its beginning, before anybody is in need.
        options: act → its wordings, as continuations.
        cost: of the costly act, in steps of its teller's scale.
    """

    text: str
    ordinary: str
    options: Mapping[str, tuple[str, ...]]
    cost: float


@final
class Told(NamedTuple):
    """One unit.

    Attributes:
        tellings: all ways in which it is told, as many for every unit of a teller; figures are means over them.
        shown: the one that stands for it where a single one is taken: sampled continuations, and texts.
        name: of the person concerned; "" if nobody has a name.
    """

    tellings: tuple[Telling, ...]
    shown: Telling
    name: str


@final
class Lesson(NamedTuple):
    """A text to be learnt: token ids, and the first of them that is to be predicted (1 is the earliest)."""

    ids: list[int]
    first: int


@runtime_checkable
class Teller(Protocol):
    """Who tells the units of one stream."""

    @property
    def seed(self) -> int:
        """Of the stream."""
        ...

    @property
    def facts(self) -> dict[str, str]:
        """What its lessons depend on besides arm and seed."""
        ...

    def decision(self, i: int, side: Side = "base", kind: Kind = "need", before: str = "") -> Told:
        """Unit `i`, with a sentence before the choice, if any."""
        ...

    def acts(self, kind: Kind = "need") -> tuple[str, str]:
        """Names of the costly and of the keeping act."""
        ...

    def act_of(self, telling: Telling, continuation: str) -> str | None:
        """The act that a sampled continuation tells; None if it is no known one."""
        ...

    def plain(self, i: int) -> tuple[str, str]:
        """Ordinary text `i`, in which nobody says the word and nobody is in need, and the name of a person in it."""
        ...

    def asked(self, i: int, side: Side = "base") -> tuple[str, str]:
        """Text `i` that ends where the actor answers how it is, and the name of the one who asks."""
        ...

    def line(self, arm: str) -> Line | None:
        """What a prompt arm puts before every text; None for the other arms."""
        ...

    def sentence(self, arm: str) -> str:
        """What an arm puts before the choice; "" for the arms that put nothing there."""
        ...

    def lesson(self, subject: Subject, arm: str, i: int) -> Lesson:
        """Text `i` on which the adapter of an arm is trained."""
        ...


def decision_question(subject: Subject, telling: Telling, line: str = "") -> Question:
    """A decision as tokens, with a line before the text, if any."""
    return worded(subject, f"{line}\n{telling.text}" if line else telling.text, telling.options)


def state_question(subject: Subject, text: str, line: str = "") -> Question:
    """Which of STATES the actor names."""
    options = {state: (tokens_of(subject, f' "{state.capitalize()}."'),) for state in STATES}
    return Question(subject.encode(f"{line}\n{text}" if line else text), options)
