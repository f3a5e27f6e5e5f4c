"""Statistics of studies: coverage and uniform p over simulated data sets, independent references, exact and broken samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from undertow.core.errors import NumericsError, SpecError
from undertow.studies.inference import (
    benjamini_hochberg,
    by_cluster,
    cluster_mean,
    cluster_ratio,
    cost_at_half,
    detectable,
    families_needed,
    holm,
    interval_of,
    max_statistic,
    page_trend,
    power_paired,
    sign_flip,
    tail,
    tost,
    tost_of_draws,
)

SIMULATED = 1_000


def _covered(draw: np.random.Generator, n: int, skewed: bool) -> float:
    """Share of simulated data sets whose 95 % bootstrap interval holds the true mean."""
    data = draw.exponential(1.0, (SIMULATED, n)) - 1 if skewed else draw.normal(0, 1, (SIMULATED, n))
    index = draw.integers(0, n, (2_000, n))
    hits = 0
    for sample in data:
        low, high = interval_of(sample[index].mean(axis=1), n)
        hits += low <= 0 <= high
    return hits / SIMULATED


@pytest.mark.parametrize(("n", "skewed", "least"), [(12, False, 0.93), (40, False, 0.93), (40, True, 0.91)])
def test_intervals_cover_at_their_nominal_rate(n: int, skewed: bool, least: float) -> None:
    rate = _covered(np.random.default_rng(1), n, skewed)
    assert least <= rate <= 0.972  # 1,000 data sets: 0.95 ± 0.014 is two standard errors


def test_the_plain_percentile_interval_would_not() -> None:
    # the negative control of the expansion: without it, 12 clusters are covered too seldom
    draw = np.random.default_rng(1)
    data, index = draw.normal(0, 1, (SIMULATED, 12)), draw.integers(0, 12, (2_000, 12))
    ends = [np.quantile(sample[index].mean(axis=1), [0.025, 0.975]) for sample in data]
    assert np.mean([low <= 0 <= high for low, high in ends]) < 0.93


def test_clusters_and_not_their_members_are_the_unit() -> None:
    """Ten stories a family that share its shift: intervals over families cover, over stories they do not."""
    draw = np.random.default_rng(2)
    families = np.repeat(np.arange(15), 10)
    right = wrong = 0
    for _ in range(300):
        values = draw.normal(0, 1, 15)[families] + draw.normal(0, 0.3, 150)
        right += cluster_mean(values, 0, clusters=list(map(str, families))).low <= 0 <= \
            cluster_mean(values, 0, clusters=list(map(str, families))).high
        found = cluster_mean(values, 0)
        wrong += found.low <= 0 <= found.high
    assert right / 300 > 0.92
    assert wrong / 300 < 0.75


@pytest.mark.parametrize("n", [10, 30])
def test_sign_flip_p_is_uniform_under_the_null(n: int) -> None:
    draw = np.random.default_rng(3)
    p = np.array([sign_flip(sample, i).p for i, sample in enumerate(draw.laplace(0, 1, (SIMULATED if n == 10 else 300, n)))])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert abs(float((p <= 0.05).mean()) - 0.05) < 0.03


def test_sign_flip_agrees_with_scipy_and_sees_an_effect() -> None:
    sample = np.random.default_rng(4).normal(0.4, 1, 11)
    ours = sign_flip(sample, 0, side="greater")
    theirs = stats.permutation_test((sample,), np.sum, permutation_type="samples", alternative="greater", n_resamples=10_000)
    assert ours.method == "exact sign flips"
    assert ours.p == pytest.approx(theirs.pvalue)
    assert sign_flip(np.full(30, 0.2) + np.linspace(0, 0.1, 30), 0, side="greater").p == pytest.approx(1 / 10_000)


def test_tost_keeps_its_level_at_the_margin_and_finds_sameness() -> None:
    draw = np.random.default_rng(5)
    at_margin = np.array([tost(sample, (-0.5, 0.5)).p for sample in draw.normal(0.5, 1, (SIMULATED, 40))])
    assert abs(float((at_margin < 0.05).mean()) - 0.05) < 0.025
    same = np.array([tost(sample, (-0.5, 0.5)).same() for sample in draw.normal(0, 1, (SIMULATED, 60))])
    assert same.mean() > 0.9
    assert not tost(draw.normal(0, 1, 6), (-0.5, 0.5)).same()  # few stories: absence of evidence is not sameness


def test_tost_is_the_two_t_tests() -> None:
    sample = np.random.default_rng(6).normal(0.1, 1, 25)
    above = stats.ttest_1samp(sample, -0.4, alternative="greater").pvalue
    p = max(above, stats.ttest_1samp(sample, 0.4, alternative="less").pvalue)
    assert tost(sample, (-0.4, 0.4)).p == pytest.approx(float(p))


def test_tost_of_draws_agrees_with_its_interval() -> None:
    draw = np.random.default_rng(7)
    for shift in (0.0, 0.2, 0.35, 0.5):
        sample = draw.normal(shift, 1, 40)
        drawn = sample[draw.integers(0, 40, (8_000, 40))].mean(axis=1)
        found = tost_of_draws(float(sample.mean()), drawn, (-0.5, 0.5), 40)
        inside = found.interval[0] > -0.5 and found.interval[1] < 0.5
        assert found.same() == inside
        assert found.p == pytest.approx(tost(sample, (-0.5, 0.5)).p, abs=0.03)
    one_sided = tost_of_draws(1.0, np.linspace(0.9, 1.1, 999), (-math.inf, 1.25), 40)
    assert one_sided.same()


def test_no_variance_is_exact() -> None:
    zeros = np.zeros(20)
    assert cluster_mean(zeros, 0) == (0.0, 0.0, 0.0, 20)
    assert sign_flip(zeros, 0).p == 1.0
    assert sign_flip(np.zeros(5), 0).p == 1.0
    assert tost(zeros, (-0.1, 0.1)).p == 0.0
    assert tost(np.full(9, 0.1), (-0.1, 0.1)).p == 1.0  # on the margin is not within it
    assert tost_of_draws(1.0, np.ones(50), (0.8, 1.25), 20).p == 0.0
    assert page_trend(np.ones((6, 3))).p == 1.0


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_nan_is_refused_with_a_count(broken: float) -> None:
    sample = np.array([0.1, broken, 0.3, 0.2])
    for test in (lambda: cluster_mean(sample, 0), lambda: sign_flip(sample, 0), lambda: tost(sample, (-1, 1))):
        with pytest.raises(NumericsError, match="1 of 4 figures"):
            test()


def test_bad_questions_are_refused() -> None:
    with pytest.raises(SpecError, match="too few"):
        cluster_mean(np.array([1.0]), 0)
    with pytest.raises(SpecError, match="no room"):
        tost(np.arange(5.0), (1.0, -1.0))
    with pytest.raises(SpecError, match="cluster names"):
        by_cluster(np.arange(4.0), ["a"])
    with pytest.raises(NumericsError, match="denominator"):
        cluster_ratio(np.ones(9), np.zeros(9), 0)


def test_corrections_by_hand_and_against_statsmodels() -> None:
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert benjamini_hochberg(p) == pytest.approx({"a": 0.02, "b": 0.04, "c": 0.04, "d": 0.02})
    assert holm({}) == {} == benjamini_hochberg({})
    reference = pytest.importorskip("statsmodels.stats.multitest")
    drawn = dict(enumerate(np.random.default_rng(8).uniform(0, 1, 30)))
    named = {str(i): float(v) for i, v in drawn.items()}
    for ours, method in ((holm(named), "holm"), (benjamini_hochberg(named), "fdr_bh")):
        assert list(ours.values()) == pytest.approx(list(reference.multipletests(list(named.values()), method=method)[1]))


def test_holm_controls_the_family_wise_error() -> None:
    draws = np.random.default_rng(9).uniform(0, 1, (SIMULATED, 6))
    false = [min(holm({str(i): float(v) for i, v in enumerate(row)}).values()) < 0.05 for row in draws]
    assert np.mean(false) < 0.07


def test_ratio_of_sums() -> None:
    draw = np.random.default_rng(10)
    base = draw.gamma(4, 1, 40)
    found = cluster_ratio(3 * base, base, 0)
    assert (found.value, found.low, found.high) == pytest.approx((3, 3, 3))
    noisy = cluster_ratio(draw.gamma(4, 2, 40), base, 0)
    assert noisy.low < 2 < noisy.high


def test_cost_at_half_finds_the_planted_cost() -> None:
    draw = np.random.default_rng(11)
    cost = np.arange(60) % 5.0
    hits = 0
    for i in range(100):
        p = 1 / (1 + np.exp(-(3.0 - 1.5 * cost + draw.normal(0, 0.6, 60))))
        found = cost_at_half(cost, p, i)
        hits += found.low <= 2.0 <= found.high
    assert hits >= 88
    assert cost_at_half(cost, np.full(60, 0.9) - 1e-3 * cost, 0).value == math.inf
    assert cost_at_half(cost, np.full(60, 0.1) - 1e-3 * cost, 0).value == -math.inf


def test_power_is_that_of_a_simulated_t_test() -> None:
    sample = np.random.default_rng(12).normal(0.5, 1, (4_000, 34))
    seen = stats.ttest_1samp(sample, 0, axis=1, alternative="greater").pvalue < 0.025
    assert power_paired(34, 0.5) == pytest.approx(float(seen.mean()), abs=0.02)
    assert (families_needed(0.5), families_needed(0.3), families_needed(0.2)) == (34, 90, 199)
    assert detectable(34) == pytest.approx(0.5, abs=0.02)


def test_random_sets_and_trend() -> None:
    assert max_statistic(0.9, [0.1] * 99).p == pytest.approx(0.01)
    assert max_statistic(0.1, [0.1] * 99).p == 1.0
    table = np.arange(5.0) + np.random.default_rng(13).normal(0, 0.5, (12, 5))
    assert page_trend(table).p < 1e-4
    assert page_trend(table[:, ::-1]).p > 0.5
    assert tail(1_000, 0.95) == pytest.approx(0.025, abs=5e-4)
