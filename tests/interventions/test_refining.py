"""Refining: exact gradients, steps that keep their bounds, and more of the act at the same change of text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from features.balance import balance
from features.carried import Levels
from features.codes import dictionary_digest
from interventions import refining
from interventions.applying import FeatureSurgery
from interventions.recall import Recall
from interventions.refining import LiftedFloors, Lifting, refined, step
from interventions.tune import Bench, Trial, answers, floors, judged, largest_dose, sameness
from sae.dictionary import LinearDictionary
from tests.features.planted import D_SAE
from tests.interventions import benches
from tests.interventions.benches import ACTS, KNOWN, LOOSE, at

POOL = (0, 2, 3, 5)
GATED = at((0, 2), 0.8)._replace(trigger=(1, 4), at_least=2, within=4)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return benches.bench()


def learnt(bench: Bench) -> Bench:
    """Judged on what is learnt from."""
    questions, texts, untouched = bench.lessons
    return bench._replace(questions=questions, texts=texts, untouched=untouched)


def silent(bench: Bench) -> Bench:
    """The same latents with nothing active, so that small floors act."""
    made = bench.dictionary
    assert isinstance(made, LinearDictionary)
    quiet = LinearDictionary(made.W_enc, torch.full_like(made.b_enc, -1e4), made.W_dec, made.b_dec, made.activation,
                             made.provenance)
    return bench._replace(recall=Recall(quiet), place=bench.place | {"sae": dictionary_digest(quiet)},
                          known=Levels(np.ones(D_SAE), np.full(D_SAE, 0.5)))


@pytest.mark.parametrize("trial", [at((0, 2), 0.8), GATED])
def test_the_edit_is_the_recipe(bench: Bench, trial: Trial) -> None:
    recipe = floors(bench, trial)
    x = torch.randn(2, 9, bench.subject.d_model, generator=torch.Generator().manual_seed(3))
    editable = torch.ones(2, 9, dtype=torch.bool)
    editable[0, :3] = False
    unit = torch.tensor(KNOWN.high[[0, 2]]).float()
    lifted = LiftedFloors(bench.recall, trial.latents, torch.full((2,), trial.dose), unit, recipe.trigger)(x, editable)
    wanted = FeatureSurgery(bench.dictionary, recipe.edits, recipe.trigger)(x, editable)
    assert torch.equal(lifted.fired, wanted.fired)
    torch.testing.assert_close(lifted.delta, wanted.delta, atol=1e-4, rtol=1e-5)
    assert bool((wanted.delta != 0).any())


@pytest.mark.parametrize("trial", [at((0, 2), 0.8), GATED])
def test_values_are_those_by_which_a_trial_is_judged(bench: Bench, trial: Trial) -> None:
    lifting, weights = Lifting(bench, trial, trial.latents), np.full(2, trial.dose)
    assert lifting.rise(weights, "give").value == pytest.approx(judged(learnt(bench), trial, ACTS).acts, abs=1e-5)
    found, wanted = lifting.change(weights, 0.1), sameness(learnt(bench), floors(bench, trial))
    assert (found.mean, found.p99, found.p99_high) == pytest.approx(wanted, rel=1e-3)


def test_gradients_are_those_of_small_differences(bench: Bench) -> None:
    lifting, weights = Lifting(bench, at((0,), 1.0), POOL), np.array([1.1, 0.9, 0.0, 1.3])
    rise, change = lifting.rise(weights, "give").gradient, lifting.change(weights, 0.1).mean_gradient
    small = 2e-2
    for i in (0, 1, 3):  # at a floor of 0, below where latents stand, nothing moves
        up, down = weights.copy(), weights.copy()
        up[i], down[i] = up[i] + small, down[i] - small
        slope = (lifting.rise(up, "give").value - lifting.rise(down, "give").value) / (2 * small)
        assert rise[i] == pytest.approx(slope, rel=0.05, abs=1e-8)
        slope = (lifting.change(up, 0.1).mean - lifting.change(down, 0.1).mean) / (2 * small)
        assert change[i] == pytest.approx(slope, rel=0.05, abs=1e-6)
    assert rise[2] == change[2] == 0.0
    assert np.abs(rise).max() > 1e-6


def test_the_gradient_of_the_percentile_is_that_of_the_tokens_near_it(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near none of the tokens it is nothing, near all of them that of the mean, near some another."""
    lifting, weights = Lifting(bench, at((0,), 1.0), POOL), np.array([1.1, 0.9, 1.0, 1.3])
    far = lifting.change(weights, 1e9)
    assert far.p99_gradient.tolist() == [0.0] * 4
    assert lifting.change(weights, far.p99).p99_gradient != pytest.approx(far.mean_gradient, rel=0.05)
    monkeypatch.setattr(refining, "_NEAR", 1e9)
    assert lifting.change(weights, far.p99).p99_gradient == pytest.approx(far.mean_gradient, rel=1e-4)


