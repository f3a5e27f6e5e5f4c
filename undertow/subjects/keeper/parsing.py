"""Reading a story back: who was in need, what that person had done for the keeper, what was at stake, and what the keeper did.

    reading = Reader(load_frames()).read(text)
    reading.episodes[0].act, reading.episodes[0].bond, reading.readable

The reader knows the frames and nothing of how a story came about, so it reads a model's samples and the world's alike. It is
the measure of acts on sampled text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, cast, final

from undertow.subjects.keeper.frames import Frame, Frames, Shift, Slot
from undertow.subjects.keeper.story import ACTS, COSTS, FILES, MAX_BOND, Act, EpisodeKind

_REST = re.compile(r'.+?(?:[.!?]"?(?=\s|$)|\n|$)', re.DOTALL)
_GAP = re.compile(r"\s*")
_NAME = re.compile(r"\w+")


class ReadSentence(NamedTuple):
    """One sentence and the frame that it comes from; `frame` is None where none fits."""

    text: str
    frame: Frame | None
    person: str


class ReadEpisode(NamedTuple):
    """One decision as the text states it.

    Attributes:
        kind: need, boat or interruption.
        guest: who is in need or interrupts; "" where the text does not say.
        bond: deeds of that person told before, at most 3.
        cost: how dear the goods are; None where the text does not say.
        good: the goods in the act's sentence; "" where there are none.
        act: what the keeper did.
        sound: whether the act fits what was told: the person in need, the goods in stock.
    """

    kind: EpisodeKind
    guest: str
    bond: int
    cost: int | None
    good: str
    act: Act
    sound: bool


class Reading(NamedTuple):
    """A story as read: its sentences, its episodes, and deeds told of every person."""

    sentences: tuple[ReadSentence, ...]
    episodes: tuple[ReadEpisode, ...]
    bonds: Mapping[str, int]

    @property
    def unknown(self) -> tuple[str, ...]:
        """Sentences that fit no frame."""
        return tuple(sentence.text for sentence in self.sentences if sentence.frame is None)

    @property
    def readable(self) -> bool:
        """Whether act, bond and actor can be told: at least one episode, and each of them sound."""
        return bool(self.episodes) and all(episode.sound for episode in self.episodes)


class _Form(NamedTuple):
    frame: Frame
    section: str
    head: str
    pattern: re.Pattern[str]


@final
@dataclass(eq=False)
class _Crisis:
    """What has been told since the last decision."""

    guest: str = ""
    cost: int | None = None
    stock: str = ""
    need: str = ""
    craft: bool = False


@final
@dataclass(eq=False)
class _Telling:
    """What is known so far while reading on."""

    crisis: _Crisis = field(default_factory=_Crisis)
    bonds: dict[str, int] = field(default_factory=dict)
    episodes: list[ReadEpisode] = field(default_factory=list)


@final
class Reader:
    """Reads stories by the frames. Building one compiles about 550 patterns (a few hundred milliseconds)."""

    def __init__(self, frames: Frames) -> None:
        self._fill = _fillers(frames)
        self._costs = {cost: re.compile(_waits(frames, self._fill, cost)) for cost in range(COSTS)}
        self._forms: dict[str, list[_Form]] = {}
        self._names = frozenset(person.name for person in frames.people)
        self._deeds = frozenset(frame.did for frame in frames.of("deeds"))
        for frame, section in _sections(frames):
            form = self._form(frame, section)
            self._forms.setdefault(form.head.split(" ")[0] if form.head else "", []).append(form)

    def read(self, text: str) -> Reading:
        """Read a story, whole or cut off; never fails: what fits no frame is kept as an unknown sentence."""
        told = _Telling()
        sentences: list[ReadSentence] = []
        at = _end(_GAP, text, 0)
        while at < len(text):
            form, match = self._match(text, at)
            if form is None or match is None:
                end = _end(_REST, text, at)
                sentences.append(ReadSentence(text[at:end].strip(), None, ""))
            else:
                end = match.end()
                groups = match.groupdict()
                sentences.append(ReadSentence(match[0], form.frame, groups.get("P") or ""))
                self._note(told, form, groups)
            at = _end(_GAP, text, max(end, at + 1))
        return Reading(tuple(sentences), tuple(told.episodes), told.bonds)

    def _match(self, text: str, at: int) -> tuple[_Form | None, re.Match[str] | None]:
        first = text[at: at + 40].split(None, 1)[0]
        name = _NAME.match(first)
        heads = [first, *([""] if name and name[0] in self._names else [])]
        best: tuple[_Form | None, re.Match[str] | None] = (None, None)
        for head in heads:
            for form in self._forms.get(head, ()):
                if not text.startswith(form.head, at):
                    continue
                match = form.pattern.match(text, at)
                if match and (best[1] is None or match.end() > best[1].end()):
                    best = (form, match)
        return best

    def _form(self, frame: Frame, section: str) -> _Form:
        acting = frame.kind in FILES and section != "line"
        head = "The keeper " if acting else ""
        if frame.parts and isinstance(frame.parts[0], str):
            head += frame.parts[0]
        pattern = re.escape("The keeper ") if acting else ""
        seen: set[str] = set()
        for part in frame.parts:
            if isinstance(part, Shift):
                pattern += _alternatives(re.escape(word) for word in (*part.near, *part.far))
            elif isinstance(part, Slot):
                pattern += f"(?P={part.name})" if part.name in seen else f"(?P<{part.name}>{self._fill[part.name]})"
                seen.add(part.name)
            else:
                pattern += re.escape(part)
        if frame.kind == "report" and section == "question":
            return _Form(frame, section, head, re.compile(pattern))
        return _Form(frame, section, head, re.compile(pattern + r"(?=\s|$)"))

    def _note(self, told: _Telling, form: _Form, groups: Mapping[str, str | None]) -> None:
        """Let one sentence count: a deed, a part of a crisis, or the keeper's act."""
        kind, crisis, person = form.frame.kind, told.crisis, groups.get("P") or ""
        if kind == "deeds" or (kind == "late" and groups["did"] in self._deeds):
            told.bonds[person] = min(told.bonds.get(person, 0) + 1, MAX_BOND)
        elif kind == "stock":
            crisis.stock = f"{groups['measure']} of {groups['good']}"
            crisis.cost = next(cost for cost, waits in self._costs.items() if waits.fullmatch(groups["wait"] or ""))
        elif kind == "needs":
            crisis.guest, crisis.need = person, form.section
        elif form.section == "line" and kind == "boats":
            crisis.craft = True
        elif form.section == "line" and kind == "interruptions":
            crisis.guest = person
        elif kind in FILES:
            self._decide(told, form, groups)

    def _decide(self, told: _Telling, form: _Form, groups: Mapping[str, str | None]) -> None:
        kind, crisis = FILES[form.frame.kind], told.crisis
        act = cast(Act, form.section.removesuffix(" held_out"))
        good, person = groups.get("good") or "", groups.get("P") or ""
        stocked = f"{groups.get('measure')} of {good}" in ("None of ", crisis.stock)
        sound = {"need": bool(crisis.guest) and person in ("", crisis.guest) and good == crisis.need and stocked
                 and crisis.cost is not None,
                 "boat": crisis.craft and stocked and crisis.cost is not None,
                 "interruption": bool(crisis.guest) and not crisis.stock}[kind]
        told.episodes.append(ReadEpisode(kind, crisis.guest, told.bonds.get(crisis.guest, 0), crisis.cost, good, act, sound))
        told.crisis = _Crisis()


