"""The vocabulary of a tokenizer as bytes: what each token adds to the text."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from undertow.core.errors import SubjectError

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary(NamedTuple):
    """Bytes of every token id; those in `special` add no text (end of text, marks of a chat) and are b""."""

    tokens: tuple[bytes, ...]
    special: frozenset[int]

    def spell(self, ids: Sequence[int]) -> bytes:
        """The bytes of a sequence; special tokens and ids past the vocabulary add nothing."""
        return b"".join(self.tokens[i] for i in ids if 0 <= i < len(self.tokens))

    def text(self, ids: Sequence[int]) -> str:
        """The text of a sequence; bytes that are no UTF-8 become U+FFFD."""
        return self.spell(ids).decode("utf-8", "replace")


def read_vocabulary(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a fast tokenizer (of transformers or tokenizers).

    Byte-level BPE, sentencepiece pieces with or without byte fallback, WordPiece and whole words are understood.
    Raises SubjectError for a tokenizer of another kind.
    """
    core = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if getattr(core, "to_str", None) is None:
        raise SubjectError(f"{type(tokenizer).__name__} is not a fast tokenizer, so its tokens cannot be read as bytes",
                           "open it with AutoTokenizer.from_pretrained(..., use_fast=True)")
    decoder = json.loads(core.to_str()).get("decoder")
    kind = _decoder_kind(decoder)
    added = core.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special} | set(getattr(tokenizer, "all_special_ids", ()))
    size = 1 + max(core.get_vocab(with_added_tokens=True).values(), default=-1)
    tokens = [b""] * size
    for text, i in core.get_vocab(with_added_tokens=True).items():
        if i not in special:
            tokens[i] = added[i].content.encode() if i in added else _token_bytes(text, kind)
    return Vocabulary(tuple(tokens), frozenset(special))


def _decoder_kind(decoder: dict[str, Any] | None) -> str:
    if decoder is None:
        return "words"
    parts = [part["type"] for part in decoder.get("decoders", [decoder])]
    for name, kind in (("ByteLevel", "bytes"), ("WordPiece", "wordpiece"), ("Metaspace", "pieces"), ("ByteFallback", "pieces")):
        if name in parts:
            return kind
    raise SubjectError(f"a tokenizer that decodes by {', '.join(parts)} is not understood",
                       "the lexicon reads byte-level BPE, sentencepiece, WordPiece and whole-word tokenizers")


def _token_bytes(text: str, kind: str) -> bytes:
    if kind == "bytes":
        table = byte_characters()
        return bytes(table[c] for c in text) if all(c in table for c in text) else text.encode()
    if kind == "pieces":
        byte = _BYTE.fullmatch(text)
        return bytes([int(byte[1], 16)]) if byte else text.replace("\u2581", " ").encode()
    if kind == "wordpiece":
        return (text[2:] if text.startswith("##") else f" {text}").encode()
    return f" {text}".encode()


@cache
def byte_characters() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte (Radford et al. 2019), and that byte."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in shown}
    hidden = [byte for byte in range(256) if byte not in set(shown)]
    return table | {chr(256 + i): byte for i, byte in enumerate(hidden)}
