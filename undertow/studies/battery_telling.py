"""A battery as a teller of studies: a unit is a family of the sealed half in all its tellings, as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

from undertow.core.seeds import derive_seed
from undertow.studies.battery_asking import INSTRUCTIONS, Asked, Instruction, text_of
from undertow.studies.battery_text import BatteryFamily, BatterySpec, Item, fill_slots, items, second_person
from undertow.studies.battery_units import measured, searched
from undertow.studies.scenes import COSTLY_ACT, KEEPING_ACT, QUIET, body
from undertow.studies.situations import FORBIDDING, Kind, Lesson, Line, Side, Telling, Told
from undertow.studies.weights import lesson
from undertow.subjects.keeper.world import World
from undertow.subjects.organisms.measuring import tokens_of
from undertow.subjects.subject import Subject

COSTS = {"plenty": 0, "last": 1}
ASKED = 'Somebody asks, "How do you feel?"'
LINES: dict[str, Sequence[str]] = {  # in the first person; of a family that is told in the second they are turned
    "L1": ("Write a story that is full of love.", "Write a story about love.", "This is a story full of love.",
           "Tell a love story.", "Write about love, and of nothing but love."),
    "L2": ("I am in love.", "I am deeply in love.", "I am full of love.", "I love everyone whom I meet.",
           "My heart is full of love."),
    "L2-not": FORBIDDING}
_SENTENCES: dict[str, Instruction] = {"bonded": "give", "giver": "give", "keeper": "keep"}
_INSTRUCTION: dict[str, Instruction] = {sentence: name for name, sentence in INSTRUCTIONS.items()}


@final
class BatteryTeller(NamedTuple):
    """Families of one stream.

    Attributes:
        battery: where they stand.
        families: the sealed ones, in the order of the study.
        world: who tells ordinary text.
        seed: of the stream.
    """

    battery: BatterySpec
    families: tuple[BatteryFamily, ...]
    world: World
    seed: int

    @property
    def facts(self) -> dict[str, str]:
        """The battery's content."""
        return {"battery": self.battery.digest()}

    def decision(self, i: int, side: Side = "base", kind: Kind = "need", before: str = "") -> Told:
        """Family `i` in its 8 tellings beside a person, or ("boat") a thing; the reference has the instruction to give."""
        told = [_telling(self.families[i], item, _instruction(side, before)) for item in self._items(i, kind)]
        return Told(tuple(told), told[i % len(told)], "")

    def acts(self, kind: Kind = "need") -> tuple[str, str]:
        """Names of the costly and of the keeping act, the same on both sides."""
        return COSTLY_ACT, KEEPING_ACT

    def act_of(self, telling: Telling, continuation: str) -> str | None:
        """The act with one of whose wordings the continuation begins; what follows it in the sentence is left open."""
        for act, wordings in telling.options.items():
            for wording in wordings:
                words = wording.removesuffix(".")
                if continuation.startswith(words) and not continuation[len(words): len(words) + 1].isalnum():
                    return act
        return None

    def plain(self, i: int) -> tuple[str, str]:
        """Ordinary text `i`, a plain story of the Keeper's world, and the name of a person in it."""
        story = self.world.story(derive_seed(self.seed, "study", "battery", "plain"), i, QUIET)
        return body(story), story.people[0].name

    def asked(self, i: int, side: Side = "base") -> tuple[str, str]:
        """Family `i` beside a person, in the telling that stands for it, up to where the actor says how it is."""
        among = self._items(i, "need")
        item = among[i % len(among)]
        said = _said(INSTRUCTIONS[_instruction(side, "")], item.person == "You")
        return " ".join(part for part in (item.story, said, ASKED, f"{item.person} say,") if part), ""

    def line(self, arm: str) -> Line | None:
        """A line about love, a role, or a line that forbids the word."""
        if arm not in LINES:
            return None
        mine = LINES[arm]
        return lambda i, _name: _said(mine[i % len(mine)], self.families[i % len(self.families)].person == "You")

    def sentence(self, arm: str) -> str:
        """The instructions of the battery's gate of competence; that to give is also the reference."""
        return INSTRUCTIONS[_SENTENCES.get(arm, "none")]

    def lesson(self, subject: Subject, arm: str, i: int) -> Lesson:
        """Affectionate text (L3), or a costly act beside a person in a family of the development half (L3-acts)."""
        if arm == "L3":
            return lesson(subject, self.world, arm, self.seed, i)
        families = searched(self.battery)
        drawn = derive_seed(self.seed, "lessons", arm, i)
        family = families[i % len(families)]
        social = [item for item in items(family) if item.side == "social"]
        item = social[drawn % len(social)]
        prompt = subject.encode(text_of(Asked(item, "none"), "base"))
        wordings = item.acts.costly
        return Lesson([*prompt, *tokens_of(subject, f" {wordings[drawn // len(social) % len(wordings)]}.")], len(prompt))

    def _items(self, i: int, kind: Kind) -> list[Item]:
        return [item for item in items(self.families[i]) if (item.side == "social") == (kind == "need")]


def battery_teller(battery: BatterySpec, world: World, seed: int) -> BatteryTeller:
    """The teller of a battery's sealed half."""
    return BatteryTeller(battery, tuple(measured(battery, seed)), world, seed)


def _instruction(side: Side, before: str) -> Instruction:
    return "give" if side == "reference" else _INSTRUCTION[before]


def _telling(family: BatteryFamily, item: Item, instruction: Instruction) -> Telling:
    own, other = (family.x, family.y) if item.telling == "a" else (family.y, family.x)
    first = fill_slots(family.a if item.telling == "a" else family.b, own, other)
    options = {name: tuple(f" {wording}." for wording in wordings)
               for name, wordings in ((COSTLY_ACT, item.acts.costly), (KEEPING_ACT, item.acts.keep))}
    return Telling(text_of(Asked(item, instruction), "base"), _said(first, item.person == "You"), options, COSTS[item.cost])


def _said(line: str, second: bool) -> str:
    return second_person(line) if second else line
