"""What needs a feature's mean and maximum beforehand: central moments, and uniform samples of five intervals."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64
from numpy import ndarray

from dashboards.layout import N_INTERVALS, PER_INTERVAL
from features.codes import CHUNK, Activations, Progress
from features.examples import ExampleTable, scan_firings
from features.ranking import BestPerLatent, Examples, Firings, priorities
from sae.dictionary import Dictionary
from undertow.core.seeds import derive_seed


class SecondLook(NamedTuple):
    """Figures of every latent over the activations on which it fired.

    Attributes:
        variance: mean of (value − mean)².
        skewness: mean of (value − mean)³ / variance^1.5; 0 where the variance is 0.
        kurtosis: mean of (value − mean)⁴ / variance² − 3; 0 where the variance is 0.
        intervals: number of firings whose activation, divided by the latent's maximum, lies in [i/5, (i+1)/5); the last
            interval is closed. A row sums to the latent's count.
        strata: a uniform sample without replacement of each interval's firings: list `latent * N_INTERVALS + interval`.
    """

    variance: Float64[ndarray, "d_sae"]
    skewness: Float64[ndarray, "d_sae"]
    kurtosis: Float64[ndarray, "d_sae"]
    intervals: Int64[ndarray, "d_sae interval"]
    strata: Examples


def look_again(dictionary: Dictionary, store: Activations, table: ExampleTable, *, chunk: int = CHUNK,
               progress: Progress | None = None) -> SecondLook:
    """Second pass over the codes of the same activations that `table` was collected from; no model runs.

    The result does not depend on `chunk` (but for the last bits of the encoder's product). Memory: 2 kB a latent.
    """
    d_sae = table.d_sae
    where = store.where.numpy().astype(np.int64, copy=False)
    strata = BestPerLatent(d_sae * N_INTERVALS, PER_INTERVAL, np.uint64(2**64 - 1), False, where)
    counts = np.zeros(d_sae * N_INTERVALS, dtype=np.int64)
    powers = np.zeros((3, d_sae))
    stream = derive_seed(table.seed, "dashboard", "intervals")
    for firings in scan_firings(dictionary, store, chunk, progress):
        lists = firings.latents * N_INTERVALS + _interval(firings, table)
        counts += np.bincount(lists, minlength=len(counts))
        strata.offer(firings, priorities(stream, firings.latents, firings.indices), lists)
        off = firings.values - table.means[firings.latents]
        for power, sums in enumerate(powers, start=2):
            np.add.at(sums, firings.latents, off**power)  # one after the other, so no dependence on the pieces
    variance, third, fourth = powers / np.maximum(table.counts, 1)
    spread = variance > 0
    safe = np.where(spread, variance, 1.0)
    return SecondLook(variance, np.where(spread, third / safe**1.5, 0.0), np.where(spread, fourth / safe**2 - 3, 0.0),
                      counts.reshape(-1, N_INTERVALS), strata.examples())


def _interval(firings: Firings, table: ExampleTable) -> Int64[ndarray, "firing"]:
    share = firings.values.astype(np.float64) * N_INTERVALS / table.maxima[firings.latents]
    return np.minimum(share.astype(np.int64), N_INTERVALS - 1)