def test_a_step_by_hand() -> None:
    """Gain along the first axis alone, in a unit metric: the step is the radius, unless a bound or 0 ends it before."""
    weights, gain, eye = np.array([1.0, 1.0]), np.array([1.0, 0.0]), np.eye(2)
    assert step(weights, gain, [], eye, 0.5) == pytest.approx([1 + 0.5 * np.sqrt(2), 1.0], abs=1e-4)
    assert step(weights, gain, [(np.array([1.0, 0.0]), 0.1)], eye, 0.5) == pytest.approx([1.1, 1.0], abs=1e-4)
    assert step(weights, -gain, [], eye, 10.0)[0] == 0.0
    both = step(weights, np.array([1.0, 1.0]), [(np.array([0.0, 1.0]), 0.0)], eye, 0.5)  # the second may not grow
    assert both[1] <= 1.0 + 1e-6 and both[0] > 1.5


WEIGHTS = arrays(float, 4, elements=st.floats(0.1, 2.0))
SLOPES = arrays(float, 4, elements=st.floats(-3.0, 3.0))


@given(WEIGHTS, SLOPES, arrays(float, 4, elements=st.floats(0.0, 3.0)), st.floats(-0.2, 0.5), st.integers(0, 99))
def test_a_step_keeps_its_bounds(weights: np.ndarray, gain: np.ndarray, cost: np.ndarray, room: float, seed: int) -> None:
    root = np.random.default_rng(seed).normal(size=(4, 4))
    information, radius = root @ root.T + np.eye(4), 0.25
    to = step(weights, gain, [(cost, room)], information, radius)
    delta = to - weights
    assert (to >= 0).all()
    assert delta @ information @ delta <= radius ** 2 * (weights @ information @ weights) * (1 + 1e-3)
    assert cost @ delta <= max(room, -radius / 2 * (cost @ weights)) + 1e-3 * (1 + np.abs(cost).sum())
    if room >= 0:
        assert gain @ delta >= -1e-6  # standing still is allowed


def test_refining_does_more_at_the_same_limits(bench: Bench) -> None:
    """From latents that were not chosen, at their largest dose: on what it learns from, the act is likelier afterwards."""
    own, spec = silent(learnt(bench)), LOOSE.model_copy(update={"kl_mean": 0.02, "kl_p99": 0.2, "size": 4, "pool": 12})
    made = balance(own.dictionary, own.slopes, list(range(12)), own.known)
    start = largest_dose(own, at((1, 4, 9), 1.0), spec)
    assert start is not None
    after = refined(own, made, start, "give", spec)
    assert 0 < len(after.latents) <= 4 and max(after.weights) == 1.0
    assert (after.trigger, after.at_least, after.within) == (start.trigger, start.at_least, start.within)
    dosed = largest_dose(own, after, spec)
    assert dosed is not None
    plain = float(np.mean([np.exp(answer.log_mass["give"]) for answer in answers(own, None, own.questions)]))
    assert judged(own, dosed, ACTS).acts - plain > 1.5 * (judged(own, start, ACTS).acts - plain)


def test_nothing_is_left_behind(bench: Bench) -> None:
    before = {name: set(vars(module)) for name, module in bench.subject.hf_model.named_modules()}
    plain = bench.subject.hf_model(input_ids=torch.tensor([bench.texts[0]])).logits
    lifting = Lifting(bench, GATED, POOL)
    lifting.rise(np.ones(4), "give")
    lifting.change(np.ones(4), 0.1)
    assert {name: set(vars(module)) for name, module in bench.subject.hf_model.named_modules()} == before
    assert torch.equal(bench.subject.hf_model(input_ids=torch.tensor([bench.texts[0]])).logits, plain)
