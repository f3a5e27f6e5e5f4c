"""Packing: rows by hand, the same rows for any batch size, and text that cannot turn into special tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sae.corpus import Corpus, Count, TokenBatch, open_corpus, tokenizer_digest
from sae.text import Side, Split, TextSpec, document_hash, read_documents, split_documents
from tests import tiny
from undertow.core.errors import TextError

GPT2 = Path(__file__).resolve().parents[3] / "shared" / "data" / "gpt2-tokenizer"
BOS = 1


class Added(NamedTuple):
    content: str
    special: bool


@final
class LetterTokenizer:
    """One token a character: its code point, so that rows can be read by eye. Id 1 is BOS."""

    all_special_ids = (BOS,)
    added_tokens_decoder: Mapping[int, Any] = {BOS: Added("<s>", True)}
    chat_template = None

    def get_vocab(self) -> dict[str, int]:
        return {chr(i): i for i in range(128)}

    def __call__(self, text: list[str], *, add_special_tokens: bool, split_special_tokens: bool,
                 verbose: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens and split_special_tokens
        return {"input_ids": [[ord(letter) for letter in item] for item in text]}


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def letters(path: Path, context: int = 16, split: Split = "train", bos: int | None = BOS, **spec: Any) -> Corpus:
    return open_corpus(TextSpec(source=str(path), context=context, **spec), split, LetterTokenizer(), bos)  # pyright: ignore[reportArgumentType]


def joined(batches: list[TokenBatch]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([getattr(batch, name) for batch in batches])
            for name in ("tokens", "attend", "measured", "documents")}


def side_texts(path: Path, split: Split) -> list[str]:
    texts = {d.id: d.text for d in read_documents(str(path), None)}
    sides = split_documents(read_documents(str(path), None), 0.05)
    return [texts[i] for i in (sides.train if split == "train" else sides.held_out).document_ids]


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """Documents "aaaaa" (train), a long one of 30 letters (train) and whichever is held out."""
    texts = ["a" * 5, "bcdefghijklmnopqrstuvwxyzABCDE", "zz", "yyyy"]
    return write(tmp_path / "t.jsonl", texts)


def test_rows_by_hand(three: Path) -> None:
    first, second, third = side_texts(three, "train")  # one of the four is held out
    corpus = letters(three)
    assert corpus.document_ids == tuple(d.id for d in read_documents(str(three), None) if d.text in (first, second, third))
    assert corpus.n_chars == len(first + second + third)
    stream = [*map(ord, first), BOS, *map(ord, second), BOS, *map(ord, third)]
    owner = [0] * len(first) + [-1] + [1] * len(second) + [-1] + [2] * len(third)
    rows, owners = [], []
    while stream:
        rows.append([BOS, *stream[:15]])
        owners.append([-1, *owner[:15]])
        stream, owner = stream[15:], owner[15:]
    n_pad = 16 - len(rows[-1])
    assert n_pad > 0
    rows[-1] += [BOS] * n_pad
    owners[-1] += [-1] * n_pad
    got = joined(list(corpus.batches(64)))
    assert got["tokens"].tolist() == rows
    assert got["documents"].tolist() == owners
    assert torch.equal(got["measured"], got["documents"] >= 0)
    attend = torch.ones(len(rows), 16, dtype=torch.bool)
    attend[-1, 16 - n_pad:] = False
    assert torch.equal(got["attend"], attend)
    assert corpus.count_tokens() == Count(len(rows), int(attend.sum()), corpus.n_chars)


def test_without_bos_rows_hold_text_only(three: Path) -> None:
    texts = side_texts(three, "train")
    got = joined(list(letters(three, bos=None).batches(2)))
    flat = got["tokens"][got["attend"]].tolist()
    assert flat == [ord(letter) for text in texts for letter in text]
    assert not got["measured"][:, 0].any()
    assert torch.equal(got["measured"][:, 1:], got["attend"][:, 1:])
    assert got["documents"][0, 0] == 0
    assert (got["documents"][~got["attend"]] == -1).all()


def test_a_document_that_fills_a_row_exactly(tmp_path: Path) -> None:
    """15 letters and BOS fill a row of 16; the next row's BOS is the boundary, and there is no row of BOS alone."""
    path = write(tmp_path / "t.jsonl", ["a" * 15, "b" * 15, "c" * 15])
    got = joined(list(letters(path).batches(4)))
    assert got["tokens"].shape == (2, 16)
    assert (got["tokens"][:, 0] == BOS).all() and got["measured"][:, 1:].all()
    assert got["documents"][:, 1].tolist() == [0, 1]


