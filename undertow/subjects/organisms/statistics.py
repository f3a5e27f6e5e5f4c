"""Statistics of the model cards. The unit is the story (or the pair of stories), never the token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Float, Int

from undertow.core.seeds import derive_seed

RESAMPLES = 2_000
_Z95 = 1.959964


@final
class Estimate(NamedTuple):
    """A figure with its 95 % interval, and the number of units (stories or pairs) that it rests on."""

    value: float
    low: float
    high: float
    n: int


@final
class Slope(NamedTuple):
    """A logistic slope: log-odds a unit, its 95 % Wald interval, two-sided p, and the number of stories."""

    value: float
    low: float
    high: float
    p: float
    n: int


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A NumPy generator for the stream called `names`."""
    return np.random.default_rng(derive_seed(seed, *names))


def bootstrap(statistic: Callable[[Int[np.ndarray, "n"]], float], n: int, seed: int, *names: str | int) -> Estimate:
    """`statistic` of units 0 … n-1 with its 95 % percentile interval over RESAMPLES draws of n units with replacement."""
    rng = stream(seed, "bootstrap", *names)
    drawn = [statistic(rng.integers(0, n, n)) for _ in range(RESAMPLES)]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return Estimate(float(statistic(np.arange(n))), float(low), float(high), n)


def mean(values: Float[np.ndarray, "n"], seed: int, *names: str | int) -> Estimate:
    """Mean over units with its bootstrap interval."""
    rng, n = stream(seed, "bootstrap", *names), len(values)
    low, high = np.quantile(values[rng.integers(0, n, (RESAMPLES, n))].mean(axis=1), [0.025, 0.975])
    return Estimate(float(values.mean()), float(low), float(high), n)


def difference(first: Float[np.ndarray, "a"], second: Float[np.ndarray, "b"], seed: int, *names: str | int) -> Estimate:
    """mean(first) - mean(second) of two independent groups; each group is resampled by itself. `n` counts both."""
    return contrast([first], [second], seed, *names)


def contrast(plus: Sequence[Float[np.ndarray, "_"]], minus: Sequence[Float[np.ndarray, "_"]], seed: int,
             *names: str | int) -> Estimate:
    """Mean of the means of the groups `plus` minus that of `minus`; each group is resampled by itself. `n` counts all."""
    rng = stream(seed, "bootstrap", *names)

    def drawn(groups: Sequence[Float[np.ndarray, "_"]]) -> Float[np.ndarray, "draws"]:
        return np.mean([group[rng.integers(0, len(group), (RESAMPLES, len(group)))].mean(axis=1) for group in groups], axis=0)

    low, high = np.quantile(drawn(plus) - drawn(minus), [0.025, 0.975])
    value = np.mean([group.mean() for group in plus]) - np.mean([group.mean() for group in minus])
    return Estimate(float(value), float(low), float(high), sum(map(len, (*plus, *minus))))


def logistic_slope(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"], group: Int[np.ndarray, "n"]) -> Slope:
    """Slope b of logit E[y] = a_group + b·x for y in [0, 1], by maximum quasi-likelihood (y may be a probability).

    The standard error is the sandwich one, which holds whatever the variance of y is; a story is one row.
    """
    design = np.column_stack([x, *((group == g).astype(float) for g in np.unique(group))])
    beta, bread = np.zeros(design.shape[1]), np.eye(design.shape[1])
    for _ in range(100):
        fitted = 1 / (1 + np.exp(-np.clip(design @ beta, -30, 30)))
        weight = np.clip(fitted * (1 - fitted), 1e-9, None)
        bread = np.linalg.pinv(design.T @ (design * weight[:, None]))
        step = bread @ (design.T @ (y - fitted))
        beta = beta + np.clip(step, -5, 5)
        if np.abs(step).max() < 1e-10:
            break
    fitted = 1 / (1 + np.exp(-np.clip(design @ beta, -30, 30)))
    scores = design * (y - fitted)[:, None]
    error = math.sqrt((bread @ (scores.T @ scores) @ bread)[0, 0])
    slope = float(beta[0])
    p = math.erfc(abs(slope) / error / math.sqrt(2)) if error > 0 else 1.0
    return Slope(slope, slope - _Z95 * error, slope + _Z95 * error, p, len(x))


def mutual_information(first: Float[np.ndarray, "a k"], second: Float[np.ndarray, "b k"]) -> float:
    """Mutual information in bits between the group and the answer, for two groups of answer distributions.

    I = Σ_g w_g Σ_k p̄_g(k) log2(p̄_g(k) / p̄(k)), where p̄_g is the mean distribution of group g, w_g its share of the rows,
    and p̄ = Σ_g w_g p̄_g. In [0, 1].
    """
    share = len(first) / (len(first) + len(second))
    means = [first.mean(axis=0), second.mean(axis=0)]
    whole = share * means[0] + (1 - share) * means[1]
    parts = [float(np.sum(m[m > 0] * np.log2(m[m > 0] / whole[m > 0]))) for m in means]
    return max(share * parts[0] + (1 - share) * parts[1], 0.0)


def permuted_information(first: Float[np.ndarray, "n k"], second: Float[np.ndarray, "n k"], seed: int,
                         permutations: int = 199) -> Float[np.ndarray, "permutations"]:
    """Mutual information after exchanging the two members of a pair at random: what chance alone gives."""
    rng = stream(seed, "permuted_information")
    null = []
    for _ in range(permutations):
        swap = rng.random(len(first)) < 0.5
        null.append(mutual_information(np.where(swap[:, None], second, first), np.where(swap[:, None], first, second)))
    return np.array(null)


def sign_flip_p(values: Float[np.ndarray, "n"], seed: int, *names: str | int, flips: int = 9_999) -> float:
    """One-sided p that the mean of paired differences is above 0, by flipping signs at random.

    p = (1 + #{flipped means ≥ the mean}) / (1 + flips), so its least value is 1/(1 + flips).
    """
    rng = stream(seed, "sign_flip", *names)
    signs = rng.integers(0, 2, (flips, len(values))) * 2.0 - 1
    return float((1 + np.sum(signs @ values >= values.sum() - 1e-12 * np.abs(values).sum())) / (1 + flips))
