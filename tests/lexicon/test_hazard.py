"""Hazard against numbers by hand, and against the enumeration of every text that a toy model can write."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from tests.lexicon.test_matching import lexicon
from undertow.core.errors import NumericsError
from undertow.lexicon import Lexicon
from undertow.lexicon.folding import Kind
from undertow.lexicon.hazard import Continuation, hazard_bound, hazard_exact
from undertow.lexicon.trie import TokenTrie
from undertow.lexicon.vocabulary import Vocabulary

LOVE = lexicon(T0={"en": ["love", "loves"]})


def vocabulary(*tokens: str | bytes) -> Vocabulary:
    """These tokens, then one special token that ends the text."""
    return Vocabulary(tuple(t.encode() if isinstance(t, str) else t for t in (*tokens, b"")), frozenset({len(tokens)}))


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities]).log()


def test_by_hand() -> None:
    """Four ways to say it: " love" + "." or end, " love" + "s" + end, " lo" + "ve" + end, and "love." at once."""
    words = vocabulary(" love", " lo", "ve", "s", ".", "craft", "love.")
    trie = TokenTrie(words, LOVE)
    first = logs(.3, .2, .1, .05, .05, .1, .1, .1)
    after = {(0,): logs(0, 0, .1, .2, .3, .3, 0, .1), (1,): logs(0, 0, .4, .3, .1, .1, 0, .1),
             (1, 2): logs(0, 0, 0, 0, .5, .4, 0, .1), (0, 3): logs(0, 0, 0, 0, .25, .5, 0, .25)}

    def next_logits(asked: list[Continuation]) -> torch.Tensor:
        return torch.cat([after[one.tokens] for one in asked])

    exact = hazard_exact(first, [Kind.OTHER], trie, next_logits, tolerance=0)
    expected = .1 + .3 * (.3 + .1) + .3 * .2 * (.25 + .25) + .2 * .4 * (.5 + .1)
    assert exact.value.item() == pytest.approx(expected, abs=1e-6) and exact.slack.item() == 0
    assert exact.expanded == 4
    assert hazard_bound(first, [Kind.OTHER], trie).item() == pytest.approx(.3 + .2 + .1)
    inside = hazard_exact(first, [Kind.ALPHABETIC], trie, next_logits, tolerance=0)  # "g" + "love." holds no form
    assert inside.value.item() == pytest.approx(expected - .1, abs=1e-6)


def test_tokens_without_a_logit_cannot_come() -> None:
    """" lo", "ve" and the end have no logit: only " love" is left, which ends before a blank or a full stop."""
    words = vocabulary(" love", ".", "craft", " lo", "ve")
    trie = TokenTrie(words, LOVE)
    exact = hazard_exact(logs(.4, .3, .3), [Kind.OTHER], trie, lambda asked: torch.cat([logs(.2, .3, .5)] * len(asked)),
                         tolerance=0)
    assert exact.value.item() == pytest.approx(.4 * (.2 + .3), abs=1e-6)
    assert hazard_bound(logs(.4, .3, .3), [Kind.OTHER], trie).item() == pytest.approx(.4)


def enumerate_mass(words: Vocabulary, known: Lexicon, prefix: str, rows: torch.Tensor, depth: int) -> float:
    """Probability that a form starts inside the first token, over every text of at most `depth` tokens."""
    end = len(words.tokens) - 1
    total = 0.0

    def judge(ids: Sequence[int], mass: float) -> None:
        nonlocal total
        head = len((prefix.encode() + words.tokens[ids[0]]).decode("utf-8", "ignore"))
        begun = len(words.tokens[ids[0]].decode("utf-8", "ignore").encode()) < len(words.tokens[ids[0]])
        found = known.find(prefix + words.text(ids))
        if any(len(prefix) <= m.start < head + begun for m in found if m.tier == "T0"):
            total += mass

    def grow(ids: list[int], mass: float) -> None:
        for token, share in enumerate(rows[ids[-1] if ids else end].tolist()):
            here = [*ids, token]
            if token == end or len(here) == depth:
                judge(here, mass * share)
            else:
                grow(here, mass * share)

    grow([], 1.0)
    return total


CASES = [
    (vocabulary("a", "b", "ab", " ab", "-x"), lexicon(T0={"en": ["ab"]}), 5),
    (vocabulary("a", "b", "ba", " "), lexicon({"en": ["abba", "b ab"]}, T0={"en": ["ab*", "a b"]}), 6),
    (vocabulary(b"\xe6\x84", b"\x9b", "愛", "a", b"\x9bb"), lexicon({"ja": ["愛a"]}, T0={"ja": ["愛"], "en": ["ab"]}), 5),
]


@pytest.mark.parametrize(("words", "known", "depth"), CASES)
@pytest.mark.parametrize("prefix", ["", "a", "-"])
def test_against_every_text_of_a_toy_model(words: Vocabulary, known: Lexicon, depth: int, prefix: str) -> None:
    """Next tokens depend on the last one. The last token of the deepest texts counts as followed by the end of the text."""
    size = len(words.tokens)
    rows = (2 * torch.randn(size, size, generator=torch.Generator().manual_seed(depth), dtype=torch.float64)).softmax(-1)
    trie = TokenTrie(words, known)
    context = Kind.ALPHABETIC if prefix == "a" else Kind.OTHER

    def next_logits(asked: list[Continuation]) -> torch.Tensor:
        ended = torch.full((size,), -math.inf, dtype=torch.float64)
        ended[-1] = 0
        return torch.stack([ended if len(one.tokens) == depth else rows[one.tokens[-1]].log() for one in asked])

    logits = rows[-1:].log()
    exact = hazard_exact(logits, [context], trie, next_logits, tolerance=0, depth=depth + 2)
    truth = enumerate_mass(words, known, prefix, rows, depth)
    assert 0 <= truth < 1 and exact.slack.item() == 0
    assert truth > 0 or (prefix == "a" and b"ba" in words.tokens)  # there no token may start a form
    assert exact.value.item() == pytest.approx(truth, abs=1e-5)
    bound = hazard_bound(logits, [context], trie).item()
    assert truth <= bound + 1e-6
    loose = hazard_exact(logits, [context], trie, next_logits, tolerance=.05, depth=depth + 2)
    assert loose.value.item() <= truth + 1e-6 <= loose.value.item() + loose.slack.item() + 2e-6
    assert loose.slack.item() <= .05 and loose.expanded <= exact.expanded
    share = hazard_exact(logits, [context], trie, next_logits, tolerance=0, depth=depth + 2, relative=.2)
    assert share.value.item() <= truth + 1e-6 <= share.value.item() + share.slack.item() + 2e-6
    assert share.slack.item() <= .2 * share.value.item() + 1e-9
    cut = hazard_exact(logits, [context], trie, next_logits, tolerance=0, depth=1)
    assert cut.value.item() + cut.slack.item() == pytest.approx(bound, abs=1e-5)


def test_rows_share_what_need_not_be_followed() -> None:
    """Of all rows' branches the smallest are left: a row with much mass is followed, and pays for none that has little."""
    words = vocabulary("love", "lo", "ve", "x")
    logits = torch.tensor([[.1, .4, .4, .1], [.1, .02, .4, .48], [.1, .01, .4, .49]]).log()
    asked: list[Continuation] = []

    def next_logits(continuations: list[Continuation]) -> torch.Tensor:
        asked.extend(continuations)
        return torch.tensor([[.1, .1, .5, .3]] * len(continuations)).log()

    found = hazard_exact(logits, [Kind.OTHER] * 3, TokenTrie(words, LOVE), next_logits, tolerance=.021)
    assert {one.row for one in asked if one.tokens == (1,)} == {0}  # "lo": half of 3 × .021 may be left, .02 and .01 are
    assert {one.row for one in asked if one.tokens == (0,)} == {0, 1, 2}
    assert found.slack[1:].tolist() == pytest.approx([.02, .01]) and found.slack.mean().item() <= .021