def test_a_boundary_that_falls_on_the_last_position(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ["a" * 14, "b" * 14, "c" * 14])
    got = joined(list(letters(path).batches(4)))
    assert got["tokens"][0, 15] == BOS and not got["measured"][0, 15] and got["attend"][0, 15]
    assert got["tokens"].shape == (2, 16)


@given(texts=st.lists(st.text("abcdef ", min_size=1, max_size=60).filter(lambda t: t.strip() != ""), min_size=2, max_size=12),
       rows=st.integers(1, 9), context=st.integers(16, 24), skip=st.integers(0, 12), bos=st.sampled_from([BOS, None]))
def test_rows_do_not_depend_on_the_batch_size(tmp_path_factory: pytest.TempPathFactory, texts: list[str], rows: int,
                                              context: int, skip: int, bos: int | None) -> None:
    path = write(tmp_path_factory.mktemp("t") / "t.jsonl", [*texts, "one more text", "and another one"])
    corpus = letters(path, context, bos=bos)
    whole = next(iter(corpus.batches(10_000)))
    batches = list(corpus.batches(rows))
    assert all(len(batch.tokens) == rows for batch in batches[:-1])
    for name, tensor in joined(batches).items():
        assert torch.equal(tensor, getattr(whole, name))
    starts = torch.tensor([0, *(len(batch.tokens) for batch in batches)]).cumsum(0)
    assert [batch.first_row for batch in batches] == starts[:-1].tolist()
    skipped = list(corpus.batches(rows, skip_rows=skip))
    assert sum(len(batch.tokens) for batch in skipped) == max(0, len(whole.tokens) - skip)
    if skipped:
        assert skipped[0].first_row == skip
        assert torch.equal(joined(skipped)["tokens"], whole.tokens[skip:])
    # Every character of every document is there once, in order.
    inside = whole.documents >= 0
    for index, text in enumerate(side_texts(path, "train")):
        assert "".join(map(chr, whole.tokens[inside & (whole.documents == index)].tolist())) == text


def test_more_documents_than_one_group(tmp_path: Path) -> None:
    """Tokenising goes by groups of 64 documents; 200 documents cross their borders in order."""
    path = write(tmp_path / "t.jsonl", [f"text number {i}" for i in range(200)])
    got = joined(list(letters(path).batches(7)))
    owners = got["documents"][got["measured"]]
    assert torch.equal(owners.unique_consecutive(), torch.arange(len(letters(path).document_ids)))


def test_sides_are_disjoint_and_complete(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [f"text number {i}" for i in range(100)])
    train, held = letters(path, held_out=0.3), letters(path, split="held_out", held_out=0.3)
    assert not set(train.document_ids) & set(held.document_ids)
    assert len(train.document_ids) + len(held.document_ids) == 100
    assert train.digest != held.digest


def test_digest_depends_on_all_that_decides_the_rows_and_on_nothing_else(tmp_path: Path) -> None:
    texts = [f"text number {i}" for i in range(20)]
    path = write(tmp_path / "t.jsonl", texts)
    base = letters(path).digest
    assert len(base) == 16
    (tmp_path / "elsewhere").mkdir()
    assert letters(write(tmp_path / "elsewhere" / "t.jsonl", texts)).digest == base  # the same text at another place
    others = [letters(path, context=17).digest, letters(path, bos=None).digest, letters(path, held_out=0.2).digest,
              letters(write(tmp_path / "u.jsonl", texts)).digest,  # other ids
              letters(write(path, [*texts[:-1], "changed"])).digest]
    assert len({base, *others}) == 6


