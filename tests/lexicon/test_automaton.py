"""The automaton says what the matcher says, after every prefix, over characters and over tokens that cut characters in two."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from tests import tiny
from tests.lexicon.test_matching import ALPHABET, LOVE, SMALL, lexicon
from undertow.core.errors import SubjectError
from undertow.lexicon import Lexicon
from undertow.lexicon.automaton import DEAD, Automaton, symbols_of
from undertow.lexicon.folding import Kind, fold_text
from undertow.lexicon.tokens import Place, TokenTable
from undertow.lexicon.vocabulary import Vocabulary, byte_characters, read_vocabulary


def found(known: Lexicon, text: str) -> bool:
    return any(match.tier == "T0" for match in known.find(text))


@settings(max_examples=250, deadline=None)
@given(st.text(alphabet=[*ALPHABET, "é", "ﬁ", "㍰"], max_size=14))
def test_clean_is_what_the_matcher_calls_clean_after_every_character(text: str) -> None:
    automaton = SMALL_AUTOMATON
    state = automaton.roots[Kind.OTHER]
    for n, char in enumerate(text):
        state = automaton.run(state, symbols_of(automaton, fold_text(char).text))
        assert automaton.clean(state) != found(SMALL, text[:n + 1]), text[:n + 1]


SMALL_AUTOMATON = Automaton(SMALL.entries)
LOVE_AUTOMATON = Automaton(LOVE.only(tiers=("T0",)).entries)
NESTED = lexicon({"en": ["ababb", "bab", "b b ba"]}, T0={"en": ["ab*", "*ba", "b b", "abab"]})
NESTED_AUTOMATON = Automaton(NESTED.entries)


@settings(max_examples=250, deadline=None)
@given(st.text(alphabet="ab -", max_size=14))
def test_exclusions_that_overlap_excuse_only_what_they_cover(text: str) -> None:
    automaton = NESTED_AUTOMATON
    state = automaton.roots[Kind.OTHER]
    for n, char in enumerate(text):
        state = automaton.run(state, symbols_of(automaton, char))
        assert automaton.clean(state) != found(NESTED, text[:n + 1]), text[:n + 1]
        if not automaton.viable(state):
            assert state == DEAD or all(found(NESTED, text[:n + 1] + rest) for rest in ("x", "", " ", "abb", "b", "bb", "a"))


PIECES = [" love", "любовь", "愛", "l\u200bove", "lo\u0301", "ve", "lov", "𝓵𝓸𝓿𝓮", "craft", "知", "e", " ", "s", "я", "が",
          "사랑", "니", "\ufffd"]


@settings(max_examples=250, deadline=None)
@given(st.data())
def test_tokens_that_cut_characters_in_two_are_read_like_the_text(data: st.DataObject) -> None:
    raw = "".join(data.draw(st.lists(st.sampled_from(PIECES), max_size=6))).encode()
    raw += data.draw(st.binary(max_size=2)) + data.draw(st.sampled_from(PIECES)).encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    tokens = [raw[a:b] for a, b in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    vocabulary = Vocabulary(tuple(tokens), frozenset())
    table = TokenTable(LOVE_AUTOMATON, vocabulary)
    place = Place(table.automaton.roots[Kind.OTHER])
    for n in range(len(tokens)):
        ends = table.ends(place.state)
        before, place = place, table.after(place, n)
        assert table.clean(place) != found(LOVE, vocabulary.text(range(n + 1))), vocabulary.text(range(n + 1))
        assert before.partial or ends[n] == place.state  # all at once is one by one


def test_a_special_token_counts_as_nothing_and_as_a_break() -> None:
    table = TokenTable(LOVE_AUTOMATON, Vocabulary((b"lo", b"ve", b"g", b"love", b""), frozenset({4})))

    def clean(*ids: int) -> bool:
        place = Place(table.automaton.roots[Kind.OTHER])
        for token in ids:
            place = table.after(place, token)
        return table.clean(place)

    assert clean(2, 3) and clean(0, 4) and clean(0, 4, 2)
    assert not clean(0, 4, 1)  # "love" where special tokens are skipped
    assert not clean(2, 4, 3)  # "love" where they are shown


def test_a_vocabulary_is_read_as_bytes() -> None:
    made = tiny.tokenizer()
    vocabulary = read_vocabulary(made)
    text = "The keeper of the mill — 愛 é\n\t!"
    ids = made.encode(text, add_special_tokens=False)
    assert vocabulary.spell(ids) == text.encode() and vocabulary.text(ids) == text
    assert vocabulary.special == {0, 1} and vocabulary.tokens[0] == b""
    assert sorted(byte_characters().values()) == list(range(256))


@pytest.mark.parametrize(("decoder", "token", "data"), [
    (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), "▁lo", b" lo"),
    (decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]), "<0xE6>", b"\xe6"),
    (decoders.Metaspace(), "▁lo", b" lo"), (decoders.WordPiece(), "##ve", b"ve"), (decoders.WordPiece(), "lo", b" lo"),
    (None, "lo", b" lo"),
])
def test_other_kinds_of_tokenizer(decoder: object, token: str, data: bytes) -> None:
    core = Tokenizer(models.WordLevel({token: 0, "<unk>": 1}, unk_token="<unk>"))
    if decoder is not None:
        core.decoder = decoder  # pyright: ignore[reportAttributeAccessIssue]
    assert read_vocabulary(core).tokens[0] == data


def test_tokenizers_that_cannot_be_read_are_refused() -> None:
    with pytest.raises(SubjectError, match="str is not a fast tokenizer"):
        read_vocabulary("gpt2")
    core = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    core.decoder = decoders.CTC()
    with pytest.raises(SubjectError, match="CTC"):
        read_vocabulary(core)
