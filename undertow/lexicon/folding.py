"""Folding: text as the matcher reads it, one character at a time, with the way back to the original offsets.

Every character is folded by itself: NFKD (so full width, ligatures and mathematical letters become plain ones), case folded,
every kind of white space one blank, and what is invisible or merely decorates a letter removed. Because no character looks
at its neighbours, folding commutes with cutting a text in two, and a finite automaton over bytes can carry all of it.

Removed: format and control characters (zero-width space and joiners, soft hyphen, byte-order mark), everything Unicode calls
default-ignorable, enclosing marks, overlays, and combining marks above or below a letter (combining classes 1, 10-35, 200-240:
accents, stress marks, Hebrew and Arabic points). So й and и are one letter, and ё and е: a guard that told them apart could
be walked around by an accent. Kept, because they make another letter: the voicing marks of kana (すき is not すぎ), vowel signs
of Indic and Thai script, and the vowels and finals of Hangul, which NFKD takes apart; a form never ends before one of them.

Not folded: letters that only look alike (Cyrillic о for Latin o), digits for letters (l0ve), letters spaced out (l o v e).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from enum import IntEnum
from functools import cache
from typing import NamedTuple

_IGNORABLE = ((0x34F, 0x34F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x2065, 0x2065), (0xFE00, 0xFE0F),
              (0xFFF0, 0xFFF8), (0xE0000, 0xE0FFF))
_HANGUL = ((0x1100, 0x11FF), (0xA960, 0xA97F), (0xAC00, 0xD7FF))
_TRAILING_JAMO = ((0x1160, 0x11FF), (0xD7B0, 0xD7FF))
# Scripts written without spaces between words (Thai to Khmer, kana, Han), and modifier signs that Unicode files as letters.
_UNSPACED = ((0x2B9, 0x2DF), (0xE00, 0xEFF), (0xF00, 0xFFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x19E0, 0x19FF),
             (0x1A20, 0x1AAF), (0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3021, 0x30FF), (0x3100, 0x312F), (0x31A0, 0x31BF),
             (0x31F0, 0x31FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x1B000, 0x1B16F), (0x20000, 0x3FFFF))
_PLAIN_ASCII = re.compile(r"[\t-\r\x1c-\x7e]*")


class Kind(IntEnum):
    """What a folded character is to a neighbour: a word ends where the kind changes or at a character of no word."""

    OTHER = 0  # punctuation, digits, blanks, and letters of scripts written without spaces
    ALPHABETIC = 1
    HANGUL = 2


class Folded(NamedTuple):
    """Folded text; `origin[i]` is the index, in the original, of the character that folded character `i` came from."""

    text: str
    origin: Sequence[int]


def _within(code: int, ranges: tuple[tuple[int, int], ...]) -> bool:
    return any(low <= code <= high for low, high in ranges)


def _removed(char: str) -> bool:
    category = unicodedata.category(char)
    if category in ("Cf", "Me") or _within(ord(char), _IGNORABLE):
        return True
    if category == "Cc":
        return not char.isspace()
    mark = unicodedata.combining(char)
    return mark == 1 or 10 <= mark <= 35 or 200 <= mark <= 240


@cache
def fold(char: str) -> str:
    """One character folded: no, one or several characters."""
    kept = "".join(c for c in unicodedata.normalize("NFKD", char) if not _removed(c)).casefold()
    kept = "".join(c for c in unicodedata.normalize("NFKD", kept) if not _removed(c))
    return "".join(" " if c.isspace() else c for c in kept)


def fold_text(text: str) -> Folded:
    """A text folded, with the origin of every folded character."""
    if text.isascii() and _PLAIN_ASCII.fullmatch(text):
        return Folded("".join(" " if c.isspace() else c for c in text.lower()), range(len(text)))
    parts = [fold(char) for char in text]
    return Folded("".join(parts), [i for i, part in enumerate(parts) for _ in part])


@cache
def kind(char: str) -> Kind:
    """The kind of a folded character."""
    code = ord(char)
    if unicodedata.category(char)[0] not in "LM" or _within(code, _UNSPACED):
        return Kind.OTHER
    return Kind.HANGUL if _within(code, _HANGUL) else Kind.ALPHABETIC


@cache
def extends(char: str) -> bool:
    """True for a folded character that belongs to the letter before it: a voicing mark, a vowel sign, a vowel of Hangul."""
    return unicodedata.category(char)[0] == "M" or _within(ord(char), _TRAILING_JAMO)


def is_mark(char: str) -> bool:
    """True for a combining mark of the original text."""
    return unicodedata.category(char)[0] == "M"