def test_canonical_spellings_are_a_part_of_all() -> None:
    words = vocabulary(" love", " lo", "ve", "s", ".")
    canonical = {" love": [0], "love": [1, 2], " loves": [0, 3], "loves": [1, 2, 3]}
    trie = TokenTrie(words, LOVE, lambda text: canonical.get(text, [4]))
    assert trie.first(Kind.OTHER).pending.tolist() == [0, 1]
    node = trie.edges(int(trie.first(Kind.OTHER).nodes[0]))
    assert node.pending.tolist() == [3] and node.hit.tolist() == [True, True, False, False, True, True]
    odd = TokenTrie(words, LOVE, lambda text: canonical[" love"])
    assert odd.first(Kind.OTHER).pending.tolist() == [0]


def test_contexts() -> None:
    trie = TokenTrie(vocabulary("a", ".", "\u200b", b"\xe6", "사"), LOVE)
    assert trie.contexts([2, 0, 2, 1, 0, 3, 4, 5, 99]) == [Kind.OTHER, Kind.ALPHABETIC, Kind.ALPHABETIC, Kind.OTHER,
                                                          Kind.ALPHABETIC, Kind.OTHER, Kind.HANGUL, Kind.OTHER, Kind.OTHER]


def test_many_positions_and_a_vocabulary_that_the_model_pads() -> None:
    trie = TokenTrie(vocabulary(" love", "a"), LOVE)
    logits = torch.zeros(2, 3, 8)
    contexts = [Kind.OTHER, Kind.ALPHABETIC] * 3
    bound = hazard_bound(logits, contexts, trie)
    assert bound.shape == (2, 3) and torch.allclose(bound, torch.full((2, 3), 1 / 8))
    with pytest.raises(NumericsError, match="NaN"):
        hazard_bound(logits * torch.nan, contexts, trie)