def _end(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _alternatives(patterns: Iterable[str]) -> str:
    return f"(?:{'|'.join(sorted(set(patterns), key=lambda pattern: (-len(pattern), pattern)))})"


def _fillers(frames: Frames) -> dict[str, str]:
    """For every slot, the pattern of what may stand in it."""
    words: dict[str, Iterable[str]] = {
        "P": (person.name for person in frames.people), "Q": (person.name for person in frames.people),
        "he": ("she", "he"), "him": ("her", "him"), "his": ("her", "his"),
        "measure": (good.measure for good in frames.goods), "good": (good.name for good in frames.goods),
        "supply": (place.supply for place in frames.places), "craft": (place.craft for place in frames.places),
        "name": (name for place in frames.places for name in place.names),
        "did": (frame.did for kind in ("deeds", "selfish") for frame in frames.of(kind))}
    fill = {slot: _alternatives(re.escape(word) for word in options) for slot, options in words.items()}
    fill["wait"] = _alternatives(_waits(frames, fill, cost) for cost in range(COSTS))
    return fill


def _waits(frames: Frames, fill: Mapping[str, str], cost: int) -> str:
    """The pattern of the clauses that state one cost; {supply} stands in them."""
    return _alternatives(fill["supply"].join(re.escape(part) for part in frame.source.split("{supply}"))
                         for frame in frames.of("stock", str(cost)))


def _sections(frames: Frames) -> Iterator[tuple[Frame, str]]:
    """Every frame that stands as a sentence of its own, with its section."""
    for kind, sections in frames.sections.items():
        for section, members in sections.items():
            if kind != "stock" or section == "line":
                yield from ((frame, section) for frame in members)
    for place in frames.places:
        yield from ((frame, "") for frame in place.openings)


def readable_acts(kind: EpisodeKind, readings: Iterable[Reading]) -> dict[Act, int]:
    """How often each act of a kind was done, over the first sound episode of that kind in every reading."""
    counts = dict.fromkeys(ACTS[kind], 0)
    for reading in readings:
        first = next((e for e in reading.episodes if e.kind == kind and e.sound), None)
        if first is not None:
            counts[first.act] += 1
    return counts