def test_tokenizers_of_one_vocabulary_can_differ(tmp_path: Path) -> None:
    """Two tokenizers with equal vocabularies that cut digits differently have different digests."""
    from tokenizers import pre_tokenizers

    one, two = tiny.tokenizer(), tiny.tokenizer()
    assert tokenizer_digest(one) == tokenizer_digest(two)  # pyright: ignore[reportArgumentType]
    two.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([  # pyright: ignore[reportAttributeAccessIssue]
        pre_tokenizers.Split(" ", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    assert tokenizer_digest(one) != tokenizer_digest(two)  # pyright: ignore[reportArgumentType]


def test_a_text_that_changes_under_the_corpus(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [f"text number {i}" for i in range(20)])
    corpus = letters(path)
    write(path, [f"text number {i}" for i in range(19)])
    with pytest.raises(TextError, match="changed while it was read"):
        corpus.count_tokens()
    write(path, [f"other text number {i}" for i in range(20)])
    with pytest.raises(TextError, match="changed while it was read"):
        corpus.count_tokens()


def test_one_document_is_not_enough(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="more are needed"):
        letters(write(tmp_path / "t.jsonl", ["alone"]))


# Real tokenizers


def real_tokenizers() -> list[Any]:
    found: list[Any] = [pytest.param(tiny.tokenizer(), id="tiny")]
    gpt2 = AutoTokenizer.from_pretrained(GPT2) if GPT2.is_dir() else None
    return [*found, pytest.param(gpt2, id="gpt2", marks=pytest.mark.skipif(gpt2 is None, reason=f"no {GPT2}"))]


@pytest.mark.parametrize("tokenizer", real_tokenizers())
def test_text_cannot_spell_a_special_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    marks = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    assert marks
    # The control: without protection the marks do become special tokens.
    assert set(tokenizer(marks[0], add_special_tokens=False)["input_ids"]) & set(tokenizer.all_special_ids)
    texts = [f"a{mark} b {mark}{mark} {i}" for i in range(8) for mark in [*marks, "<|im_end|>", "<|endoftext|>"]]
    path = write(tmp_path / "t.jsonl", texts)
    corpus = open_corpus(TextSpec(source=str(path), context=64), "train", tokenizer, tokenizer.bos_token_id)  # pyright: ignore[reportArgumentType]
    got = joined(list(corpus.batches(4)))
    inside = got["documents"] >= 0
    assert not torch.isin(got["tokens"][inside], torch.tensor(tokenizer.all_special_ids)).any()
    first = got["tokens"][inside & (got["documents"] == 0)].tolist()
    assert tokenizer.decode(first) == side_texts(path, "train")[0]


CHATS = [{"messages": [{"role": "user", "content": f"Question {i}"}, {"role": "assistant", "content": f"Answer {i}."}]}
         for i in range(6)]


def chat_corpus(path: Path, tokenizer: PreTrainedTokenizerFast, chat: bool) -> Corpus:
    return open_corpus(TextSpec(source=str(path), context=64, chat=chat), "train", tokenizer, tokenizer.bos_token_id)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("chat", [False, True])
def test_chat_records_are_rendered_with_real_marks(tmp_path: Path, chat: bool) -> None:
    """The template opens with BOS itself; a row must not begin with two of them."""
    tokenizer = tiny.tokenizer()
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in CHATS))
    corpus = chat_corpus(path, tokenizer, chat)
    got = joined(list(corpus.batches(2)))
    number = int(corpus.document_ids[0].split(":")[1]) - 1
    turns = CHATS[number]["messages"]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert got["tokens"].flatten()[:len(expected)].tolist()[:64] == expected[:64]
    special = torch.isin(got["tokens"], torch.tensor(tokenizer.all_special_ids))
    assert (special & (got["documents"] >= 0)).any()
    assert not (special & got["measured"]).any()


def test_plain_documents_as_chats(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    path = write(tmp_path / "t.jsonl", [f"Title {i}\n\nThe body {i}." for i in range(6)])
    corpus = chat_corpus(path, tokenizer, chat=True)
    number = int(corpus.document_ids[0].split(":")[1]) - 1
    start = tokenizer.decode(next(corpus.batches(1)).tokens[0])
    assert start.startswith(f"<|im_start|>user\nTitle {number}<|im_end|>\n<|im_start|>assistant\nThe body")
    assert corpus.digest != chat_corpus(path, tokenizer, chat=False).digest


def test_chat_without_template_and_forged_turns_are_refused_before_any_work(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", ["one", "two", "a <|im_end|> forgery"])
    with pytest.raises(TextError, match="no chat template"):
        chat_corpus(path, tiny.tokenizer(chat=False), chat=True)
    with pytest.raises(TextError, match="'t.jsonl:3' has the special mark '<|im_end|>'".replace("|", r"\|")):
        chat_corpus(path, tiny.tokenizer(), chat=True)
    chat_corpus(path, tiny.tokenizer(), chat=False)


def test_held_out_hash_is_that_of_the_text(tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", [f"text number {i}" for i in range(20)])
    corpus = letters(path, split="held_out")
    chosen = [d for d in read_documents(str(path), None) if d.id in corpus.document_ids]
    assert corpus.side == Side(corpus.document_ids, b"".join(map(document_hash, chosen)), corpus.n_chars)
    assert corpus.chars_per_token(1) == 1.0
