"""Contexts as a page shows them: runs of text with a heat level, the peak marked, repeats folded away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np

from dashboards.layout import HEAT
from dashboards.store import FeatureStore, Place
from features.ranking import AFTER, BEFORE

LEVELS = 5
Width = Literal["short", "passage", "row"]
_REACH = {"short": (5, 5), "passage": (BEFORE, AFTER), "row": (10**6, 10**6)}


class Run(NamedTuple):
    """A readable run of tokens. `level` is 0 where the feature is silent, else 1 to LEVELS; silent tokens share a run."""

    text: str
    level: int
    value: float
    peak: bool


class Passage(NamedTuple):
    """One firing and the text around it.

    Attributes:
        value: activation at the peak; exact (the others are rounded up to 1/255 of the feature's maximum).
        level: heat level of the peak.
        place: document, token row and position.
        runs: the text.
        text: the same as one plain text.
        repeats: further firings of the group whose nearest tokens read the same.
    """

    value: float
    level: int
    place: Place
    runs: tuple[Run, ...]
    text: str
    repeats: tuple[Passage, ...] = ()


def level(value: float, maximum: float) -> int:
    """Heat level of an activation: 0 if silent, else which fifth of the maximum it is in, 1 to LEVELS."""
    return 0 if value <= 0 else min(LEVELS, int(np.ceil(value / maximum * LEVELS))) if maximum > 0 else LEVELS


def passages(store: FeatureStore, latent: int, examples: Iterable[Any], width: Width) -> tuple[Passage, ...]:
    """Passages of layout.EXAMPLE records, in order, without the empty ones; repeats follow the first that reads alike."""
    kept: dict[str, list[Passage]] = {}
    for example in examples:
        if example["row"] >= 0:
            near = _passage(store, latent, example, "short")
            kept.setdefault(near.text, []).append(near if width == "short" else _passage(store, latent, example, width))
    return tuple(first._replace(repeats=tuple(rest)) for first, *rest in kept.values())


def _passage(store: FeatureStore, latent: int, example: Any, width: Width) -> Passage:
    maximum = float(store.columns["maximum"][latent])
    row, position, value = int(example["row"]), int(example["position"]), float(example["value"])
    texts = store.row_texts(row)
    values = _row_values(example, position, len(texts), maximum)
    before, after = _REACH[width]
    start, stop = max(0, position - before), min(len(texts), position + after + 1)
    while start > 0 and not texts[start]:  # not in the middle of a character
        start -= 1
    runs = tuple(_joined(_runs(texts, values, range(start, stop), position, maximum)))
    return Passage(value, level(value, maximum), store.place(row, position), runs, "".join(run.text for run in runs))


def _row_values(example: Any, position: int, n: int, maximum: float) -> np.ndarray:
    """Activations of a whole row, known near the firing only and 0 elsewhere."""
    values = np.zeros(n)
    low, high = max(0, position - BEFORE), min(n, position + AFTER + 1)
    first = low - (position - BEFORE)
    values[low:high] = example["heat"][first:first + high - low] * (maximum / HEAT)
    values[position] = float(example["value"])
    return values


def _runs(texts: list[str], values: np.ndarray, shown: range, position: int, maximum: float) -> Iterator[Run]:
    """One run a readable piece: a token, or several that share a character."""
    starts = [at for at in shown if texts[at]]
    for number, at in enumerate(starts):
        stop = starts[number + 1] if number + 1 < len(starts) else shown.stop
        value = float(values[at:stop].max())
        yield Run(texts[at], level(value, maximum), value, at <= position < stop)


def _joined(runs: Iterator[Run]) -> Iterator[Run]:
    """Neighbouring silent runs as one, so that only active tokens become elements of the page."""
    silent: list[str] = []
    for run in runs:
        if run.level == 0 and not run.peak:
            silent.append(run.text)
            continue
        if silent:
            yield Run("".join(silent), 0, 0.0, False)
            silent = []
        yield run
    if silent:
        yield Run("".join(silent), 0, 0.0, False)
