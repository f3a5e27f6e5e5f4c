"""Tokens as text: characters spread over tokens, control characters, and tokenizers that rewrite what they said."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.wording import Piece, pieces, printable, token_text


class ByteTokenizer:
    """One token a byte of UTF-8."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False, **kwargs: bool) -> str:
        return bytes(token_ids).decode("utf-8", errors="replace")

    def convert_ids_to_tokens(self, ids: int, /) -> str | list[str]:
        return f"<0x{ids:02X}>"


class RewritingTokenizer:
    """Decodes to another text as soon as a second token comes."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False, **kwargs: bool) -> str:
        return f"{len(token_ids)} tokens"

    def convert_ids_to_tokens(self, ids: int, /) -> str | list[str]:
        return f"t{ids}\n"


def test_a_character_over_several_tokens_is_one_piece() -> None:
    found = pieces(ByteTokenizer(), list("aé€b".encode()))
    assert found == [Piece("a", 0, 1), Piece("é", 1, 3), Piece("€", 3, 6), Piece("b", 6, 7)]


def test_bytes_that_never_become_a_character() -> None:
    euro = list("€".encode())
    assert "".join(p.text for p in pieces(ByteTokenizer(), [*euro[1:], ord("a"), *euro[:2]])) == "\ufffd\ufffda\ufffd"


def test_rewriting_tokenizer_shows_its_own_spelling() -> None:
    assert pieces(RewritingTokenizer(), [5, 6]) == [Piece("t5↵", 0, 1), Piece("t6↵", 1, 2)]


def test_single_tokens() -> None:
    assert token_text(ByteTokenizer(), ord("a")) == "a"
    assert token_text(ByteTokenizer(), 0xE2) == "<0xE2>"
    assert token_text(ByteTokenizer(), ord("\n")) == "↵"


@pytest.mark.parametrize(("raw", "shown"), [
    ("a\nb", "a↵b"), ("\x1b[31mred", "\\x1b[31mred"), ("[bold]x[/bold]", "[bold]x[/bold]"),
    ("\t", "\\t"), ("\r", "\\r"),
    ("\x9b31m", "\\x9b31m"), ("\u202eabc", "\\u202eabc"), ("\ud800", "\\ud800"), ("\u2028", "\\u2028"),
    ("\x07", "\\x07"),
    ("né 漢字 👩\u200d🚀", "né 漢字 👩\u200d🚀"), ("\U000e0041", "\\U000e0041")])
def test_printable(raw: str, shown: str) -> None:
    assert printable(raw) == shown


@given(st.text())
def test_nothing_a_terminal_obeys_is_left(text: str) -> None:
    shown = printable(text)
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 for char in shown)
    shown.encode("utf-8")


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20))
def test_pieces_cover_all_tokens_and_join_to_the_text(text: str) -> None:
    ids = list(text.encode())
    found = pieces(ByteTokenizer(), ids)
    assert [p.start for p in found] == [0, *(p.stop for p in found[:-1])][:len(found)]
    assert (found[-1].stop if found else 0) == len(ids)
    assert "".join(p.text for p in found) == printable(text)


@given(st.text(alphabet="aé€🙂 ", min_size=20, max_size=200))
def test_long_texts_are_read_as_from_the_start(text: str) -> None:
    """Slices of 32 bytes cut characters in two; none may show."""
    ids = list(text.encode())
    assert [piece.text for piece in pieces(ByteTokenizer(), ids)] == list(text)


def test_long_and_rewriting_shows_its_own_spelling() -> None:
    assert [piece.text for piece in pieces(RewritingTokenizer(), range(100))] == [f"t{i}↵" for i in range(100)]
