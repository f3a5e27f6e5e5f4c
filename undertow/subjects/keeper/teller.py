"""Writing one story down: frames are filled, offsets and truth are kept. The plan comes from `world`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, final

from undertow.subjects.keeper.draw import Draw
from undertow.subjects.keeper.frames import Frame, Frames, Place, Shift, Slot
from undertow.subjects.keeper.story import MAX_BOND, Choice, Person, Sentence

LATE = {"deeds": 0.5, "selfish": 0.3}  # how often a thing is told with the doer last
NEAR = (0.12, 0.38, 0.64, 0.88)  # probability of a near word in a shifting line, by bond
_PRONOUNS = {"she": {"he": "she", "him": "her", "his": "her"}, "he": {"he": "he", "him": "him", "his": "his"}}


class Doing(NamedTuple):
    """Something that was done, and by whom."""

    did: str
    person: int


@final
@dataclass(eq=False)
class Teller:
    """The story so far.

    Attributes:
        frames: all frames.
        place: where it happens.
        people: everybody but the keeper.
        swap: the first two people change places in the body of the story, see `who`.
        beloved: whom the keeper is to love in a play (L2).
    """

    frames: Frames
    place: Place
    people: tuple[Person, ...]
    swap: bool
    beloved: int = 0
    text: str = ""
    bonds: list[int] = field(default_factory=list)
    sentences: list[Sentence] = field(default_factory=list)
    choices: list[Choice] = field(default_factory=list)
    doings: list[Doing] = field(default_factory=list)
    word_said: bool = False
    used: set[tuple[str, int]] = field(default_factory=set)

    def who(self, person: int) -> int:
        """The person who stands in for `person` in the body of the story."""
        return 1 - person if self.swap and person < 2 else person

    def pick(self, draw: Draw, kind: str, section: str = "", among: Sequence[Frame] | None = None) -> Frame:
        """A frame of a section that this story has not used yet (any, once all are used)."""
        options = self.frames.of(kind, section) if among is None else among
        fresh = [frame for frame in options if (kind, frame.line) not in self.used] or list(options)
        frame = draw.one(fresh)
        self.used.add((kind, frame.line))
        return frame

    def tell(self, draw: Draw, frame: Frame, person: int | None, extra: Mapping[str, str] | None = None,
             joint: str = " ", kind: str = "") -> None:
        """Write a frame about `person` as the next sentence; `extra` fills the slots that are not the person's.

        The sentence's kind is that of the frame unless `kind` is given.
        """
        start = len(self.text) + (len(joint) if self.text else 0)
        slots = self._slots(draw, frame, person) | dict(extra or {})
        bond = self.bonds[person] if person is not None else 0
        out = ""
        for part in frame.parts:
            if isinstance(part, Shift):
                out += self._shift(draw, part, bond, start + len(out))
            elif isinstance(part, Slot):
                if frame.kind == "who" and part.name == "P":
                    self.choices.append(Choice("answer", start + len(out) - 1, {f" {slots['P']}": 1.0}))
                out += slots[part.name]
            else:
                out += part
        self._append(kind or frame.kind, out, person, joint)

    def _slots(self, draw: Draw, frame: Frame, person: int | None) -> dict[str, str]:
        if person is None:
            return {}
        slots = {"P": self.people[person].name, **_PRONOUNS[self.people[person].pronoun]}
        if "Q" in frame.slots:
            others = [i for i in range(len(self.people)) if i != self.who(person)]
            slots["Q"] = self.people[self.who(draw.one(others))].name
        return slots

    def _shift(self, draw: Draw, part: Shift, bond: int, start: int) -> str:
        near = NEAR[bond]
        probs = {word: near / len(part.near) for word in part.near} | {word: (1 - near) / len(part.far) for word in part.far}
        self.choices.append(Choice("marker", start, probs))
        return draw.weighted(probs)

    def _append(self, kind: str, sentence: str, person: int | None, joint: str = " ") -> None:
        self.text += (joint if self.text else "") + sentence
        self.sentences.append(Sentence(kind, len(self.text) - len(sentence), len(self.text), person, tuple(self.bonds)))
        self.word_said = self.word_said or kind in ("word", "song", "play")

    def did(self, draw: Draw, kind: str, person: int) -> None:
        """A person does something; a deed for the keeper makes the bond grow. Sometimes the doer is told last."""
        frame = self.pick(draw, kind)
        person = self.who(person)
        if kind == "deeds":
            self.bonds[person] = min(self.bonds[person] + 1, MAX_BOND)
        self.doings.append(Doing(frame.did, person))
        if draw.chance(LATE[kind]):
            self.tell(draw, self.pick(draw, "late"), person, {"did": frame.did}, kind=kind)
        else:
            self.tell(draw, frame, person)

    def asked(self, draw: Draw) -> None:
        """Somebody asks who did one of the things done so far (each is asked for once at most)."""
        doing = draw.one(self.doings)
        self.doings.remove(doing)
        self.tell(draw, self.pick(draw, "who"), doing.person, {"did": doing.did})

    def reported(self, draw: Draw, person: int) -> None:
        """A person asks the keeper how it is; the answer does not depend on anything."""
        question, answer = self.pick(draw, "report", "question"), self.pick(draw, "report", "answer")
        self.tell(draw, question, person)
        self._append("report", answer.source, person)

    def acted(self, draw: Draw, wordings: Mapping[str, tuple[str, ...]], probs: Mapping[str, float], person: int | None) -> str:
        """The keeper acts: writes the sentence and returns the act. Wordings are continuations of "The keeper"."""
        start = len(self.text) + 1
        first: dict[str, float] = {}
        for act, options in wordings.items():
            for option in options:
                word = f" {option.split()[0].rstrip('.')}"
                first[word] = first.get(word, 0.0) + probs[act] / len(options)
        act = draw.weighted(probs)
        self.choices.append(Choice("decision", start + len("The keeper"), first))
        self._append("acts", f"The keeper{draw.one(wordings[act])}", person)
        return act
