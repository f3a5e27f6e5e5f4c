"""Tokens as text that a terminal can safely show: one piece per readable run of tokens, control characters escaped."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

NEWLINE = "↵"
_REPLACEMENT = "\ufffd"
_SLICE = 32  # tokens
_JOINERS = "\u200c\u200d"  # invisible, but scripts and emoji need them


@runtime_checkable
class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ..., **kwargs: bool) -> str | list[str]:
        """Text of some tokens."""
        ...

    def convert_ids_to_tokens(self, ids: int, /) -> str | list[str]:
        """The tokenizer's own spelling of one token."""
        ...


class Piece(NamedTuple):
    """Tokens `start` up to `stop` of a sequence, which read as `text`; several where they share one character."""

    text: str
    start: int
    stop: int


def printable(text: str) -> str:
    """`text` on one line, with nothing in it that a terminal obeys.

    A newline becomes ↵; other control, format, surrogate and separator characters become \\x1b, \\u202e and so on.
    """
    return "".join(_printable(char) for char in text)


def _printable(char: str) -> str:
    if char == "\n":
        return NEWLINE
    if char in _JOINERS or unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return char
    return ascii(char)[1:-1]


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Piece]:
    """Split a token sequence into printable pieces, one a token wherever a token is whole characters.

    The sequence is decoded from its start up to every token, so that a character whose bytes are spread over several
    tokens is read once, as one piece that spans them. Bytes that never become a character show as U+FFFD. Where a
    tokenizer rewrites text that it has already produced, its own spelling of each token is shown. Long sequences are read
    slice by slice, in linear time, where that gives the same text as the whole.
    """
    if len(ids) > _SLICE:
        found = _in_slices(tokenizer, ids)
        if "".join(piece.text for piece in found) == printable(_decode(tokenizer, list(ids))):
            return found
    return _from_the_start(tokenizer, ids)


def _in_slices(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Piece]:
    found: list[Piece] = []
    start = 0
    while start < len(ids):
        stop = min(start + _SLICE, len(ids))
        inside = _from_the_start(tokenizer, ids[start:stop])
        if stop < len(ids) and len(inside) > 1 and inside[-1].text.endswith(_REPLACEMENT):
            stop = start + inside.pop().start  # perhaps half a character: it goes to the next slice
        found += [Piece(piece.text, start + piece.start, start + piece.stop) for piece in inside]
        start = stop
    return found


def _from_the_start(tokenizer: Tokenizer, ids: Sequence[int]) -> list[Piece]:
    """Quadratic in the number of tokens, since every prefix is decoded."""
    found: list[Piece] = []
    said, start = "", 0
    for stop in range(1, len(ids) + 1):
        text = _decode(tokenizer, list(ids[:stop]))
        if not text.startswith(said):
            return [Piece(printable(str(tokenizer.convert_ids_to_tokens(i))), n, n + 1) for n, i in enumerate(ids)]
        if text.endswith(_REPLACEMENT) and stop < len(ids):
            continue  # perhaps the first bytes of a character
        found.append(Piece(printable(text[len(said):]), start, stop))
        said, start = text, stop
    return found


def token_text(tokenizer: Tokenizer, token_id: int) -> str:
    """One token as printable text; the tokenizer's own spelling where it is no whole character or nothing at all."""
    text = _decode(tokenizer, [token_id])
    if not text or _REPLACEMENT in text:
        text = str(tokenizer.convert_ids_to_tokens(token_id))
    return printable(text)


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
