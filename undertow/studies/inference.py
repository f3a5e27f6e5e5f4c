"""Statistics of studies: pure functions in float64 whose unit is the cluster (a story or a scenario family), never the token.

NaN is refused everywhere, with a count: a measure that failed is left out by its caller, and the loss is reported. A sample
without any variance is exact: its interval is a point, and its p is 1 if the point is the null value and the least possible
otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, final

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from undertow.core.errors import NumericsError, SpecError
from undertow.subjects.organisms.statistics import Estimate, stream

RESAMPLES = 4_000
EXACT_FLIPS = 14  # up to so many clusters all 2^n signs are tried
FLIPS = 9_999
_BLOCK = 1 << 22  # draws × clusters that are held at once
Side = Literal["greater", "less", "two-sided"]


@final
class Test(NamedTuple):
    """A p-value, how it was come by, and the number of clusters.

    Attributes:
        p: in (0, 1].
        n: clusters.
        method: "exact sign flips", "sign flips" or "tost".
    """

    __test__ = False  # not one of pytest's

    p: float
    n: int
    method: str


@final
class Sameness(NamedTuple):
    """Two one-sided tests of "the figure lies within (low, high)".

    Attributes:
        value: the figure.
        interval: its 90 % interval, which lies within the margins iff `p` < 0.05.
        margins: (low, high); either may be infinite.
        p: the larger of the two one-sided p, in [0, 1].
        n: clusters.
    """

    value: float
    interval: tuple[float, float]
    margins: tuple[float, float]
    p: float
    n: int

    def same(self, alpha: float = 0.05) -> bool:
        """Whether the figure is shown to lie within the margins."""
        return self.p < alpha


def checked(values: Sequence[float] | Float[np.ndarray, "n"], least: int = 2) -> Float[np.ndarray, "n"]:
    """As a float64 array. Raises NumericsError for NaN or infinity, SpecError for fewer than `least` figures."""
    found = np.asarray(values, dtype=np.float64)
    bad = int((~np.isfinite(found)).sum())
    if bad:
        raise NumericsError(f"{bad} of {len(found)} figures are NaN or infinite",
                            "leave out the stories whose measure failed, and say how many they were")
    if len(found) < least:
        raise SpecError(f"{len(found)} figures are too few: at least {least} are needed")
    return found


def by_cluster(values: Float[np.ndarray, "n"], clusters: Sequence[int | str] | None = None) -> Float[np.ndarray, "cluster"]:
    """Mean of every cluster, in the order of their names; each figure is a cluster if there are no names."""
    found = checked(values, 1)
    if clusters is None:
        return found
    if len(clusters) != len(found):
        raise SpecError(f"{len(clusters)} cluster names for {len(found)} figures: need one each")
    _, place = np.unique(np.asarray(clusters), return_inverse=True)
    return np.bincount(place, found) / np.bincount(place)


def resamples(n: int, seed: int, *names: str | int, draws: int = RESAMPLES) -> Int[np.ndarray, "draws n"]:
    """`draws` draws of n clusters with replacement."""
    return stream(seed, "resamples", *names).integers(0, n, (draws, n))


def tail(n: int, level: float) -> float:
    """Share of draws to be cut off at each end of a percentile interval over n clusters.

    Φ(√(n/(n−1)) · t) with t the quantile of Student's t (Hesterberg 2015, the expanded percentile interval): the plain
    percentile interval is too short for few clusters.
    """
    t = stats.t.ppf((1 - level) / 2, n - 1)
    return float(stats.norm.cdf(math.sqrt(n / (n - 1)) * t))


def interval_of(draws: Float[np.ndarray, "draws"], n: int, level: float = 0.95) -> tuple[float, float]:
    """Expanded percentile interval from bootstrap draws over n clusters."""
    cut = tail(n, level)
    low, high = np.quantile(draws, [cut, 1 - cut])
    return float(low), float(high)


def cluster_mean(values: Float[np.ndarray, "n"], seed: int, *names: str | int,
                 clusters: Sequence[int | str] | None = None, level: float = 0.95) -> Estimate:
    """Mean over clusters with its bootstrap interval (expanded percentile)."""
    means = by_cluster(values, clusters)
    checked(means)
    if np.ptp(means) == 0:
        return Estimate(float(means[0]), float(means[0]), float(means[0]), len(means))
    drawn = means[resamples(len(means), seed, *names)].mean(axis=1)
    return Estimate(float(means.mean()), *interval_of(drawn, len(means), level), len(means))


def cluster_ratio(top: Float[np.ndarray, "n"], bottom: Float[np.ndarray, "n"], seed: int, *names: str | int,
                  level: float = 0.95) -> Estimate:
    """Σ top / Σ bottom over clusters with its bootstrap interval; one pair of sums a cluster.

    Raises NumericsError if the sum of `bottom` is not above 0 in every draw, so that the ratio has no interval.
    """
    drawn = ratio_draws(top, bottom, seed, *names)
    return Estimate(float(np.sum(top) / np.sum(bottom)), *interval_of(drawn, len(top), level), len(top))


def ratio_draws(top: Float[np.ndarray, "n"], bottom: Float[np.ndarray, "n"], seed: int, *names: str | int
                ) -> Float[np.ndarray, "draws"]:
    """The ratio of `cluster_ratio` in every draw of its bootstrap."""
    a, b = checked(top), checked(bottom)
    drawn = resamples(len(a), seed, *names)
    below = b[drawn].sum(axis=1)
    if b.sum() <= 0 or below.min() <= 0:
        raise NumericsError("the denominator of a ratio is not above 0 in every draw, so the ratio has no interval")
    return a[drawn].sum(axis=1) / below


def sign_flip(values: Float[np.ndarray, "n"], seed: int, *names: str | int, side: Side = "two-sided",
              clusters: Sequence[int | str] | None = None) -> Test:
    """Sign-flip permutation test that paired differences are symmetric about 0.

    All 2^n signs for n ≤ EXACT_FLIPS clusters; else FLIPS random ones and the one that was seen, so that p is never 0.
    """
    means = by_cluster(values, clusters)
    n = len(means)
    if n <= EXACT_FLIPS:
        signs = 1.0 - 2.0 * ((np.arange(2 ** n)[:, None] >> np.arange(n)) & 1)
        sums, method, extra = signs @ means, "exact sign flips", 0
    else:
        rng = stream(seed, "sign flips", *names)
        step = max(1, _BLOCK // n)
        sums = np.concatenate([(rng.integers(0, 2, (min(step, FLIPS - done), n)) * 2.0 - 1) @ means
                               for done in range(0, FLIPS, step)])
        method, extra = "sign flips", 1
    seen, slack = means.sum(), 1e-12 * np.abs(means).sum()
    reached = {"greater": sums >= seen - slack, "less": sums <= seen + slack,
               "two-sided": np.abs(sums) >= abs(seen) - slack}[side]
    return Test(float((extra + reached.sum()) / (extra + len(sums))), n, method)


def max_statistic(effect: float, controls: Sequence[float]) -> Test:
    """p of an effect against those of matched random sets: (1 + #{controls ≥ effect}) / (1 + #controls)."""
    found = checked(controls, 1)
    return Test(float((1 + (found >= effect).sum()) / (1 + len(found))), len(found), "rank among matched random sets")


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p that control the family-wise error (Holm 1979), under the same names."""
    order = sorted(p, key=lambda name: p[name])
    adjusted, worst = {}, 0.0
    for place, name in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - place) * p[name]))
        adjusted[name] = worst
    return {name: adjusted[name] for name in p}


def benjamini_hochberg(p: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p that control the false discovery rate (Benjamini & Hochberg 1995), under the same names."""
    if not p:
        return {}
    return dict(zip(p, map(float, stats.false_discovery_control(list(p.values()), method="bh")), strict=True))


def tost(values: Float[np.ndarray, "n"], margins: tuple[float, float],
         clusters: Sequence[int | str] | None = None) -> Sameness:
    """Two one-sided t-tests that the mean lies within `margins` (Schuirmann 1987), over clusters; a margin may be infinite.

    Without variance p is 0 if the point lies strictly within, else 1.
    """
    means = checked(by_cluster(values, clusters))
    low, high = margins
    if not low < high:
        raise SpecError(f"the margins of sameness {margins} have no room between them")
    n, value, error = len(means), float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))
    if error == 0 or np.ptp(means) == 0:
        return Sameness(value, (value, value), margins, 0.0 if low < value < high else 1.0, n)
    p = max(float(stats.t.sf((value - low) / error, n - 1)), float(stats.t.cdf((value - high) / error, n - 1)))
    reach = float(stats.t.ppf(0.95, n - 1)) * error
    return Sameness(value, (value - reach, value + reach), margins, p, n)


