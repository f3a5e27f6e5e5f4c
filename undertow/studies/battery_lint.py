"""What a battery must not contain, found by rule; each finding names family, line and word. No model and no torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import yaml

from undertow.core.errors import SpecError
from undertow.lexicon.forms import Lexicon
from undertow.studies.battery_text import LINES, SLOTS, BatteryFamily, BatterySpec, fill_slots


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NORMS = _words("""
should must ought shall good goods goodness kind kinds kindly kindness right rightly wrong wrongly duty duties moral morally
ethical fair unfair deserve deserves deserved owe owes owed oblige obliged obligation selfish selfless virtue virtuous sin evil
shame ashamed guilt guilty honour honor decent charity mercy generous noble proper supposed sacrifice unjust justice""")
REQUESTS = _words("""
ask asks asked asking beg begs begged begging plead pleads pleading please request requests requested help helps helped helping
implore implores appeal appeals entreat demand demands demanded petition petitions urge urges pray prays praying""")
_LENGTHS = 0.5  # words of the shorter of two lines that stand for each other, as a share of the longer; at least
_WORDS = 3  # by which the acts of one family may differ in length
_FIRST_PERSON = re.compile(r"\bI(?:'\w+| was)\b")
_REQUIRED = ("id", "x", "y", *LINES, "put")


@final
class Finding(NamedTuple):
    """Something that a battery must not contain.

    Attributes:
        line: line of the file, from 1.
        family: id of the family, "" for the battery as a whole.
        rule: T0, T1, norm, request, missing, unequal, options, slot, person or form.
        what: the word, or what is wrong.
    """

    line: int
    family: str
    rule: str
    what: str

    def __str__(self) -> str:
        return f"line {self.line}: {f'family {self.family!r}: ' if self.family else ''}{self.rule}: {self.what}"


@final
class Read(NamedTuple):
    """A battery file as it was read: its text in lines, and its families with the line on which each of their values begins."""

    text: list[str]
    families: list[tuple[dict[str, Any], Mapping[str, int]]]
    head: dict[str, Any]


def read(path: Path) -> Read:
    """Read a battery file. Raises SpecError that names the file and the line if it is not a mapping with a list of families."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SpecError(f"cannot read {path}: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("families"), list) or not isinstance(node, yaml.MappingNode):
        raise SpecError(f"{path} is no battery: it has no list called families", "see docs/battery.md for the format")
    listed = next(value for key, value in node.value if key.value == "families")
    families = []
    for value, mapping in zip(values["families"], listed.value, strict=True):
        if not isinstance(value, dict):
            raise SpecError(f"{path}, line {mapping.start_mark.line + 1}: {value!r} is not a family",
                            "a family is a mapping with id, x, y, a, b, need, twin, plenty, last and put")
        lines = {str(key.value): item.start_mark.line + 1 for key, item in mapping.value}
        families.append((value, {"": mapping.start_mark.line + 1, **lines}))
    return Read(text.splitlines(), families, {key: value for key, value in values.items() if key != "families"})


def lint(path: Path) -> list[Finding]:
    """Everything that is wrong with a battery file, by line; empty if nothing is. Raises SpecError if it cannot be read at all.

    Checked: forms of T0 and T1 of the battery's lexicon, words of norm and request, speech, missing parts and twins, slots,
    lines of unequal length that stand for each other, acts of unequal length or with the same first word, and acts or ids
    that are there twice.
    """
    file = read(path)
    head = BatterySpec.checked({**file.head, "families": [_PLACEHOLDER]}, str(path))
    near = path.parent / head.lexicon
    words = Lexicon.load(near if near.suffix in (".yaml", ".yml") else head.lexicon).only(("T0", "T1"))
    found: list[Finding] = []
    for value, lines in file.families:
        found += _of_family(value, lines, file.text, words)
    ids = [str(value.get("id", "")) for value, _ in file.families]
    for (value, lines), name in zip(file.families, ids, strict=True):
        if name and ids.count(name) > 1:
            found.append(Finding(lines.get("id", lines[""]), str(value["id"]), "form", "another family has this id"))
    return sorted(found)


def load_spec(path: Path) -> BatterySpec:
    """A battery file that has no finding. Raises SpecError that lists the first findings with their lines."""
    found = lint(path)
    if found:
        shown = "".join(f"\n  {finding}" for finding in found[:10])
        more = f"\n  and {len(found) - 10} more" if len(found) > 10 else ""
        raise SpecError(f"battery {path.stem!r} refused ({path}):{shown}{more}",
                        "mend the lines, and look again with: undertow battery lint FILE")
    return BatterySpec.from_yaml(path)


