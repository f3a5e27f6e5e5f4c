"""Slips in the hand-written frames and in told stories that a reader would stumble over, found by rule."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from undertow.subjects.keeper.frames import Frame, Frames, Slot
from undertow.subjects.keeper.story import ACTS, FILES, Story

MOST_OPENINGS = 3  # frames of one section that may begin with the same four words
_MAY_SAY = {"T0": frozenset({"word", "song", "play"}), "T1": frozenset({"song", "play"})}
_CONTINUATIONS = frozenset({"acts", "boats", "interruptions", "stock"})  # files with sections that go on inside a sentence
_SLIPS = (("two spaces", re.compile(r"  ")), ("space before a mark", re.compile(r" [.,;:!?](?:\s|$)")),
          ("a before a vowel", re.compile(r"\b[Aa] [aeiouAEIOU](?!ne\b|nce\b|se)")),
          ("an before a consonant", re.compile(r"\b[Aa]n [^aeiouhAEIOUH\s]")),
          ("a word twice", re.compile(r"\b(\w+) \1\b")), ("two marks", re.compile(r"[,;:][.,;:]|\.\.")))


def lint_frames(frames: Frames, words: Mapping[str, Sequence[str]]) -> list[str]:
    """Findings, each with file and line; empty if there is nothing to mend.

    Checked: marks and articles, words said twice, quotes, capital letters, full stops, frames that are there twice, openings
    repeated within a file, the forbidden word (T0) and names near it (T1) outside the files meant for them, acts that share
    their first word, and places whose opening does not name them.
    """
    return [*_each(frames, words), *_repeated(frames), *_acts(frames),
            *(f"{_where(frame)}: the opening does not name the place" for place in frames.places for frame in place.openings
              if Slot("name") not in frame.parts)]


def lint_story(story: Story, words: Mapping[str, Sequence[str]]) -> list[str]:
    """Findings in one told story."""
    found = [f"{name}: {match[0]!r}" for name, pattern in _SLIPS if (match := pattern.search(story.text))]
    for sentence in story.sentences:
        text = story.text[sentence.start: sentence.end]
        found += [f"{tier} in a {sentence.kind} line: {text!r}" for tier, allowed in _MAY_SAY.items()
                  if sentence.kind not in allowed and says(text, words[tier])]
    return found


def says(text: str, forms: Sequence[str]) -> bool:
    """Whether one of the forms stands in the text as a whole word, in any case."""
    return bool(set(forms) & set(re.findall(r"[a-z]+", text.lower())))


def _where(frame: Frame) -> str:
    return f"{frame.kind}.txt, line {frame.line}"


def _each(frames: Frames, words: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for frame in frames.all():
        text = frame.source
        for name, pattern in _SLIPS:
            if match := pattern.search(text):
                yield f"{_where(frame)}: {name}: {match[0]!r}"
        if text.count('"') % 2:
            yield f"{_where(frame)}: a quote is not closed"
        if frame.kind not in _CONTINUATIONS and not re.match(r'["{A-Z]', text):
            yield f"{_where(frame)}: does not begin with a capital letter"
        if not re.search(r'[.!?,]"?$', text) and frame.kind != "stock":
            yield f"{_where(frame)}: does not end in a mark"
        for tier, allowed in _MAY_SAY.items():
            if frame.kind not in allowed and says(f"{text} {frame.did}", words[tier]):
                yield f"{_where(frame)}: a {tier} word outside {', '.join(sorted(allowed))}"


def _repeated(frames: Frames) -> Iterator[str]:
    listed = list(frames.all())
    for text, n in Counter(frame.source for frame in listed).items():
        if n > 1:
            yield f"{n} frames read {text!r}"
    groups = [*(members for sections in frames.sections.values() for members in sections.values()),
              *(place.openings for place in frames.places)]
    for members in groups:
        for opening, n in Counter(" ".join(frame.source.split()[:4]) for frame in members).items():
            if n > MOST_OPENINGS:
                yield f"{members[0].kind}.txt: {n} frames of one section begin with {opening!r}"
    for did, n in Counter(frame.did for frame in listed if frame.did).items():
        if n > 1:
            yield f"{n} deeds have the participle {did!r}"


def _acts(frames: Frames) -> Iterator[str]:
    """Acts of one kind must differ in their first word: it is where the decision is read."""
    for file, kind in FILES.items():
        owners: dict[str, set[str]] = {}
        for act in ACTS[kind]:
            for section in (act, f"{act} held_out"):
                for frame in frames.sections[file].get(section, ()):
                    owners.setdefault(frame.source.split()[0], set()).add(act)
        for word, acts in owners.items():
            if len(acts) > 1:
                yield f"{file}.txt: {word!r} begins wordings of {', '.join(sorted(acts))}"