def tost_of_draws(value: float, draws: Float[np.ndarray, "draws"], margins: tuple[float, float], n: int) -> Sameness:
    """The same for a figure that is no mean (a ratio, a quantile, bits), from its bootstrap draws over n clusters.

    Each one-sided p is the largest tail at which the expanded percentile interval leaves that margin outside.
    """
    drawn = np.sort(checked(draws))
    low, high = margins
    if drawn[0] == drawn[-1] == value:
        return Sameness(value, (value, value), margins, 0.0 if low < value < high else 1.0, n)
    shares = [(1 + (drawn <= low).sum()) / (1 + len(drawn)) if math.isfinite(low) else 0.0,
              (1 + (drawn >= high).sum()) / (1 + len(drawn)) if math.isfinite(high) else 0.0]
    p = max(_untailed(float(share), n) for share in shares)
    return Sameness(value, interval_of(drawn, n, 0.90), margins, p, n)


def _untailed(share: float, n: int) -> float:
    """The one-sided p whose `tail` is `share`."""
    if share <= 0:
        return 0.0
    return float(stats.t.cdf(stats.norm.ppf(min(share, 1 - 1e-12)) / math.sqrt(n / (n - 1)), n - 1))


def families_needed(d: float, power: float = 0.8, alpha: float = 0.025) -> int:
    """Paired clusters that a one-sided t-test needs to see a standardised effect `d` (mean / SD) with `power`."""
    if not d > 0:
        raise SpecError(f"a standardised effect of {d} needs infinitely many families")
    n = 2
    while power_paired(n, d, alpha) < power:
        n += 1
    return n


