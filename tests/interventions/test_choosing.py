"""Choosing: of all that was judged, enough of the act at the smallest change; a hopeless pool gives nothing."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from interventions.choosing import choose
from interventions.tune import Bench, Trial, answers, floors, mean_d
from tests.features.planted import D_SAE
from tests.interventions import benches
from tests.interventions.benches import ACTS, KNOWN, LOOSE


@pytest.fixture(scope="module")
def bench() -> Bench:
    return benches.bench()


@pytest.fixture(scope="module")
def tried(bench: Bench) -> list[Trial]:
    return choose(bench, [0, 1, 2, 3], ACTS, LOOSE)


def test_nothing_within_the_limits_is_nothing_chosen(bench: Bench) -> None:
    """Latents that stand below their level at every dose: the smallest dose is already too much."""
    low = bench._replace(known=KNOWN._replace(high=np.full(D_SAE, 600.0)))
    assert choose(low, [0, 1], ACTS, LOOSE.model_copy(update={"kl_mean": 1e-12, "kl_p99": 1e-12})) == []
    assert choose(bench, [], ACTS, LOOSE) == []


def test_the_chosen_set_has_the_largest_effect_within_the_limits(bench: Bench, tried: list[Trial]) -> None:
    assert {latent for trial in tried for latent in trial.latents} <= {0, 1, 2}
    chosen = tried[-1]
    assert chosen.acts == max(trial.acts for trial in tried)
    given = answers(bench, floors(bench, chosen, "before_decision"), bench.questions)
    on = answers(bench, floors(bench, chosen), bench.questions)
    assert chosen.d == pytest.approx(mean_d(given, *ACTS))
    assert chosen.acts == pytest.approx(np.mean([np.exp(answer.log_mass["give"]) for answer in (*given, *on)]))
    assert chosen.d != pytest.approx(mean_d(answers(bench, None, bench.questions), *ACTS), abs=1e-4)


def test_what_was_refined_is_judged_beside_what_was_proposed(tried: list[Trial]) -> None:
    """Two gates and the refined set, each at its largest dose and at the factors of the spec."""
    assert len(tried) == 2 * (1 + len(LOOSE.factors)) + 1 + len(LOOSE.fine)
    assert all(len(trial.latents) <= LOOSE.size and max(trial.weights) == 1.0 for trial in tried)


def test_no_more_than_is_wanted(bench: Bench, tried: list[Trial]) -> None:
    acts = sorted(trial.acts for trial in tried)
    wanted = (acts[-3] + acts[-2]) / 2  # two of them reach it
    enough = choose(bench, [0, 1, 2, 3], ACTS, LOOSE, wanted)
    assert enough[-1].acts >= wanted > enough[-3].acts
    assert enough[-1].kl_p99 <= enough[-2].kl_p99
    assert choose(bench, [0, 1, 2, 3], ACTS, LOOSE, wanted=2.0)[-1] == tried[-1]  # out of reach: the most there is


def test_what_leaves_the_word_alone_comes_first(bench: Bench, tried: list[Trial]) -> None:
    """A limit that only some keep: the chosen one keeps it, though another does more. One that none keeps changes nothing."""
    assert all(trial.word > 0 for trial in tried)
    limit = sorted(trial.word for trial in tried)[len(tried) // 2]
    kept = [trial for trial in tried if trial.word <= limit]
    assert 0 < len(kept) < len(tried)
    own = LOOSE.model_copy(update={"word": limit})  # not validated: a limit below 1 is one here
    chosen = choose(bench, [0, 1, 2, 3], ACTS, own)[-1]
    assert chosen.word <= limit and chosen.acts == max(trial.acts for trial in kept)
    assert choose(bench, [0, 1, 2, 3], ACTS, LOOSE.model_copy(update={"word": 1e-9}))[-1] == tried[-1]


def test_progress_never_passes_its_total(bench: Bench) -> None:
    seen: list[tuple[str, int, int]] = []
    choose(bench, [0, 1, 2], ACTS, LOOSE, progress=lambda phase, done, total: seen.append((phase, done, total)))
    assert seen == [("select", 1, 3), ("select", 2, 3), ("select", 3, 3)]


def test_a_subject_that_cannot_pack_keeps_what_was_proposed(
        bench: Bench, tried: list[Trial], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = choose(bench._replace(packs=False), [0, 1, 2, 3], ACTS, LOOSE)
    assert len(found) == 2 * (1 + len(LOOSE.factors))
    assert {(trial.latents, trial.dose) for trial in found} <= {(trial.latents, trial.dose) for trial in tried}
    assert "is not refined" in caplog.text
