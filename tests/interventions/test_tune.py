"""Tuning: the dose is the largest within the limits, a set is judged off its own words, and a hopeless pool gives nothing."""

from __future__ import annotations

import numpy as np
import pytest

from features.codes import dictionary_digest
from interventions.tune import DOSES, Bench, TuneSpec, floors, judged, largest_dose, response, same, sameness
from tests.features.planted import D_SAE
from tests.interventions import benches
from tests.interventions.benches import ACTS, KNOWN, LOOSE, at


@pytest.fixture(scope="module")
def bench() -> Bench:
    return benches.bench()


def test_floors_stand_at_the_dose_times_what_is_typical(bench: Bench) -> None:
    recipe = floors(bench, at((3, 5), 0.5), "before_decision")
    assert [(edit.latent, edit.operator.value) for edit in recipe.edits] == [  # pyright: ignore[reportAttributeAccessIssue]
        (3, pytest.approx(0.5 * KNOWN.high[3], abs=1e-6)), (5, pytest.approx(0.5 * KNOWN.high[5], abs=1e-6))]
    assert (recipe.window, recipe.sae, recipe.trigger) == ("before_decision", dictionary_digest(bench.dictionary), None)
    triggered = floors(bench, at((3,), 1.0)._replace(trigger=(1, 2), at_least=2, within=9)).trigger
    assert triggered is not None
    assert (triggered.latents, triggered.at_least, triggered.within) == ((1, 2), 2, 9)


def test_the_dose_is_the_largest_within_the_limit(bench: Bench) -> None:
    curve = {dose: sameness(bench, floors(bench, at((0,), dose))).mean for dose in DOSES}
    assert curve[DOSES[-1]] > curve[DOSES[50]] > 0
    limit = curve[DOSES[50]] * 1.0001
    best = largest_dose(bench, at((0,), 1.0), TuneSpec(kl_mean=limit, kl_p99=10.0))
    assert best is not None
    assert best.dose == max(dose for dose, kl in curve.items() if kl <= limit)
    assert best.kl_mean == pytest.approx(curve[best.dose])


def test_a_limit_below_every_dose_gives_nothing(bench: Bench) -> None:
    """Latents that stand below their level at every dose: the smallest dose is already too much."""
    low = bench._replace(known=KNOWN._replace(high=np.full(D_SAE, 600.0)))
    hopeless = LOOSE.model_copy(update={"kl_mean": 1e-12, "kl_p99": 1e-12})
    assert largest_dose(low, at((0,), 1.0), hopeless) is None


def test_the_response_is_measured_at_the_doses_that_were_asked_for(bench: Bench) -> None:
    chosen = judged(bench, at((0, 2), 1.5), ACTS)
    low, again = response(bench, chosen, ACTS, (0.5, 1.0))
    assert low.dose == 0.5 * chosen.dose
    assert low.kl_mean < again.kl_mean
    assert (again.d, again.acts) == pytest.approx((chosen.d, chosen.acts))
    assert sameness(bench, floors(bench, again))[:2] == (again.kl_mean, again.kl_p99)


def test_weights_are_parts_of_the_dose(bench: Bench) -> None:
    recipe = floors(bench, at((3, 5), 0.5)._replace(weights=(1.0, 0.25)))
    assert [edit.operator.value for edit in recipe.edits] == pytest.approx(  # pyright: ignore[reportAttributeAccessIssue]
        [0.5 * KNOWN.high[3], 0.125 * KNOWN.high[5]], abs=1e-6)


def test_the_bound_of_the_percentile_is_above_it_unless_all_texts_are_alike() -> None:
    alike = [np.linspace(0.0, 1.0, 101)] * 5
    percentile = np.quantile(np.concatenate(alike), 0.99)
    assert same(alike) == pytest.approx((0.5, percentile, percentile))
    quiet, loud = [np.zeros(100)] * 9, np.linspace(0.0, 1.0, 100)
    found = same([*quiet, loud])
    assert found.mean == pytest.approx(0.05)
    assert found.p99_high > found.p99


def test_other_texts_are_seldom_beyond_the_bound() -> None:
    """In 100 pairs of samples; of the percentile itself half are beyond it."""
    draw = np.random.default_rng(1)

    def texts() -> list[np.ndarray]:
        return [draw.lognormal(-4, 1, 40) * draw.lognormal(0, 0.3) for _ in range(60)]

    beyond = np.zeros(2)
    for _ in range(100):
        found, other = same(texts()), np.quantile(np.concatenate(texts()), 0.99)
        beyond += other > found.p99_high, other > found.p99
    assert beyond[0] <= 12 and beyond[1] >= 30  # 2.5 are expected, and some more for the bootstrap of a tail
