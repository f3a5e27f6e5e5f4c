"""A text as rows of tokens: one side of the held-out split, packed, the same whatever the batch size.

    spec = TextSpec(source="brown", context=256)
    corpus = open_corpus(spec, "train", subject.tokenizer, subject.bos_id)
    for batch in corpus.batches(rows=16): ...

Memory stays bounded: a first pass over the text keeps ids and hashes only, later ones tokenise a few documents at a
time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple, Protocol, cast, final, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from sae.text import Document, Message, Side, Split, TextSpec, as_chat, document_hash, read_documents, split_documents
from undertow.core.errors import TextError
from undertow.core.spec import digest_json
from undertow.subjects.special import special_ids

__all__ = ["Corpus", "Count", "Split", "TextSpec", "TextTokenizer", "TokenBatch", "open_corpus", "tokenizer_digest"]
_GROUP_DOCUMENTS = 32
_GROUP_CHARS = 100_000
_PROBE = ("The keeper's lamp, 1,234.50 and \t tabs;  two spaces\n\nÉtude “quoted” naïve 中文 🙂 <|im_end|> <s> can't "
          "camelCase SNAKE_CASE x=y+1 http://a.b/c?d=e")


@runtime_checkable
class TextTokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]:
        """Added tokens by id; each has `content` and `special`."""
        ...

    @property
    def chat_template(self) -> Any: ...

    def get_vocab(self) -> dict[str, int]: ...

    def __call__(self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool,
                 verbose: bool) -> Mapping[str, Any]: ...


@final
@dataclass(frozen=True, eq=False)
class TokenBatch:
    """A few rows of tokens.

    Attributes:
        tokens: token ids.
        attend: False on padding only.
        measured: True where an activation counts: not position 0, not a special token, not padding.
        documents: index into `Corpus.document_ids`; -1 on BOS and padding.
        first_row: number of the first row within the corpus.
    """

    tokens: Int64[Tensor, "batch pos"]
    attend: Bool[Tensor, "batch pos"]
    measured: Bool[Tensor, "batch pos"]
    documents: Int64[Tensor, "batch pos"]
    first_row: int


class Count(NamedTuple):
    """Exact size of a corpus: rows, tokens without padding, and tokens whose activation counts."""

    rows: int
    tokens: int
    measured: int


@final
@dataclass(frozen=True, eq=False)
class Corpus:
    """One side of one text's split, tokenised anew at every iteration.

    Rows have exactly `spec.context` tokens. Position 0 is BOS; documents follow one another with BOS between them, and
    one may go on over several rows; the last row is padded on the right. A tokenizer without BOS gives rows without it,
    and position 0 is a token of the document that is not measured.

    Attributes:
        digest: 16 hex characters over all that decides the rows: the documents of this side in order (ids and texts),
            the spec but for the source's name, and the tokenizer.
    """

    spec: TextSpec
    split: Split
    digest: str
    side: Side
    cut: bytes
    tokenizer: TextTokenizer
    bos_id: int | None

    @property
    def document_ids(self) -> tuple[str, ...]:
        return self.side.document_ids

    @property
    def n_chars(self) -> int:
        return self.side.n_chars

    def batches(self, rows: int, skip_rows: int = 0) -> Iterator[TokenBatch]:
        """Batches of `rows` rows (the last may be smaller), beginning after the first `skip_rows` rows of the corpus.

        The rows are the same, in the same order, whatever `rows` is; skipped ones are still tokenised, which is cheap.

        Raises TextError: the text has changed since the corpus was opened, or a document cannot be rendered as a chat.
        """
        special = np.array(sorted(special_ids(self.tokenizer)), dtype=np.int64)
        remaining = islice(self._rows(), skip_rows, None)
        first = skip_rows
        while pending := list(islice(remaining, rows)):
            yield _stack(pending, special, first)
            first += len(pending)

    def count_tokens(self) -> Count:
        """Count rows and tokens in one pass over the text, without a model."""
        rows = tokens = measured = 0
        for batch in self.batches(256):
            rows += len(batch.tokens)
            tokens += int(batch.attend.sum())
            measured += int(batch.measured.sum())
        return Count(rows, tokens, measured)

    def chars_per_token(self, sample_chars: int) -> float:
        """Characters of document text a token, over the first documents that have `sample_chars` characters in all."""
        chars = tokens = 0
        for _, document, ids in self._tokenised():
            chars += len(document.text)
            tokens += len(ids)
            if chars >= sample_chars:
                break
        return chars / max(tokens, 1)

    def _rows(self) -> Iterator[_Row]:
        packer = _Packer(self.spec.context, self.bos_id)
        for index, document, ids in self._tokenised():
            begins_with_bos = bool(ids) and ids[0] == self.bos_id
            # Only a chat template can write BOS; the packer puts its own there.
            yield from packer.add(index, ids[1:] if begins_with_bos and self._is_chat(document) else ids)
        yield from packer.finish()

    def _is_chat(self, document: Document) -> bool:
        return self.spec.chat or bool(document.messages)

    def _tokenised(self) -> Iterator[tuple[int, Document, list[int]]]:
        group: list[Document] = []
        done = chars = 0
        for document in self._documents():
            group.append(document)
            chars += len(document.text)
            if len(group) == _GROUP_DOCUMENTS or chars >= _GROUP_CHARS:
                yield from zip(range(done, done + len(group)), group, self._encode(group), strict=True)
                done, chars, group = done + len(group), 0, []
        yield from zip(range(done, done + len(group)), group, self._encode(group), strict=True)

    def _documents(self) -> Iterator[Document]:
        """Documents of this side; their hashes are compared with those of the first pass."""
        index = 0
        for document in read_documents(self.spec.source, self.spec.column):
            value = document_hash(document)
            if (value < self.cut) != (self.split == "held_out"):
                continue
            if value != self.side.hashes[32 * index : 32 * index + 32]:
                raise _changed(self.spec.source, f"document {document.id!r} is new")
            yield document
            index += 1
        if index != len(self.side.document_ids):
            raise _changed(self.spec.source, f"{len(self.side.document_ids) - index} documents are gone")

    def _encode(self, group: list[Document]) -> list[list[int]]:
        plain = [document.text for document in group if not self._is_chat(document)]
        encoded = iter(_encode_plain(self.tokenizer, plain) if plain else [])
        return [_encode_chat(self.tokenizer, document) if self._is_chat(document) else next(encoded)
                for document in group]


def _changed(source: str, how: str) -> TextError:
    return TextError(f"{source} changed while it was read: {how}", "start again")


def open_corpus(spec: TextSpec, split: Split, tokenizer: TextTokenizer, bos_id: int | None) -> Corpus:
    """Read the text once, split it, and return one side of it.

    Args:
        spec: the text.
        split: "train" or "held_out".
        tokenizer: a Hugging Face tokenizer.
        bos_id: token at position 0 of every row and between documents, or None.

    Raises TextError: see `read_documents` and `split_documents`; chats where the tokenizer has no chat template; a chat
    that contains one of the tokenizer's special marks, which would forge a turn.
    """
    documents = _checked_chats(read_documents(spec.source, spec.column), spec.chat, tokenizer)
    splits = split_documents(documents, spec.held_out)
    side = splits.train if split == "train" else splits.held_out
    digest = digest_json({"spec": spec.model_dump(exclude={"source", "column"}), "split": split, "bos": bos_id,
                          "ids": hashlib.sha256("\n".join(side.document_ids).encode()).hexdigest(),
                          "texts": hashlib.sha256(side.hashes).hexdigest(), "tokenizer": tokenizer_digest(tokenizer)})
    return Corpus(spec, split, digest, side, splits.cut, tokenizer, bos_id)


def tokenizer_digest(tokenizer: TextTokenizer) -> str:
    """16 hex characters over the vocabulary, special tokens, chat template, and the encoding of a probe text."""
    vocab = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return digest_json({"vocab": hashlib.sha256(vocab.encode()).hexdigest(), "special": sorted(special_ids(tokenizer)),
                        "template": str(tokenizer.chat_template), "probe": _encode_plain(tokenizer, [_PROBE])[0]})


def _encode_plain(tokenizer: TextTokenizer, texts: list[str]) -> list[list[int]]:
    # split_special_tokens: a special mark spelt out in a text is ordinary characters.
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def _checked_chats(documents: Iterable[Document], chat: bool, tokenizer: TextTokenizer) -> Iterator[Document]:
    """Refuse, in the first pass and so before any work, chats that could not be rendered."""
    special = special_ids(tokenizer)
    marks = [token.content for index, token in tokenizer.added_tokens_decoder.items() if index in special]
    for document in documents:
        if chat or document.messages:
            if not tokenizer.chat_template:
                raise TextError(f"document {document.id!r} is to be a chat, and this tokenizer has no chat template",
                                "leave --chat away, choose a plain column, or choose a chat model")
            forged = next((mark for mark in marks if mark in document.text), None)
            if forged is not None:
                raise TextError(f"document {document.id!r} has the special mark {forged!r}, which would forge a turn",
                                "remove it from the text" + (", or leave --chat away" if not document.messages else ""))
        yield document


def _encode_chat(tokenizer: TextTokenizer, document: Document) -> list[int]:
    from undertow.subjects.chat import render  # brings transformers along, which plain texts do not need

    messages: tuple[Message, ...] = as_chat(document)
    try:
        return render(cast(Any, tokenizer), messages).ids
    except TextError as error:
        raise TextError(f"document {document.id!r}: {error.what}", error.hint) from None


class _Row(NamedTuple):
    tokens: np.ndarray  # context ids
    documents: np.ndarray  # context indices, -1 on BOS and padding
    length: int  # tokens before the padding


@final
class _Packer:
    """Fills rows of `context` tokens, document after document."""

    def __init__(self, context: int, bos_id: int | None) -> None:
        self._context, self._bos_id, self._filled = context, bos_id, 0
        self._tokens, self._documents = self._blank()

    def _blank(self) -> tuple[np.ndarray, np.ndarray]:
        pad = 0 if self._bos_id is None else self._bos_id
        return np.full(self._context, pad, dtype=np.int64), np.full(self._context, -1, dtype=np.int64)

    def add(self, document: int, ids: list[int]) -> Iterator[_Row]:
        """Append a document; yields the rows that it fills."""
        rest = np.asarray(ids, dtype=np.int64)
        if not len(rest):
            return
        if self._filled and self._bos_id is not None:
            self._filled += 1  # the blank row holds BOS already
            if self._filled == self._context:
                yield self._take()
        while len(rest):
            if not self._filled and self._bos_id is not None:
                self._filled = 1
            end = min(self._context, self._filled + len(rest))
            fits = end - self._filled
            self._tokens[self._filled : end] = rest[:fits]
            self._documents[self._filled : end] = document
            rest, self._filled = rest[fits:], end
            if end == self._context:
                yield self._take()

    def finish(self) -> Iterator[_Row]:
        """The last row, if it is not empty."""
        if self._filled:
            yield self._take()

    def _take(self) -> _Row:
        row = _Row(self._tokens, self._documents, self._filled)
        self._tokens, self._documents = self._blank()
        self._filled = 0
        return row


def _stack(rows: list[_Row], special: np.ndarray, first_row: int) -> TokenBatch:
    tokens = np.stack([row.tokens for row in rows])
    attend = np.arange(tokens.shape[1])[None, :] < np.array([row.length for row in rows])[:, None]
    measured = attend & ~np.isin(tokens, special)
    measured[:, 0] = False
    documents = np.stack([row.documents for row in rows])
    return TokenBatch(torch.from_numpy(tokens), torch.from_numpy(attend), torch.from_numpy(measured),
                      torch.from_numpy(documents), first_row)
