"""Tuning: the dose is the largest within the limits, a set is judged off its own words, and a hopeless pool gives nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from features.balance import Slopes, drawn_slopes, word_slopes
from features.carried import Levels, decision_slopes
from features.codes import dictionary_digest
from interventions.audit import logits_after
from interventions.tune import (
    DOSES,
    Bench,
    Trial,
    TuneSpec,
    answers,
    choose,
    floors,
    largest_dose,
    mean_d,
    question,
    response,
    sameness,
)
from tests.features.planted import D_SAE, planted
from undertow.subjects.sharing import Below

ACTS = ("give", "keep")
KNOWN = Levels(np.ones(D_SAE), np.linspace(100.0, 130.0, D_SAE))  # the planted latents stand at about 50
LOOSE = TuneSpec(kl_mean=10.0, kl_p99=10.0, size=2, pool=3, gates=((0.5, 1, 1), (0.5, 2, 4)), min_open=0.0)


@pytest.fixture(scope="module")
def bench() -> Bench:
    made = planted()
    texts = [made.subject.encode(f"At the {place} nobody spoke for a while, and the rain went on.") for place in
             ("mill", "inn", "hut", "ford", "quay", "barn", "farm", "lock")]
    return Bench(made.subject, made.dictionary, made.site,
                 {"subject": made.subject.digest, "sae": dictionary_digest(made.dictionary), "site": made.site.name},
                 KNOWN, Slopes(decision_slopes(made.subject, made.site, [pair.negative for pair in made.pairs[:4]]),
                               drawn_slopes(made.subject, made.site, texts, 1),
                               word_slopes(made.subject, made.site, texts, torch.tensor([5]))),
                 [question(made.subject, pair.negative) for pair in made.pairs[:4]], texts,
                 logits_after(made.subject, texts), Below(made.subject, made.site))


def at(latents: tuple[int, ...], dose: float) -> Trial:
    return Trial(latents, (), dose, float("nan"), float("nan"), float("nan"))


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
    assert choose(low, [0, 1], ACTS, hopeless) == []
    assert choose(bench, [], ACTS, LOOSE) == []


def test_the_chosen_set_has_the_largest_effect_before_the_decision(bench: Bench) -> None:
    trials = choose(bench, [0, 1, 2, 3], ACTS, LOOSE)
    assert trials
    assert {latent for trial in trials for latent in trial.latents} <= {0, 1, 2}
    chosen = trials[-1]
    assert chosen.acts == max(trial.acts for trial in trials)
    given = answers(bench, floors(bench, chosen, "before_decision"), bench.questions)
    on = answers(bench, floors(bench, chosen), bench.questions)
    assert chosen.d == pytest.approx(mean_d(given, *ACTS))
    assert chosen.acts == pytest.approx(np.mean([np.exp(answer.log_mass["give"]) for answer in (*given, *on)]))
    assert chosen.d != pytest.approx(mean_d(answers(bench, None, bench.questions), *ACTS), abs=1e-4)


def test_the_response_is_measured_at_the_doses_that_were_asked_for(bench: Bench) -> None:
    chosen = choose(bench, [0, 1, 2, 3], ACTS, LOOSE)[-1]
    low, same = response(bench, chosen, ACTS, (0.5, 1.0))
    assert low.dose == 0.5 * chosen.dose
    assert low.kl_mean < same.kl_mean
    assert (same.kl_mean, same.kl_p99, same.d) == pytest.approx((chosen.kl_mean, chosen.kl_p99, chosen.d))


def test_weights_are_parts_of_the_dose(bench: Bench) -> None:
    recipe = floors(bench, at((3, 5), 0.5)._replace(weights=(1.0, 0.25)))
    assert [edit.operator.value for edit in recipe.edits] == pytest.approx(  # pyright: ignore[reportAttributeAccessIssue]
        [0.5 * KNOWN.high[3], 0.125 * KNOWN.high[5]], abs=1e-6)


def test_progress_never_passes_its_total(bench: Bench) -> None:
    seen: list[tuple[str, int, int]] = []
    choose(bench, [0, 1, 2], ACTS, LOOSE, lambda phase, done, total: seen.append((phase, done, total)))
    assert seen == [("select", 1, 2), ("select", 2, 2)]
