"""Side by side: pieces give the texts back, and marks are on the words that differ."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from undertow.core.errors import SpecError
from undertow.studies.stories import Example, Piece, compare

WORDS = st.lists(st.sampled_from(["oil", "the", "Ana's", "keeper", ".", " ", "\n", "爱", "你", "last-born", "é"]), max_size=12)


def test_changed_words_are_marked_on_both_sides() -> None:
    sides = compare("He kept the oil. And slept.", "He gave the last oil to Ana's boy.")
    assert sides.left == (Piece("He ", False), Piece("kept", True), Piece(" the oil. ", False), Piece("And slept.", True))
    assert sides.right == (Piece("He ", False), Piece("gave", True), Piece(" the ", False), Piece("last", True),
                           Piece(" oil ", False), Piece("to Ana's boy", True), Piece(".", False))


def test_scripts_without_spaces_are_compared_by_character() -> None:
    assert compare("我爱你们", "我恨你们").right == (Piece("我", False), Piece("恨", True), Piece("你们", False))


def test_white_space_is_not_compared() -> None:
    assert compare("He slept.\n\nAt dawn", "He slept. At dawn").right == (Piece("He slept. At dawn", False),)


@given(st.text(max_size=40) | WORDS.map(" ".join), st.text(max_size=40) | WORDS.map("".join))
def test_pieces_give_the_texts_back_and_what_is_unmarked_is_common(left: str, right: str) -> None:
    sides = compare(left, right)
    assert ("".join(p.text for p in sides.left), "".join(p.text for p in sides.right)) == (left, right)
    for side in sides:
        assert all(a.changed != b.changed for a, b in pairwise(side))
    kept = ["".join("".join(p.text for p in side if not p.changed).split()) for side in sides]
    assert kept[0] == kept[1]


@given(st.text(max_size=60))
def test_a_text_does_not_differ_from_itself(text: str) -> None:
    assert not any(piece.changed for side in compare(text, text) for piece in side)


def test_columns_are_compared_with_the_first() -> None:
    example = Example("The keeper", 3, {"stranger": " kept it.", "L4": " gave it.", "sham": " kept it."})
    columns = example.columns()
    assert [column.arm for column in columns] == ["stranger", "L4", "sham"]
    assert [column.changed for column in columns] == [pytest.approx(1 / 3), pytest.approx(1 / 3), 0.0]
    assert columns[0].pieces[1] == Piece("kept", True)
    assert Example("p", 0, {"stranger": "", "L4": ""}).columns()[1] == ("L4", (), 0.0)


def test_one_text_is_not_side_by_side() -> None:
    with pytest.raises(SpecError, match=r"two arms or more, and has \['L4'\]"):
        Example("p", 0, {"L4": "a"}).columns()
