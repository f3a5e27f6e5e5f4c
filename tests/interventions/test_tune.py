"""Tuning: the dose is the largest within the limits, a set is judged off its own words, and a hopeless pool gives nothing."""

from __future__ import annotations

import numpy as np
import pytest

from features.codes import dictionary_digest
from interventions.audit import logits_after
from interventions.recipe import Recipe
from interventions.tune import DOSES, Bench, Same, TuneSpec, floors, judged, largest_dose, opened, response, same, sameness
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


def test_a_bench_without_the_texts_that_a_gate_leaves_alone_says_the_same(bench: Bench) -> None:
    """Of gates that open in some texts and not in others; one that looks at latents which never fire opens in none."""
    texts = [bench.subject.encode(text) for text in ("At the mill nobody spoke.", *(f"The {w} went on for a while." for w in (
        "rain", "wind", "lamp")), "No.", "A boat.")]
    own = bench._replace(texts=texts, untouched=logits_after(bench.subject, texts))
    rates = []
    for latents, at_least, within in (((0,), 1, 1), ((0, 1), 2, 4), ((2, 3), 3, 6), ((4, 5), 6, 8)):
        trial = at((0, 2), 2.0)._replace(trigger=latents, at_least=at_least, within=within)
        moved = opened(own, trial, texts)
        rates.append(len(moved))
        whole, fewer = (sameness(of, floors(bench, trial)) for of in (own, own._replace(moved=moved)))
        assert fewer == pytest.approx(whole, rel=1e-4, abs=1e-9)
    assert opened(own, at((0,), 1.0), texts) == tuple(range(len(texts)))  # no gate: everywhere
    assert min(rates) < len(texts), rates


def test_the_search_for_a_dose_takes_few_looks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where KL grows in another way than as the dose squared, and jumps."""
    for power, jump in ((0.7, 0.0), (2.0, 0.0), (6.0, 0.0), (2.0, 5.0), (12.0, 0.0)):
        looks: list[float] = []

        def made_up(_: Bench, recipe: Recipe, power: float = power, jump: float = jump, looks: list[float] = looks) -> Same:
            dose = recipe.edits[0].operator.value / KNOWN.high[0]  # pyright: ignore[reportAttributeAccessIssue]
            looks.append(dose)
            kl = dose ** power * (1 + jump * (dose > 0.7))
            return Same(kl, kl, kl)

        monkeypatch.setattr("interventions.tune.sameness", made_up)
        for limit in (0.3, 0.9, 2.0):
            looks.clear()
            best = largest_dose(bench, at((0,), 1.0), TuneSpec(kl_mean=limit, kl_p99=10.0 * limit))
            within = [dose for dose in DOSES if dose ** power * (1 + jump * (dose > 0.7)) <= limit]
            assert best is not None and best.dose >= 0.96 * max(within)
            assert len(looks) <= 9, (power, jump, limit, looks)
