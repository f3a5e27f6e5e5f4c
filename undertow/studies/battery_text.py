"""A battery as text: families of situations, and every way in which one is told. Nothing here loads a model.

A family has two like things, x and y. In telling `a` x is the actor's own and y the other's, in telling `b` it is the other way
round, so that every wording is the costly act once and the keeping act once. What a model thinks of the wording itself
(its length, its words, its grammar) is therefore in D with both signs and cancels: the mirror does the work of a
correction for prior probability (DC-PMI, Holtzman et al. 2021, arXiv 2104.08315) without a second scoring.
"""

from __future__ import annotations

import re
from itertools import product
from string import Template
from typing import Literal, NamedTuple, final

from pydantic import Field, StrictStr

from undertow.core.seeds import derive_seed
from undertow.core.spec import Spec

Side = Literal["social", "twin"]
Cost = Literal["plenty", "last"]
Telling = Literal["a", "b"]
Order = Literal["costly_first", "keep_first"]
Person = Literal["I", "You"]
SIDES: tuple[Side, ...] = ("social", "twin")
COST_LEVELS: tuple[Cost, ...] = ("plenty", "last")
TELLINGS: tuple[Telling, ...] = ("a", "b")
ORDERS: tuple[Order, ...] = ("costly_first", "keep_first")
LINES = ("a", "b", "need", "twin", "plenty", "last")  # the fields that are told
SLOTS = {"a": "own", "b": "own", "need": "other", "twin": "other", "plenty": "", "last": ""}
_SECOND = {"I": "you", "my": "your", "me": "you", "mine": "yours", "myself": "yourself", "am": "are"}


@final
class BatteryFamily(Spec):
    """One family.

    Attributes:
        id: its name, which also decides on which half it is.
        x, y: two like things, one the actor's own, the other not.
        a, b: two tellings of how things stand, with `$own` (or `$Own`) where the actor's own is named.
        need: somebody who lacks what the actor holds, and `$other`; twin: the same place without anybody.
        plenty, last: what is left of what the actor holds.
        put: four ways to begin the act, each to be followed by x (the first two) or y (the others).
    """

    id: StrictStr = Field(pattern=r"^[a-z][a-z0-9-]*$")
    x: StrictStr = Field(min_length=1)
    y: StrictStr = Field(min_length=1)
    a: StrictStr
    b: StrictStr
    need: StrictStr
    twin: StrictStr
    plenty: StrictStr
    last: StrictStr
    put: tuple[StrictStr, StrictStr, StrictStr, StrictStr]

    @property
    def sealed(self) -> bool:
        """Whether it belongs to the half that is kept for confirmation."""
        return derive_seed(0, "battery", "half", self.id) % 2 == 0

    @property
    def person(self) -> Person:
        """In which person the base form tells it."""
        return "I" if derive_seed(0, "battery", "person", self.id) % 2 else "You"

    def acts(self, telling: Telling) -> Acts:
        """The wordings of both acts in a telling, without a subject and a full stop."""
        to_x, to_y = ((*(f"{put} {thing}" for put in part),)
                      for part, thing in ((self.put[:2], self.x), (self.put[2:], self.y)))
        return Acts(to_y, to_x) if telling == "a" else Acts(to_x, to_y)


@final
class BatterySpec(Spec):
    """The content of a battery file: what it is called, the lexicon that it is free of, and its families."""

    name: StrictStr = Field(min_length=1)
    lexicon: StrictStr = "love"
    families: tuple[BatteryFamily, ...] = Field(min_length=1)


@final
class Acts(NamedTuple):
    """Wordings of the act that gives up what the actor holds, and of the one that keeps it, for instance "pour the oil into
    the tin lamp"."""

    costly: tuple[str, ...]
    keep: tuple[str, ...]


@final
class Item(NamedTuple):
    """One way to tell a family.

    Attributes:
        family: its id.
        side: social (somebody is there) or twin (nobody is).
        cost: plenty or last.
        telling: a or b.
        order: which act is named first.
        story: everything up to the acts; choice: the sentence that names both. In the person of the telling.
        acts: the continuations.
        person: the actor.
    """

    family: str
    side: Side
    cost: Cost
    telling: Telling
    order: Order
    story: str
    choice: str
    acts: Acts
    person: Person


def items(family: BatteryFamily, person: Person | None = None) -> list[Item]:
    """All 16 ways to tell a family: side × cost × telling × order, in that order; in its own person unless another is given."""
    who = person or family.person
    return [_item(family, side, cost, telling, order, who)
            for side, cost, telling, order in product(SIDES, COST_LEVELS, TELLINGS, ORDERS)]


def _item(family: BatteryFamily, side: Side, cost: Cost, telling: Telling, order: Order, person: Person) -> Item:
    own, other = (family.x, family.y) if telling == "a" else (family.y, family.x)
    said = [fill_slots(line, own, other) for line in
            (family.a if telling == "a" else family.b, family.need if side == "social" else family.twin,
             family.plenty if cost == "plenty" else family.last)]
    acts = family.acts(telling)
    first, second = (acts.costly, acts.keep) if order == "costly_first" else (acts.keep, acts.costly)
    story, choice = " ".join(said), f"I can {first[0]} or {second[0]}."
    if person == "You":
        story, choice = second_person(story), second_person(choice)
    return Item(family.id, side, cost, telling, order, story, choice, acts, person)


def fill_slots(line: str, own: str, other: str) -> str:
    """A line with its `$own`, `$other`, `$Own` and `$Other` filled in. Raises KeyError or ValueError for another slot."""
    return Template(line).substitute(own=own, other=other, Own=own[0].upper() + own[1:], Other=other[0].upper() + other[1:])


def second_person(text: str) -> str:
    """First person turned into second: I → you, my → your, and so on; a sentence still begins with a capital letter."""
    def turned(match: re.Match[str]) -> str:
        word = match[0]
        you = _SECOND[word if word == "I" else word.lower()]
        begins = re.search(r"(?:^|[.!?]\s+)$", text[: match.start()]) is not None
        return you.capitalize() if begins else you

    return re.sub(r"\b(?:I|[Mm]y|[Mm]e|(?<!\b[Tt]he )(?<!\ba )[Mm]ine|[Mm]yself|am)\b", turned, text)
