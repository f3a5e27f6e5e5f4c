"""The n firings of every latent with the smallest keys, kept while a text streams past."""

from __future__ import annotations

from typing import NamedTuple, final

import numpy as np
from jaxtyping import Float, Float32, Int64, Shaped, UInt64
from numpy import ndarray

BEFORE, AFTER = 20, 10
"""Tokens of context that are kept before and after a firing."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Firings(NamedTuple):
    """Firings of some whole token rows, sorted by latent and then by activation index.

    Attributes:
        latents: the latent that fired.
        indices: index of the activation in its store.
        values: activation of the latent, positive.
        rows: token row of the activation.
        positions: position of the activation in its row.
    """

    latents: Int64[ndarray, "firing"]
    indices: Int64[ndarray, "firing"]
    values: Float32[ndarray, "firing"]
    rows: Int64[ndarray, "firing"]
    positions: Int64[ndarray, "firing"]


class Examples(NamedTuple):
    """Up to n firings of every latent, best first; a missing one has index, row and position -1 and value 0.

    Attributes:
        indices: index of the activation in its store.
        rows: token row of the firing.
        positions: position of the firing in its row.
        values: activation of the latent at the firing.
        windows: activations of the same latent from BEFORE tokens before to AFTER tokens after the firing; 0 also
            where the row ends and where a token is not measured.
    """

    indices: Int64[ndarray, "d_sae n"]
    rows: Int64[ndarray, "d_sae n"]
    positions: Int64[ndarray, "d_sae n"]
    values: Float32[ndarray, "d_sae n"]
    windows: Float32[ndarray, "d_sae n around"]


def priorities(seed: int, latents: Int64[ndarray, "firing"], index: Int64[ndarray, "firing"]
               ) -> UInt64[ndarray, "firing"]:
    """Random 64-bit numbers, each a pure function of (seed, latent, activation index).

    The n firings with the smallest priorities are a uniform sample without replacement, whatever the order or the
    chunks in which they are seen. Two rounds of splitmix64 (Steele, Lea and Flood 2014).
    """
    stream = _splitmix(np.uint64(seed) + latents.astype(np.uint64) * _GOLDEN)
    return _splitmix(stream + index.astype(np.uint64) * _GOLDEN)


def _splitmix(state: UInt64[ndarray, "firing"]) -> UInt64[ndarray, "firing"]:
    mixed = state + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
    return mixed ^ (mixed >> np.uint64(31))


@final
class BestPerLatent:
    """Keeps, for every latent, the `n` offered firings with the smallest keys (of equal keys the earlier firing).

    Memory: `d_sae * n` entries of 16 bytes plus `4 * (BEFORE + 1 + AFTER)` bytes of context.

    Args:
        d_sae: number of latents.
        n: firings kept a latent.
        worst: a key that no firing beats by being worse; its type is the type of all keys.
        one_per_row: keep at most one firing of a token row, the best.
        where: (row, position) of every activation of the store.
    """

    def __init__(self, d_sae: int, n: int, worst: np.generic, one_per_row: bool, where: Int64[ndarray, "token 2"]
                 ) -> None:
        self.n = n
        self.one_per_row = one_per_row
        self.where = where
        self.keys = np.full((d_sae, n), worst)
        self.index = np.full((d_sae, n), -1, dtype=np.int64)
        self.values = np.zeros((d_sae, n), dtype=np.float32)
        self.windows = np.zeros((d_sae, n, BEFORE + 1 + AFTER), dtype=np.float32)

    def offer(self, firings: Firings, keys: Shaped[ndarray, "firing"], lists: Int64[ndarray, "firing"] | None = None) -> None:
        """Take those of `firings` that are among the best so far; firings must come in ascending activation index.

        `lists` says for which list each firing competes, where that is not the list of its latent (then `d_sae` counts
        lists); the context kept with a firing is that of its latent all the same.
        """
        lists = firings.latents if lists is None else lists
        keen = np.flatnonzero(keys < self.keys[lists, -1])  # of equal keys the earlier one is there already
        touched = np.unique(lists[keen])
        held = touched[:, None] * self.n + np.arange(self.n)
        held = held[self.index[touched] >= 0]

        latents = np.concatenate([held // self.n, lists[keen]])
        merged = np.concatenate([self.keys.reshape(-1)[held], keys[keen]])
        index = np.concatenate([self.index.reshape(-1)[held], firings.indices[keen]])
        order = np.lexsort((index, merged, latents))
        if self.one_per_row:
            order = order[_first_of_row(latents[order], self.where[index[order], 0])]
        latents = latents[order]
        rank = np.arange(len(order)) - np.searchsorted(latents, latents)
        order, latents, rank = order[rank < self.n], latents[rank < self.n], rank[rank < self.n]

        values = np.concatenate([self.values.reshape(-1)[held], firings.values[keen]])[order]
        windows = self._windows(firings, held, keen, order)
        self.keys[latents, rank] = merged[order]
        self.index[latents, rank] = index[order]
        self.values[latents, rank] = values
        self.windows[latents, rank] = windows

    def _windows(self, firings: Firings, held: Int64[ndarray, "held"], keen: Int64[ndarray, "keen"],
                 order: Int64[ndarray, "kept"]) -> Float32[ndarray, "kept around"]:
        windows = np.empty((len(order), self.windows.shape[-1]), dtype=np.float32)
        new = order >= len(held)
        windows[~new] = self.windows.reshape(-1, self.windows.shape[-1])[held[order[~new]]]
        windows[new] = activations_around(firings, keen[order[new] - len(held)])
        return windows

    def examples(self) -> Examples:
        """What was kept."""
        empty = self.index < 0
        rows, positions = (np.where(empty, -1, self.where[self.index, axis]) for axis in (0, 1))
        return Examples(self.index, rows, positions, self.values, self.windows)


def _first_of_row(latents: Int64[ndarray, "firing"], rows: Int64[ndarray, "firing"]) -> Int64[ndarray, "kept"]:
    """Places, ascending, of the first entry of every (latent, row); entries of one latent come best first."""
    by_row = np.lexsort((np.arange(len(rows)), rows, latents))
    new = np.ones(len(rows), dtype=bool)
    new[1:] = (np.diff(latents[by_row]) != 0) | (np.diff(rows[by_row]) != 0)
    return np.sort(by_row[new])


def activations_around(firings: Firings, at: Int64[ndarray, "kept"]) -> Float[ndarray, "kept around"]:
    """Activations of the latent of each firing `at` around it in its row, as `Examples.windows` has them.

    Firings of one latent lie side by side in `firings`, so the neighbours in the text are the neighbours in the array.
    """
    around = np.zeros((len(at), BEFORE + 1 + AFTER), dtype=np.float32)
    around[:, BEFORE] = firings.values[at]
    for step, reach in ((-1, BEFORE), (1, AFTER)):
        live, there = np.arange(len(at)), at + step
        while True:
            inside = (there >= 0) & (there < len(firings.indices))
            live, there = live[inside], there[inside]
            distance = firings.positions[there] - firings.positions[at[live]]
            near = ((firings.latents[there] == firings.latents[at[live]])
                    & (firings.rows[there] == firings.rows[at[live]]) & (np.abs(distance) <= reach))
            if not near.any():
                break
            around[live[near], BEFORE + distance[near]] = firings.values[there[near]]
            live, there = live[near], there[near] + step
    return around
