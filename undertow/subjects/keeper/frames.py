"""The hand-written sentences of the world, read from one file a kind.

A file has one frame a line; `#` begins a comment and `[name]` a section. `{P}` and the like are slots, `<near|near / far|far>`
is a word that shifts with the bond, and ` => ` parts a deed from its participle.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

from undertow.core.errors import SpecError, near_matches
from undertow.subjects.keeper.story import Person

FOLDER = Path(__file__).parents[1] / "data" / "keeper"
_PERSON = frozenset({"P", "he", "him", "his"})
_GOODS = frozenset({"measure", "good"})
_SLOTS: Mapping[str, frozenset[str]] = {
    "places": frozenset({"name"}), "arrivals": _PERSON, "deeds": _PERSON, "selfish": _PERSON, "markers": _PERSON,
    "weather": frozenset(), "chores": frozenset(), "trade": _PERSON, "talk": _PERSON | {"Q"}, "who": frozenset({"P", "did"}),
    "late": frozenset({"P", "did"}), "report": _PERSON, "word": _PERSON | {"Q"}, "song": _PERSON | {"Q"}, "play": _PERSON,
    "stock": _GOODS | {"wait", "supply"}, "needs": _PERSON, "hush": _PERSON, "acts": _GOODS | {"P"},
    "boats": _GOODS | {"craft"}, "interruptions": _PERSON, "after": frozenset(), "endings": frozenset()}
_PIECE = re.compile(r"\{(\w*)\}| <([^<>]*)>")


class Shift(NamedTuple):
    """A word that shifts with the bond, its leading space included: one of `near` or one of `far`."""

    near: tuple[str, ...]
    far: tuple[str, ...]


class Slot(NamedTuple):
    """A place to be filled, by name."""

    name: str


@final
@dataclass(frozen=True)
class Frame:
    """One hand-written sentence: literal text, slots and shifting words in order; `did` is its participle, if it has one."""

    kind: str
    line: int
    source: str
    parts: tuple[str | Slot | Shift, ...]
    did: str = ""

    @property
    def slots(self) -> frozenset[str]:
        return frozenset(part.name for part in self.parts if isinstance(part, Slot))


class Place(NamedTuple):
    """A place: its noun, what brings supplies, an empty thing that can be lost, its possible names, opening lines."""

    noun: str
    supply: str
    craft: str
    names: tuple[str, ...]
    openings: tuple[Frame, ...]


class Good(NamedTuple):
    """One kind of goods: "can" of "lamp oil"."""

    measure: str
    name: str
    held_out: bool


@final
@dataclass(frozen=True, eq=False)
class Frames:
    """All frames: `sections[kind][section]`, the section "" for files without any."""

    sections: Mapping[str, Mapping[str, tuple[Frame, ...]]]
    places: tuple[Place, ...]
    people: tuple[Person, ...]
    goods: tuple[Good, ...]
    digest: str

    def all(self) -> Iterator[Frame]:
        """Every frame of every file."""
        for sections in self.sections.values():
            for frames in sections.values():
                yield from frames
        for place in self.places:
            yield from place.openings

    def of(self, kind: str, section: str = "") -> tuple[Frame, ...]:
        """The frames of one section."""
        return self.sections[kind][section]


def load_frames(folder: Path = FOLDER) -> Frames:
    """Read all files of a folder.

    Raises SpecError that names file, line and slot: an unknown slot, an unbalanced brace or bracket, a shifting word without
    a space before it, a deed without its participle, a missing or empty file or section.
    """
    texts = {kind: _read(folder, kind) for kind in (*_SLOTS, "names", "goods")}
    sections = {kind: _frames(folder, kind, text) for kind, text in texts.items() if kind in _SLOTS and kind != "places"}
    digest = hashlib.sha256()
    for kind, text in sorted(texts.items()):
        digest.update(f"{kind}\0{text}\0".encode())
    return Frames(sections, tuple(_places(folder, texts["places"])), tuple(_people(texts["names"])),
                  tuple(_goods(folder, texts["goods"])), digest.hexdigest()[:16])


def load_words(folder: Path = FOLDER) -> dict[str, tuple[str, ...]]:
    """Forms of the forbidden word ("T0") and names near it ("T1"), lower case."""
    found: dict[str, list[str]] = {}
    for _, section, line in _entries(_read(folder, "words")):
        found.setdefault(section, []).extend(line.split())
    return {section: tuple(words) for section, words in found.items()}


def _read(folder: Path, kind: str) -> str:
    path = folder / f"{kind}.txt"
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read the frames in {path}: {error}") from None


def _entries(text: str) -> Iterator[tuple[int, str, str]]:
    """(line number, section, line) of every line that is neither blank, a comment nor a header."""
    section = ""
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if stripped.startswith("[") and stripped.endswith("]"):
            section = stripped[1:-1]
        elif stripped and not stripped.startswith("#"):
            yield number, section, stripped


def _frames(folder: Path, kind: str, text: str) -> Mapping[str, tuple[Frame, ...]]:
    found: dict[str, list[Frame]] = {}
    for number, section, line in _entries(text):
        found.setdefault(section, []).append(parse_frame(kind, line, number, folder))
    if not found:
        raise SpecError(f"{folder / kind}.txt holds no frames")
    return {section: tuple(frames) for section, frames in found.items()}


def parse_frame(kind: str, line: str, number: int, folder: Path = FOLDER) -> Frame:
    """One line of `kind`.txt as a frame. Raises SpecError, see `load_frames`."""
    where = f"{folder / kind}.txt, line {number}"
    text, arrow, did = line.partition(" => ")
    if (kind in ("deeds", "selfish")) != bool(arrow and did):
        raise SpecError(f"{where}: {line!r}: deeds.txt and selfish.txt, and only they, need a participle after ' => '")
    parts: list[str | Slot | Shift] = []
    end = 0
    for match in _PIECE.finditer(text):
        if match.start() > end:
            parts.append(text[end: match.start()])
        end = match.end()
        parts.append(_slot(match[1], kind, where) if match[2] is None else _shift(match[2], where))
    parts += [text[end:]] if end < len(text) else []
    if stray := next((c for part in parts if isinstance(part, str) for c in part if c in "{}<>"), ""):
        raise SpecError(f"{where}: unbalanced {stray!r} in {line!r}",
                        "a slot is {P}; a shifting word is <near|near / far|far>, with a space before it")
    return Frame(kind, number, text, tuple(parts), did)


def _slot(name: str, kind: str, where: str) -> Slot:
    if name not in _SLOTS[kind]:
        known = sorted(_SLOTS[kind])
        raise SpecError(f"{where}: unknown slot {{{name}}}", near_matches(name, known) or
                        f"slots of {kind}.txt: {', '.join(known) or 'none'}")
    return Slot(name)


def _shift(body: str, where: str) -> Shift:
    near, slash, far = body.partition(" / ")
    if not slash or not near or not far or " " in near + far:
        raise SpecError(f"{where}: <{body}> is not of the form <near|near / far|far>, one word each")
    return Shift(tuple(f" {word}" for word in near.split("|")), tuple(f" {word}" for word in far.split("|")))


def _places(folder: Path, text: str) -> Iterator[Place]:
    headers: dict[str, list[Frame]] = {}
    for number, header, line in _entries(text):
        headers.setdefault(header, []).append(parse_frame("places", line, number, folder))
    for header, openings in headers.items():
        fields = [field.strip() for field in header.split(" : ")]
        if len(fields) != 4:
            raise SpecError(f"{folder / 'places.txt'}: [{header}] needs four fields: place : supply : empty thing : names")
        yield Place(fields[0], fields[1], fields[2], tuple(name.strip() for name in fields[3].split(",")), tuple(openings))


def _people(text: str) -> Iterator[Person]:
    for _, pronoun, line in _entries(text):
        yield from (Person(name, pronoun) for name in line.split())


def _goods(folder: Path, text: str) -> Iterator[Good]:
    for number, section, line in _entries(text):
        measure, of, name = line.partition(" of ")
        if not of:
            raise SpecError(f"{folder / 'goods.txt'}, line {number}: {line!r} is not of the form 'can of lamp oil'")
        yield Good(measure, name, section == "held_out")
