"""How much of which latent: hand-computed optima, a brute-force search as reference, and what is not worth its price."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from features.balance import NEAR, Balance, Firings, Slopes, balance, balanced, drawn_slopes, trigger_of, weights_of
from features.carried import Levels, Slope, decision_slopes
from sae.dictionary import LinearDictionary, Provenance, ReLU
from tests.features.planted import D_SAE, planted
from undertow.subjects.splicing import Memory


def of(gain: Sequence[Sequence[float]], harm: Sequence[Sequence[float]], fires: Sequence[Sequence[int]] = (),
       fires_ordinary: Sequence[Sequence[int]] = (), word: Sequence[Sequence[float]] = ()) -> Balance:
    """Every token of the situations is a situation of its own; ordinary text is one text."""

    def firings(given: Sequence[Sequence[int]], n: int, one_text: bool) -> Firings:
        return Firings(csr_matrix(np.array(given if len(given) else np.zeros((n, 3)), dtype=float)),
                       (n,) if one_text else (1,) * n)

    return Balance(tuple(range(10, 10 + len(gain[0]))), np.array(gain, dtype=float), np.array(harm, dtype=float),
                   np.array(word if len(word) else np.zeros_like(gain), dtype=float),
                   firings(fires, len(gain), False), firings(fires_ordinary, len(harm), True))


def fitted(made: Balance, most: int, acts: Sequence[bool] = ()) -> np.ndarray:
    return weights_of(made, np.array(acts) if len(acts) else np.ones(len(made.gain), dtype=bool), most)


def test_weights_are_gain_over_harm_where_latents_do_not_share_it() -> None:
    """H ∝ diag(4, 1): w ∝ (2/4, 1.25/1) = (0.4, 1), although the first moves the decision more. w·G is 0.8 against 1.25."""
    made = of([[2, 1.25]], [[2, 0], [0, 1]])
    assert fitted(made, 2) == pytest.approx([0.4, 1.0])
    assert balanced(made, 9.0, Memory(1, 1), 1)[:2] == ((11,), (1.0,))


def test_a_latent_that_moves_the_decision_the_wrong_way_is_left_out() -> None:
    assert list(fitted(of([[1, -1]], [[1, 0], [0, 1]]), 2)) == [1.0, 0.0]
    assert not fitted(of([[-1, -1]], [[1, 0], [0, 1]]), 2).any()


def test_a_latent_that_raises_the_word_is_taken_with_one_that_lowers_it() -> None:
    """Alone the first would do: it moves the decision most. But it raises the word, and the second lowers it as much."""
    gain, harm = [[3, 1, 1]], np.eye(3).tolist()
    plain = fitted(of(gain, harm), 3)
    assert plain == pytest.approx([1, 1 / 3, 1 / 3])
    held = fitted(of(gain, harm, word=[[1, -1, 0]]), 3)
    assert held[0] - held[1] < 0.5 * (plain[0] - plain[1])
    assert held[2] < held[1]
    assert fitted(of(gain, harm, word=[[1, 0, 0]]), 3)[0] < 1  # with nothing to lower it, it is held back


def test_the_word_counts_where_the_operation_acts() -> None:
    """The first latent raises the word at a token at which the gate is shut."""
    made = of([[3, 1, 1], [0, 0, 0]], np.eye(3).tolist(), word=[[0, 0, 0], [5, 0, 0]])
    assert fitted(made, 3, [True, False]) == pytest.approx([1, 1 / 3, 1 / 3])
    assert fitted(made, 3, [True, True])[1] > 0.5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_no_other_weights_move_the_decision_more_at_the_same_cost(seed: int) -> None:
    rng = np.random.default_rng(seed)
    made = of(rng.normal(0.5, 1, (5, 4)).tolist(), rng.normal(0, 1, (40, 4)).tolist())
    gain = made.gain.sum(axis=0)
    cost = made.harm.T @ made.harm
    cost += 0.02 * np.diag(np.diag(cost))
    found = fitted(made, 4)

    def worth(w: np.ndarray) -> np.ndarray:
        return w @ gain / np.sqrt(np.einsum("...i,ij,...j", w, cost, w))

    others = np.abs(rng.normal(0, 1, (4_000, 4))) * (rng.random((4_000, 4)) < 0.6) + 1e-9
    if found.any():
        assert worth(others).max() <= worth(found) * (1 + 1e-6)
    else:
        assert (gain <= 0).all()


def test_weights_are_those_of_the_tokens_at_which_it_acts() -> None:
    """At the second token only the second candidate has any effect."""
    made = of([[5, 0], [0, 1]], [[1, 0], [0, 1]])
    assert list(fitted(made, 2, [False, True])) == [0.0, 1.0]
    assert list(fitted(made, 2)) == [1.0, 0.2]


def test_a_trigger_is_where_the_situation_is_and_ordinary_text_is_not() -> None:
    """Latent 2 fires in one situation of three and never on ordinary text; latent 1 in two and on half of ordinary text."""
    made = of([[0], [0], [1]], [[1], [1]], fires=[[1, 0, 0], [0, 1, 0], [0, 1, 1]], fires_ordinary=[[1, 0, 0], [0, 1, 0]])
    one = np.ones(1)
    assert trigger_of(made, one, 0.0, 32)[0] == 1
    assert trigger_of(made, one, 0.9, 32) == (2, 1) or trigger_of(made, one, 0.9, 32) == (2,)
    assert trigger_of(made, one, 2.0, 32) == (2,)
    assert len(trigger_of(made, one, 0.0, 32)) > 1 == len(trigger_of(made, one, 0.0, 1))
    everywhere = made._replace(fires_ordinary=made.fires_ordinary._replace(fires=csr_matrix(np.ones((2, 3)))))
    assert trigger_of(everywhere, one, 1.5, 32) == ()
    assert trigger_of(made, -one, 0.0, 32) == ()  # nothing is won anywhere


def test_only_the_end_of_a_situation_is_looked_at() -> None:
    """Latent 0 fires early in a long text, latent 1 on its last token."""
    fires = np.zeros((NEAR + 2, 2))
    fires[:2, 0] = fires[-1, 1] = 1
    made = of([[1.0]] * (NEAR + 2), [[1.0]], fires_ordinary=[[0, 0]])
    made = made._replace(fires=Firings(csr_matrix(fires), (NEAR + 2,)))
    assert trigger_of(made, np.ones(1), 0.0, 32) == (1,)


def test_tokens_that_change_much_cost_more_than_others() -> None:
    """Both latents fire in one situation of two and on half of ordinary text; all of the change is where latent 0 fires."""
    made = of([[1], [1]], [[1], [0]], fires=[[1, 0, 0], [0, 1, 0]], fires_ordinary=[[1, 0, 0], [0, 1, 0]])
    assert trigger_of(made, np.ones(1), 0.9, 32) == (1,)


def test_a_gate_opens_by_what_fired_before_in_the_same_text() -> None:
    """Texts of 3 and 2 tokens: what fired in the first opens nothing in the second."""
    firings = Firings(csr_matrix(np.array([[1, 0], [0, 0], [0, 0], [0, 0], [0, 1]], dtype=float)), (3, 2))
    assert firings.opened((0,), Memory(1, 2)).tolist() == [True, True, False, False, False]
    assert firings.opened((0, 1), Memory(1, 1)).tolist() == [True, False, False, False, True]
    assert firings.opened((), Memory(2, 2)).all()
    made = of([[1.0], [1.0]], [[1.0]] * 5, fires=[[1, 0], [1, 0]])._replace(fires_ordinary=firings)
    found = balanced(made, 0.5, Memory(1, 2), 1)
    assert (found.trigger, found.open_share) == ((0,), pytest.approx(0.4))


def test_effects_are_room_times_direction_times_gradient() -> None:
    """One token, latents 0 and 1 of an identity SAE: (0.8 − 0.5)·2 and (0.8 − 0)·3."""
    sae = LinearDictionary(torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3), ReLU(), Provenance("", "", 8, True))
    slope = Slope(torch.tensor([[0.5, 0.0, 0.9]]), torch.tensor([[2.0, 3.0, 4.0]]))
    made = balance(sae, Slopes([slope], [slope, slope], [slope]), [0, 1, 2], Levels(np.ones(3), np.full(3, 0.8)))
    assert made.gain == pytest.approx(np.array([[0.6, 2.4, 0.0]]))
    assert made.harm == pytest.approx(np.repeat(made.gain, 2, axis=0))
    assert made.word == pytest.approx(made.gain)
    assert made.fires.fires.toarray().tolist() == [[1, 0, 1]]
    assert (made.fires.lengths, made.fires_ordinary.lengths) == ((1,), (1, 1))


def test_harm_is_the_second_order_of_the_measured_change() -> None:
    """½(wᵀHw) from many draws against the KL of a small addition at one token, on a model that runs."""
    from interventions.applying import apply_direction
    from interventions.audit import kl_after, logits_after
    from undertow.subjects.splicing import Window

    made = planted()
    row = made.subject.encode(made.pairs[0].negative.prompt)[:12]
    direction = made.dictionary.directions(torch.tensor([3]))[0].float()
    slopes = drawn_slopes(made.subject, made.site, [row], 7, draws=400)
    at, step = 4, 0.02
    predicted = 0.5 * step ** 2 * float(np.mean([float(slope.gradient[at] @ direction) ** 2 for slope in slopes]))
    base = logits_after(made.subject, [row])
    with apply_direction(made.subject, made.site, direction, step, window=Window(at + 1, at + 2)) as operated:
        measured = float(kl_after(base, logits_after(operated.subject, [row])).sum())
    assert measured > 0
    assert predicted == pytest.approx(measured, rel=0.35)  # 400 draws of a square


def test_drawn_tokens_are_a_function_of_the_seed() -> None:
    made = planted()
    row = made.subject.encode(made.pairs[0].negative.prompt)
    one, same, other = (drawn_slopes(made.subject, made.site, [row], seed, draws=1)[0].gradient for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert len(decision_slopes(made.subject, made.site, [made.pairs[0].negative])[0].x) == len(one)
    assert D_SAE > 3
