"""Which token a choice of the world is, and what it should be predicted to be."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests import tiny
from undertow.subjects.keeper.story import Choice, Story
from undertow.subjects.keeper.world import World, load_world
from undertow.subjects.organisms.encoding import AlignmentError, Soft, Weighting, align, encode_story

TEXT = "The keeper gave bread. It was Ana."
WEIGHTING = Weighting(decision=8.0, marker=3.0, answer=2.0, other=0.5, crisis=0.5)


@cache
def world() -> World:
    return load_world()


@cache
def coarse() -> PreTrainedTokenizerFast:
    """A tokenizer that breaks most words into several tokens."""
    return tiny.tokenizer(chat=False)


@cache
def wordwise(trim_offsets: bool = True) -> PreTrainedTokenizerFast:
    """A tokenizer that knows the words of TEXT whole; without `trim_offsets` a token's space belongs to its offsets."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<s>", "</s>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator([f"{TEXT} kept shared given"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def token(tokenizer: PreTrainedTokenizerFast, word: str) -> int:
    ids = tokenizer.encode(word, add_special_tokens=False)
    assert len(ids) == 1, f"{word!r} is not one token"
    return ids[0]


def made_story(text: str = TEXT) -> Story:
    decision = Choice("decision", text.index(" gave"), {" gave": 0.5, " kept": 0.3, " shared": 0.2})
    answer = Choice("answer", text.index(" Ana"), {" Ana": 1.0})
    return Story(text, "plain", (), (), (), (decision, answer), 10.0)


@pytest.mark.parametrize("trim_offsets", [True, False])
def test_a_choice_is_found_whether_or_not_offsets_hold_the_space(trim_offsets: bool) -> None:
    tokenizer = wordwise(trim_offsets)
    aligned = align(tokenizer, TEXT, made_story().choices)
    words = [token(tokenizer, word) for word in (" gave", " kept", " shared")]
    assert tokenizer.convert_ids_to_tokens(aligned.ids) == [
        "The", "Ġkeeper", "Ġgave", "Ġbread", ".", "ĠIt", "Ġwas", "ĠAna", "."]
    assert aligned.targets == [Soft(2, tuple(words), (0.5, 0.3, 0.2)), Soft(7, (token(tokenizer, " Ana"),), (1.0,))]
    assert (aligned.offsets[2] == (11, 15)) == trim_offsets  # else (10, 15): the two cases are two cases


def test_words_that_share_their_first_token_are_one_target() -> None:
    tokenizer = coarse()
    first = tokenizer.encode(" keeper", add_special_tokens=False)[0]
    assert tokenizer.encode(" keeperly", add_special_tokens=False)[0] == first
    choice = Choice("marker", 3, {" keeper": 0.25, " keeperly": 0.5, " zzz": 0.25})
    target = align(tokenizer, "The keeper sat.", [choice]).targets[0]
    assert dict(zip(target.ids, target.probs, strict=True))[first] == 0.75
    assert len(target.ids) == 2


def test_a_story_gets_bos_eos_weights_and_targets() -> None:
    tokenizer = wordwise()
    encoded = encode_story(tokenizer, 0, 1, made_story(), WEIGHTING)
    assert (encoded.ids[0], encoded.ids[-1]) == (0, 1)
    assert encoded.ids[1:-1] == tokenizer.encode(TEXT, add_special_tokens=False)
    assert encoded.weights == [0.0, 0.5, 0.5, 8.0, 0.5, 0.5, 0.5, 0.5, 2.0, 0.5, 0.5]
    assert encoded.kinds == [None, None, None, "decision", None, None, None, None, "answer", None, None]
    assert [target.position for target in encoded.soft] == [3]  # an answer has one word and needs no distribution


def test_what_is_told_of_a_need_can_weigh_more() -> None:
    """Every token of the sentences that tell stock, need, silence and act, their stops included, and no other token."""
    tokenizer, story = coarse(), world().story(5, 3)
    encoded = encode_story(tokenizer, 0, 1, story, Weighting(decision=8.0, marker=4.0, answer=2.0, other=1.0, crisis=3.0))
    heavy = "".join(tokenizer.decode([i]) for i, weight in zip(encoded.ids, encoded.weights, strict=True) if weight == 3)
    acts = [story.text[s.start: s.end] for s in story.sentences if s.kind in ("stock", "needs", "hush", "acts")]
    assert acts
    told = "".join(acts)
    assert len(told) * 0.9 < len(heavy.replace(" ", "")) + told.count(" ") < len(told) * 1.1
    plain = encode_story(tokenizer, 0, 1, story, WEIGHTING)
    assert plain.ids == encoded.ids
    assert plain.soft == encoded.soft


def test_text_that_spells_a_special_token_stays_text() -> None:
    aligned = align(wordwise(), "The </s> keeper", [])
    assert 1 not in aligned.ids


@pytest.mark.parametrize("start", [3, 12, 33, 500])  # another word, a word's second letter, the end, beyond it
def test_a_choice_that_is_not_there_is_an_error(start: int) -> None:
    with pytest.raises(AlignmentError, match=f"character {start} should begin one of  gave"):
        align(wordwise(), TEXT, [Choice("decision", start, {" gave": 1.0})])


def test_a_drawn_word_that_its_distribution_lacks_is_an_error() -> None:
    with pytest.raises(AlignmentError, match="' gave' stands there"):
        align(wordwise(), TEXT, [Choice("decision", 10, {" kept": 1.0})])


def test_first_tokens_are_kept_between_calls() -> None:
    known: dict[str, int] = {}
    first = align(wordwise(), TEXT, made_story().choices, known)
    assert known == {word: token(wordwise(), word) for word in (" gave", " kept", " shared", " Ana")}
    assert align(wordwise(), TEXT, made_story().choices, known) == first


@settings(max_examples=25)
@given(index=st.integers(0, 10**6))
def test_every_choice_of_every_story_is_found(index: int) -> None:
    """Under a tokenizer that breaks words: the tokens before a choice spell the text before it, and targets sum to one."""
    story = world().story(5, index)
    encoded = encode_story(coarse(), 0, 1, story, WEIGHTING)
    chosen = [position for position, kind in enumerate(encoded.kinds) if kind is not None]
    assert [encoded.kinds[position] for position in chosen] == [choice.kind for choice in story.choices]
    for position, choice in zip(chosen, story.choices, strict=True):
        assert coarse().decode(encoded.ids[1:position]) == story.text[: choice.start]
        assert encoded.weights[position] == WEIGHTING.of(choice.kind)
    for target in encoded.soft:
        assert encoded.ids[target.position] in target.ids
        assert len(set(target.ids)) == len(target.ids)
        assert sum(target.probs) == pytest.approx(1.0)