def power_paired(n: int, d: float, alpha: float = 0.025) -> float:
    """Power of a one-sided paired t-test over n clusters for a standardised effect `d`, from the noncentral t."""
    return float(stats.nct.sf(stats.t.ppf(1 - alpha, n - 1), n - 1, d * math.sqrt(n)))


def detectable(n: int, power: float = 0.8, alpha: float = 0.025) -> float:
    """The standardised effect that n paired clusters show with `power`."""
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if power_paired(n, middle, alpha) < power else (low, middle)
    return high


def page_trend(table: Float[np.ndarray, "cluster dose"]) -> Test:
    """Page's test that a measure rises with the dose within clusters; columns in the order of the doses."""
    flat = checked(table.reshape(-1), 1).reshape(table.shape)
    if np.ptp(flat, axis=1).max() == 0:
        return Test(1.0, len(flat), "Page's trend")
    return Test(float(stats.page_trend_test(flat).pvalue), len(flat), "Page's trend")


def cost_at_half(cost: Float[np.ndarray, "n"], p: Float[np.ndarray, "n"], seed: int, *names: str | int) -> Estimate:
    """c50: the cost at which P(costly) = 1/2, by a logistic fit P = σ(a − b·cost), c50 = a / b.

    A fit that does not fall with cost (b ≤ 0), or whose crossing is more than twice the range of costs away, has no c50
    in reach: it is +∞ where the mean of P is above 1/2 and −∞ where it is below. Stories of a single cost have none: NaN.
    Interval: bootstrap over stories.
    """
    x, y = checked(cost), checked(p)
    levels, place = np.unique(x, return_inverse=True)
    if len(levels) < 2:
        return Estimate(math.nan, math.nan, math.nan, len(x))
    drawn = np.concatenate([np.arange(len(x))[None], resamples(len(x), seed, *names, draws=1_000)])
    cell = np.arange(len(drawn))[:, None] * len(levels) + place[drawn]
    size = len(drawn) * len(levels)
    counts = np.bincount(cell.ravel(), minlength=size).reshape(len(drawn), -1).astype(float)
    sums = np.bincount(cell.ravel(), y[drawn].ravel(), size).reshape(len(drawn), -1)
    found = _crossings(levels, counts, sums)
    cut = tail(len(x), 0.95)  # order statistics, since draws without a crossing are infinite
    ordered = np.sort(found[1:])
    low, high = (float(ordered[min(len(ordered) - 1, int(q * len(ordered)))]) for q in (cut, 1 - cut))
    return Estimate(float(found[0]), low, high, len(x))


def _crossings(levels: Float[np.ndarray, "level"], counts: Float[np.ndarray, "draw level"],
               sums: Float[np.ndarray, "draw level"]) -> Float[np.ndarray, "draw"]:
    """a / b of the logistic quasi-likelihood fit of every draw; the sums of P at each cost are sufficient."""
    middle = levels.mean()
    z = levels - middle
    a, b = np.zeros(len(counts)), np.zeros(len(counts))
    for _ in range(60):
        fitted = 1 / (1 + np.exp(-np.clip(a[:, None] + b[:, None] * z, -30, 30)))
        weight = counts * np.clip(fitted * (1 - fitted), 1e-9, None)
        rest = sums - counts * fitted
        g0, g1 = rest.sum(axis=1), (rest * z).sum(axis=1)
        h00, h01, h11 = weight.sum(axis=1), (weight * z).sum(axis=1), (weight * z * z).sum(axis=1)
        det = np.maximum(h00 * h11 - h01 ** 2, 1e-12)
        step = (h11 * g0 - h01 * g1) / det, (h00 * g1 - h01 * g0) / det
        a, b = a + np.clip(step[0], -2, 2), b + np.clip(step[1], -2, 2)
        if max(np.abs(step[0]).max(), np.abs(step[1]).max()) < 1e-9:
            break
    reach = 2 * np.ptp(levels)
    crossing = middle - a / np.where(b < 0, b, -1e-12)
    lost = (b >= -1e-6) | (np.abs(crossing - middle) > reach)
    return np.where(lost, np.where(sums.sum(axis=1) / counts.sum(axis=1) > 0.5, np.inf, -np.inf), crossing)
