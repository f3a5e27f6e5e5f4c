"""Several SAEs side by side, as one value: what they are, what they measure, and where the others differ from the first."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from dashboards.rendering import figure, percent
from dashboards.saes import MOST_FLOP, Sae, flop

Cue = Literal["", "first", "same", "differs", "better", "worse", "more", "less"]
WORDS = {"differs": "≠ differs", "better": "▲ better", "worse": "▼ worse", "more": "▲ more", "less": "▼ less", "same": "= same"}
LETTERS = "ABCDEFGH"
PLOTS = (("fvu", "FVU, lower is better"), ("ce_recovered", "CE recovered, higher is better"))
SECONDS_PER_FLOP = 1 / 4e10
LEAST = 0.05
"""An axis spans at least this share of its largest value."""


class Cell(NamedTuple):
    """What a table says of one SAE, and how that differs from the first one: in words of `WORDS`, and by how much."""

    text: str
    cue: Cue
    by: str = ""


class Line(NamedTuple):
    """One row: its title, what it means, and a cell for each SAE."""

    title: str
    meaning: str
    cells: tuple[Cell, ...]


class Mark(NamedTuple):
    """A letter in a plot: which SAE, its figures, and where it stands, in [0, 100] from the left and from the top."""

    letter: str
    name: str
    x: float
    y: float
    left: float
    top: float


class Tick(NamedTuple):
    """A figure on an axis and where it stands, in [0, 100]."""

    text: str
    at: float


class Plot(NamedTuple):
    """One figure over L0."""

    title: str
    marks: tuple[Mark, ...]
    across: tuple[Tick, ...]
    up: tuple[Tick, ...]


class ComparePage(NamedTuple):
    """SAEs side by side.

    Attributes:
        saes: letter and SAE, in the order of the address.
        facts, figures: rows of the two tables.
        densities: latents by firing frequency: class, and of each SAE their number and its share of the largest, in [0, 100].
        plots: FVU and CE recovered over L0; one without two SAEs that have both figures is left out.
        overlap: rows: of which SAE; columns: found in which; None until it is asked for.
        overlap_seconds: about how long that takes on two cores; None if it is too much for a page.
        warnings: why some of the figures cannot be compared.
        command: what prints the same on the command line; `judging` what judges all on the same text.
    """

    saes: tuple[tuple[str, Sae], ...]
    facts: tuple[Line, ...]
    figures: tuple[Line, ...]
    densities: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]
    plots: tuple[Plot, ...]
    overlap: list[list[Any]] | None
    overlap_seconds: float | None
    warnings: tuple[str, ...]
    command: str
    judging: str


class _Measure(NamedTuple):
    """A figure of the card: its name there, its title, what it means, which way is better, and how it is written."""

    name: str
    title: str
    meaning: str
    better: Literal["", "up", "down"]
    write: Callable[[float], str] = figure


MEASURES = (
    _Measure("fvu", "FVU", "fraction of variance unexplained, mean-centred", "down"),
    _Measure("l0", "L0", "active latents a token", ""),
    _Measure("ce_recovered", "CE recovered", "share of the cross-entropy lost under mean ablation that it wins back", "up"),
    _Measure("ce_recon", "CE, reconstructed", "cross-entropy with the reconstruction in place, nats", "down"),
    _Measure("ce_base", "CE, untouched", "cross-entropy of the subject alone, nats", ""),
    _Measure("kl_recon", "KL", "of the next token, reconstructed from untouched, nats", "down"),
    _Measure("dead_share", "Dead", "share of latents that never fired", "down", percent),
    _Measure("tokens", "Judged on", "held-out tokens", "", lambda value: f"{value:,.0f}"),
    _Measure("steps", "Steps", "training steps", "", lambda value: f"{value:,.0f}"),
)


def compare_page(saes: Sequence[Sae], overlap: list[list[Any]] | None) -> ComparePage:
    """The page of `saes`, two or more; every other one is compared with the first."""
    paths = [sae.source for sae in saes]
    cards = all(sae.figures for sae in saes)
    judging = shlex.join(["undertow", "sae", "compare", *paths])
    seconds = 2 * flop(saes) * SECONDS_PER_FLOP
    return ComparePage(
        tuple(zip(LETTERS, saes, strict=False)), tuple(_facts(saes)), tuple(_figures(saes)), tuple(_densities(saes)),
        tuple(plot for name, title in PLOTS if (plot := _plot(saes, name, title)) is not None),
        overlap, seconds if flop(saes) <= MOST_FLOP else None, tuple(_warnings(saes)),
        f"{judging} --recorded" if cards else judging, judging)


def _text_of(sae: Sae) -> str:
    return str(sae.told("metadata", "undertow", "text", "source") or "")


def _subject(sae: Sae) -> str:
    return str(sae.store.record["subject"] if sae.store else sae.told("metadata", "model_name") or "")


def _one_subject(saes: Sequence[Sae]) -> bool:
    return len({_subject(sae) for sae in saes}) < 2


def _one_text(saes: Sequence[Sae]) -> bool:
    """Whether all that have figures were judged on the same text."""
    return len({(_text_of(sae), sae.told("metadata", "undertow", "text_digest")) for sae in saes if sae.figures}) < 2


def _facts(saes: Sequence[Sae]) -> Iterable[Line]:
    """What each SAE is; a row that nobody has anything to say on is left out."""
    run = ("metadata", "undertow", "run")
    rows: tuple[tuple[str, str, Callable[[Sae], Any]], ...] = (
        ("Architecture", "", lambda sae: sae.store.record["architecture"] if sae.store else sae.cfg.get("architecture")),
        ("Width", "number of latents", lambda sae: sae.shape[0] or None),
        ("k", "active latents a token, as set", lambda sae: sae.told(*run, "learn", "k") or sae.cfg.get("k")),
        ("Subject", "the model that it reads", _subject),
        ("Subject's digest", "", lambda sae: sae.told("metadata", "undertow", "subject_digest")),
        ("Site", "where it reads", lambda sae: sae.store.record["site"] if sae.store else sae.told("metadata", "hook_name")),
        ("Channels", "width of the activations", lambda sae: sae.shape[1] or None),
        ("Trained on", "text", _text_of),
        ("Activations", "seen in training", lambda sae: sae.told("metadata", "undertow", "tokens")),
        ("Seed", "", lambda sae: sae.told("metadata", "undertow", "seed")),
        ("Opened by", "folder, or packaged name", lambda sae: sae.source))
    for title, meaning, read in rows:
        values = [read(sae) for sae in saes]
        if any(value not in (None, "") for value in values):
            yield Line(title, meaning, tuple(Cell(_said(value), _same(value, values[0], number))
                                             for number, value in enumerate(values)))


def _said(value: Any) -> str:
    return "–" if value in (None, "") else f"{value:,}" if isinstance(value, int) else str(value)


def _same(value: Any, first: Any, number: int) -> Cue:
    return "first" if number == 0 else "same" if value == first else "differs"


def _figures(saes: Sequence[Sae]) -> Iterable[Line]:
    alike = _one_subject(saes) and _one_text(saes)  # otherwise nothing is better or worse, only more or less
    for measure in (one if alike else one._replace(better="") for one in MEASURES):
        values = [_number(sae.figures.get(measure.name)) for sae in saes]
        if any(value is not None for value in values):
            yield Line(measure.title, measure.meaning, _cells(values, measure))
    counts = [None if sae.store is None else sae.store.columns["count"] for sae in saes]
    if any(column is not None for column in counts):
        dead = [None if column is None else float(np.mean(column[:] == 0)) for column in counts]
        yield Line("Dead in the store", "share of features that never fired on the store's text",
                   _cells(dead, _Measure("", "", "", "down", percent)))
        median = [None if sae.store is None else float(np.median(sae.store.density)) for sae in saes]
        yield Line("Median density", "of the features in the store, share of tokens",
                   _cells(median, _Measure("", "", "", "", percent)))


def _cells(values: Sequence[float | None], measure: _Measure) -> tuple[Cell, ...]:
    return tuple(_cell(value, None if number == 0 else values[0], number, measure) for number, value in enumerate(values))


def _cell(value: float | None, first: float | None, number: int, measure: _Measure) -> Cell:
    if value is None:
        return Cell("–", "first" if number == 0 else "")
    text = measure.write(value)
    if number == 0 or first is None:
        return Cell(text, "first" if number == 0 else "")
    if text == measure.write(first):
        return Cell(text, "same")
    up = value > first
    cue: Cue = ("more" if up else "less") if not measure.better else "better" if up == (measure.better == "up") else "worse"
    change = measure.write(abs(value - first))
    return Cell(text, cue, f"{'+' if up else '−'}{change}")


def _number(value: Any) -> float | None:
    known = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None


def _densities(saes: Sequence[Sae]) -> Iterable[tuple[str, tuple[tuple[int, float], ...]]]:
    """Classes as the cards name them; an SAE whose card has none has zeros."""
    tables = [found if isinstance(found := sae.figures.get("density_histogram"), dict) else {} for sae in saes]
    classes = list(dict.fromkeys(name for table in tables for name in table))
    most = max((_count(table, name) for table in tables for name in classes), default=0)
    for name in classes if most else ():
        yield str(name), tuple((_count(table, name), round(100 * _count(table, name) / most, 1)) for table in tables)


def _count(table: dict[str, Any], name: str) -> int:
    return int(_number(table.get(name)) or 0)


def _plot(saes: Sequence[Sae], name: str, title: str) -> Plot | None:
    """Letters at (L0, figure), on axes that leave a margin; None where fewer than two SAEs have both figures."""
    points = [(letter, sae.name, x, y) for letter, sae in zip(LETTERS, saes, strict=False)
              if (x := _number(sae.figures.get("l0"))) is not None and (y := _number(sae.figures.get(name))) is not None]
    if len(points) < 2:
        return None
    left, bottom = _axis([x for _, _, x, _ in points]), _axis([y for _, _, _, y in points])

    def top(y: float) -> float:
        return round(100 - bottom(y), 1)

    marks = tuple(Mark(letter, called, x, y, left(x), top(y)) for letter, called, x, y in points)
    return Plot(title, marks, _ticks([mark.x for mark in marks], left), _ticks([mark.y for mark in marks], top))


def _axis(values: Sequence[float]) -> Callable[[float], float]:
    """Maps values to [12, 88]; what differs by less than LEAST of the largest does not fill the axis."""
    low, high = min(values), max(values)
    span = max(high - low, LEAST * max(abs(low), abs(high))) or 1.0
    middle = (low + high) / 2
    return lambda value: round(50 + 76 * (value - middle) / span, 1)


def _ticks(values: Sequence[float], at: Callable[[float], float]) -> tuple[Tick, ...]:
    """The smallest and the largest value, once if they read the same: the marks themselves say the rest."""
    found = {figure(value): Tick(figure(value), at(value)) for value in (min(values), max(values))}
    return tuple(found.values())


def _warnings(saes: Sequence[Sae]) -> Iterable[str]:
    without = [sae.name for sae in saes if not sae.figures]
    if without:
        yield f"No figures of its own: {', '.join(without)}. The command below judges all of them on the same text."
    if not _one_subject(saes):
        yield "They read different subjects, so that FVU, CE and KL of one say nothing against another's."
    if not _one_text(saes):
        yield ("Each was judged on held-out parts of its own text, and the texts differ: no figure is called better or worse. "
               "The second command below judges all on the same.")
