"""What the weights alone say: nearest directions, and what each direction writes into the logits. Block by block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, Shaped
from numpy import ndarray
from torch import Tensor

from dashboards.layout import LOGIT_BINS, N_LOGITS, N_NEIGHBOURS, PAIR
from features.codes import Progress
from features.logit_lens import logit_effects
from sae.dictionary import Dictionary
from undertow.subjects.unembed import UnembedView

BLOCK = 256


class Neighbours(NamedTuple):
    """For each latent of a block: length of its direction, and the directions with the largest cosine, largest first."""

    norms: Float32[ndarray, "block"]
    pairs: Shaped[ndarray, "block neighbour"]


class LogitBlock(NamedTuple):
    """For each latent of a block, from `logit_effects`: extreme tokens, and a histogram of equal bins from `low` to `high`."""

    promoted: Shaped[ndarray, "block token"]
    suppressed: Shaped[ndarray, "block token"]
    histogram: Int64[ndarray, "block bin"]
    low: Float32[ndarray, "block"]
    high: Float32[ndarray, "block"]


def all_directions(dictionary: Dictionary) -> Float[Tensor, "d_sae d_in"]:
    """What one unit of each latent writes, in float32 on the CPU."""
    return dictionary.directions(torch.arange(dictionary.d_sae)).detach().float().cpu()


def nearest(directions: Float[Tensor, "d_sae d_in"], block: slice) -> Neighbours:
    """Nearest other directions of the latents in `block` by cosine, in [−1, 1]; a zero direction has cosine 0 with all.

    Of equal cosines the lower latent comes first. Fewer than N_NEIGHBOURS + 1 latents leave empty pairs (id −1).
    """
    norms = directions.norm(dim=-1)
    unit = directions / norms.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    cosines = unit[block] @ unit.T
    own = torch.arange(block.start, block.stop)
    cosines[torch.arange(len(own)), own] = -torch.inf  # a latent is no neighbour of its own
    return Neighbours(norms[block].numpy(), _largest(cosines, min(N_NEIGHBOURS, len(directions) - 1), N_NEIGHBOURS))


def logit_block(directions: Float[Tensor, "block d_model"], unembed: UnembedView) -> LogitBlock:
    """Extremes and histogram of the direct logit effect; of equal effects the lower token comes first."""
    effects = logit_effects(directions, unembed).cpu()
    low, high = effects.amin(dim=1, keepdim=True), effects.amax(dim=1, keepdim=True)
    width = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
    bins = ((effects - low) / width * LOGIT_BINS).long().clamp_(max=LOGIT_BINS - 1)
    bins += torch.arange(len(bins))[:, None] * LOGIT_BINS
    histogram = torch.bincount(bins.flatten(), minlength=len(bins) * LOGIT_BINS).reshape(-1, LOGIT_BINS)
    n = min(N_LOGITS, effects.shape[1])
    suppressed = _largest(-effects, n, N_LOGITS)
    suppressed["value"] = np.where(suppressed["id"] < 0, 0, -suppressed["value"])
    return LogitBlock(_largest(effects, n, N_LOGITS), suppressed, histogram.numpy(), low[:, 0].numpy(), high[:, 0].numpy())


def _largest(values: Float[Tensor, "block column"], n: int, slots: int) -> Shaped[ndarray, "block slot"]:
    """The n largest of every row, largest first, of equal ones the lower column first; the remaining slots are empty."""
    pairs = np.zeros((len(values), slots), dtype=PAIR)
    pairs["id"] = -1
    if n < 1:
        return pairs
    least = values.topk(n, dim=1).values[:, -1:]
    rows, columns = (values >= least).nonzero(as_tuple=True)
    found = values[rows, columns].numpy()
    rows, columns = rows.numpy(), columns.numpy()
    order = np.lexsort((columns, -found, rows))
    rows, columns, found = rows[order], columns[order], found[order]
    rank = np.arange(len(rows)) - np.searchsorted(rows, rows)
    kept = rank < n
    pairs["id"][rows[kept], rank[kept]] = columns[kept]
    pairs["value"][rows[kept], rank[kept]] = found[kept]
    return pairs


def each_block(d_sae: int, progress: Progress | None) -> Iterator[slice]:
    """The latents, BLOCK at a time; progress is reported in latents."""
    for start in range(0, d_sae, BLOCK):
        stop = min(start + BLOCK, d_sae)
        yield slice(start, stop)
        if progress is not None:
            progress(stop, d_sae)
