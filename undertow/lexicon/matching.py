"""The reference matcher: every occurrence of a form in a text, found by walking a trie from every place a form may start.

Rules, which the automaton of the guard repeats and the tests check one against the other:

* A form may start where the character before is not a letter of the kind that the form starts with, and may end where
  the character after is not an alphabetic letter. Forms in Hangul may be followed by anything (particles are attached),
  forms in scripts without spaces (Chinese, Japanese, Thai) may stand anywhere. `*` at an edge lifts the rule there.
  Digits, apostrophes, hyphens and underscores are no letters: "love's", "love-letter" and "love4u" hold the word,
  "love를" and "我love你" too; "glove", "clover" and "lovecraft" do not.
* No form ends inside a letter: すき is not found in すぎ.
* A blank in a form stands for one or more blanks of any kind.
* An occurrence that lies inside an occurrence of an innocent exclusion is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple, final

from undertow.lexicon.folding import Kind, extends, fold_text, is_mark, kind


class Form(NamedTuple):
    """One form as the matcher uses it.

    Attributes:
        text: as written in the lexicon, without `*`.
        folded: what is looked for in folded text.
        tier: "T0", "T1", "T2", or "innocent".
        language: language code.
        free_start: True if it may follow any character.
        free_end: True if any character may follow.
    """

    text: str
    folded: str
    tier: str
    language: str
    free_start: bool
    free_end: bool


class Occurrence(NamedTuple):
    """A form at `start` up to `end` of a folded text."""

    start: int
    end: int
    form: Form


class Match(NamedTuple):
    """A form at `start` up to `end` of the original text."""

    start: int
    end: int
    form: str
    tier: str
    language: str


def make_form(written: str, tier: str, language: str) -> Form:
    """A form from its spelling in a lexicon, e.g. "love", "любов*" or "*사랑"."""
    text = written.strip()
    core = text.strip("*").strip()
    folded = " ".join(fold_text(core).text.split())
    first, last = (kind(folded[0]), kind(folded[-1])) if folded else (Kind.OTHER, Kind.OTHER)
    return Form(core, folded, tier, language, text.startswith("*") or first == Kind.OTHER,
                text.endswith("*") or last != Kind.ALPHABETIC)


@final
class FormTrie:
    """Forms by their folded characters. Node 0 is the root; `ends[node]` are the forms that end there."""

    def __init__(self, forms: Iterable[Form]) -> None:
        self.children: list[dict[str, int]] = [{}]
        self.ends: list[list[Form]] = [[]]
        for form in forms:
            node = 0
            for char in form.folded:
                if char not in self.children[node]:
                    self.children[node][char] = len(self.children)
                    self.children.append({})
                    self.ends.append([])
                node = self.children[node][char]
                if char == " ":
                    self.children[node][" "] = node
            self.ends[node].append(form)
        self._openings = re.compile(f"(?={'|'.join(self._opening(char) for char in self.children[0]) or '(?!)'})")

    def _opening(self, first: str) -> str:
        """A pattern for the first two characters of every form that begins with `first`, or the first alone."""
        node = self.children[0][first]
        rest = "".join(map(re.escape, self.children[node]))
        return re.escape(first) + (f"[{rest}]" if rest and not self.ends[node] else "")

    def occurrences(self, folded: str) -> Iterator[Occurrence]:
        """Every occurrence in a folded text, innocent or not, by start."""
        for opening in self._openings.finditer(folded):
            start = opening.start()
            char = folded[start]
            blocked = start > 0 and kind(char) != Kind.OTHER and kind(folded[start - 1]) == kind(char)
            node: int | None = self.children[0][char]
            end = start + 1
            while node is not None:
                for form in self.ends[node]:
                    if (form.free_start or not blocked) and _may_end(form, folded, end):
                        yield Occurrence(start, end, form)
                node = self.children[node].get(folded[end]) if end < len(folded) else None
                end += 1


def _may_end(form: Form, folded: str, end: int) -> bool:
    if end >= len(folded):
        return True
    after = folded[end]
    return not extends(after) and (form.free_end or kind(after) != Kind.ALPHABETIC)


def matches(text: str, forms: FormTrie, innocent: FormTrie) -> list[Match]:
    """Occurrences in `text` that no exclusion covers; of those of one tier that overlap, the leftmost and then longest."""
    folded = fold_text(text)
    found = list(forms.occurrences(folded.text))
    if not found:
        return []
    covers = [(o.start, o.end) for o in innocent.occurrences(folded.text)]
    guilty = [o for o in found if not any(start <= o.start and o.end <= end for start, end in covers)]
    kept: list[Match] = []
    taken: dict[str, int] = {}
    for o in sorted(guilty, key=lambda o: (o.start, -o.end)):
        if o.start < taken.get(o.form.tier, 0):
            continue
        taken[o.form.tier] = o.end
        stop = folded.origin[o.end - 1] + 1
        while stop < len(text) and is_mark(text[stop]):
            stop += 1
        kept.append(Match(folded.origin[o.start], stop, o.form.text, o.form.tier, o.form.language))
    return kept