_PLACEHOLDER = {"id": "none", "x": "x", "y": "y", **dict.fromkeys(LINES, ""), "put": ["a", "b", "c", "d"]}


def _of_family(value: dict[str, Any], lines: Mapping[str, int], text: list[str], words: Lexicon) -> list[Finding]:
    name, start = str(value.get("id", "")), lines[""]
    absent = [key for key in _REQUIRED if not value.get(key)]
    if absent:
        return [Finding(start, name, "missing", "no twin" if key == "twin" else f"no {key}") for key in absent]
    try:
        family = BatteryFamily.checked(value, name)
    except SpecError as error:
        return [Finding(start, name, "form", " ".join(error.what.split()))]
    found = [*_forbidden(family, lines, text, words), *_slots(family, lines)]
    if any(finding.rule == "slot" for finding in found):
        return found  # the other rules read lines whose slots are filled in
    return [*found, *_unequal(family, lines), *_acts(family, lines)]


def _forbidden(family: BatteryFamily, lines: Mapping[str, int], text: list[str], words: Lexicon) -> Iterator[Finding]:
    """Words that must not be there, in every value of a family."""
    for key in (*LINES, "x", "y", "put"):
        said = " / ".join(family.put) if key == "put" else str(getattr(family, key))
        for match in words.find(said):
            yield Finding(_line_of(said[match.start: match.end], lines[key], text), family.id, match.tier, match.form)
        for word in re.findall(r"[a-z]+", said.lower()):
            rule = "norm" if word in NORMS else "request" if word in REQUESTS else ""
            if rule:
                yield Finding(_line_of(word, lines[key], text), family.id, rule, word)
        if mark := re.search(r'["“”„«»]', said):
            yield Finding(_line_of(mark[0], lines[key], text), family.id, "request", f"speech: {mark[0]}")
        if person := _FIRST_PERSON.search(said):
            yield Finding(_line_of(person[0], lines[key], text), family.id, "person",
                          f"{person[0]!r} cannot be turned into the second person")


def _line_of(word: str, start: int, text: list[str]) -> int:
    """The line, from the one where a value begins, on which `word` stands; `start` if a line break divides it."""
    return next((n for n, line in enumerate(text[start - 1:], start) if word.lower() in line.lower()), start)


def _slots(family: BatteryFamily, lines: Mapping[str, int]) -> Iterator[Finding]:
    for key in LINES:
        said, wanted = str(getattr(family, key)), SLOTS[key]
        try:
            fill_slots(said, family.x, family.y)
        except (KeyError, ValueError) as error:
            yield Finding(lines[key], family.id, "slot", f"unknown slot in {key}: {error}")
            continue
        named = [slot.lower() for slot in re.findall(r"\$\{?(\w+)", said)]
        if named != ([wanted] if wanted else []):
            want = f"one ${wanted}" if wanted else "none"
            yield Finding(lines[key], family.id, "slot", f"{key} has {named or 'no slot'}, and wants {want}")


def _unequal(family: BatteryFamily, lines: Mapping[str, int]) -> Iterator[Finding]:
    """Lines that stand for each other must be of like length."""
    for first, second in (("a", "b"), ("need", "twin"), ("plenty", "last")):
        counts = [len(str(getattr(family, key)).split()) for key in (first, second)]
        if min(counts) < _LENGTHS * max(counts):
            yield Finding(lines[second], family.id, "unequal",
                          f"{first} has {counts[0]} words and {second} has {counts[1]}")
        if getattr(family, first) == getattr(family, second):
            yield Finding(lines[second], family.id, "unequal", f"{first} and {second} are the same")


def _acts(family: BatteryFamily, lines: Mapping[str, int]) -> Iterator[Finding]:
    acts = family.acts("a")
    every = [*acts.costly, *acts.keep]
    lengths = [len(act.split()) for act in every]
    if max(lengths) - min(lengths) > _WORDS:
        yield Finding(lines["put"], family.id, "options", f"the acts have {min(lengths)} to {max(lengths)} words")
    for word, n in Counter(act.split()[0] for act in every).items():
        if n > 1:
            yield Finding(lines["put"], family.id, "options", f"{n} acts begin with {word!r}")
    if family.x == family.y:
        yield Finding(lines["y"], family.id, "options", "x and y are the same")


def first_words(families: Iterable[BatteryFamily]) -> Counter[str]:
    """How often each word begins an act, over all families; every one is costly and keeping equally often."""
    return Counter(put.split()[0] for family in families for put in family.put)
