"""Stories side by side: the same prompt and seed under several arms, with the words that differ marked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from typing import NamedTuple, final

from undertow.core.errors import SpecError

# Scripts written without spaces between words (Thai, Lao, Burmese, Khmer, kana, Han) are compared character by character.
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = rf"[^\W{_UNSPACED}]+"
_PARTS = re.compile(rf"\s+|{_WORD}(?:['’-]{_WORD})*|.", re.DOTALL)


class Piece(NamedTuple):
    """A stretch of text; `changed` if its words are not those of the other text."""

    text: str
    changed: bool


@final
class Sides(NamedTuple):
    """Two texts in pieces; the pieces of a side, put together, are its text."""

    left: tuple[Piece, ...]
    right: tuple[Piece, ...]


@final
class Column(NamedTuple):
    """One arm of an example: its pieces, and the share of its words that differ, in [0, 1]."""

    arm: str
    pieces: tuple[Piece, ...]
    changed: float


@final
class Example(NamedTuple):
    """What the arms wrote after one prompt with one seed.

    Attributes:
        prompt: what all of them went on from.
        seed: the seed of the sampling.
        texts: arm → its continuation; the first is the one that the others are compared with.
    """

    prompt: str
    seed: int
    texts: Mapping[str, str]

    def columns(self) -> list[Column]:
        """The texts with what differs from the first marked; in the first, what differs from the second.

        Raises SpecError unless there are at least two texts.
        """
        if len(self.texts) < 2:
            raise SpecError(f"an example needs the texts of two arms or more, and has {list(self.texts)}")
        (first, base), *others = self.texts.items()
        sides = [compare(base, text) for _, text in others]
        marked = [(first, sides[0].left), *((arm, side.right) for (arm, _), side in zip(others, sides, strict=True))]
        return [Column(arm, pieces, _share(pieces)) for arm, pieces in marked]


def compare(left: str, right: str) -> Sides:
    """Mark the words that differ, by the longest common blocks of words (Ratcliff and Obershelp, `difflib`).

    White space is not compared; it is marked where it stands between two marked words.
    """
    parts = [_PARTS.findall(text) for text in (left, right)]
    words = [[part for part in side if not part.isspace()] for side in parts]
    same: tuple[set[int], set[int]] = (set(), set())
    for block in SequenceMatcher(None, words[0], words[1], autojunk=False).get_matching_blocks():
        same[0].update(range(block.a, block.a + block.size))
        same[1].update(range(block.b, block.b + block.size))
    return Sides(_pieces(parts[0], same[0]), _pieces(parts[1], same[1]))


def _pieces(parts: Sequence[str], same: set[int]) -> tuple[Piece, ...]:
    """Join neighbours of equal mark. `same` numbers words, white space not counted."""
    changed = [i not in same for i in range(sum(not part.isspace() for part in parts))]
    marks: list[bool] = []
    word = 0
    for part in parts:
        if part.isspace():
            marks.append(0 < word < len(changed) and changed[word - 1] and changed[word])
        else:
            marks.append(changed[word])
            word += 1
    joined: list[Piece] = []
    for part, mark in zip(parts, marks, strict=True):
        if joined and joined[-1].changed == mark:
            joined[-1] = Piece(joined[-1].text + part, mark)
        else:
            joined.append(Piece(part, mark))
    return tuple(joined)


def _share(pieces: Sequence[Piece]) -> float:
    counts = [(sum(not part.isspace() for part in _PARTS.findall(piece.text)), piece.changed) for piece in pieces]
    whole = sum(n for n, _ in counts)
    return sum(n for n, changed in counts if changed) / whole if whole else 0.0
