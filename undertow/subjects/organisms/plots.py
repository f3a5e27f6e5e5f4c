"""The two plots of a card. matplotlib is imported when a plot is drawn, with a backend that needs no screen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OWN, _WORLD, _SECOND = "#b5542f", "#444444", "#2f6f8f"


def plot_acts(figures: Mapping[str, Any], name: str, path: Path) -> None:
    """P(give) by bond and by cost with 95 % intervals, the world's own rates dashed; and by cell where there are cells."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cells = {name: row for name, row in figures.get("act_rate_by_cell", {}).items() if name.startswith("bond")}
    panels = [(by, [f"{row[by]:.0f}" for row in rows], rows) for by in ("bond", "cost")
              for rows in [figures[f"act_rate_by_{by}"]]]
    if cells:
        panels.append(("bond, and the word", [name.replace("_", "\n") for name in cells], list(cells.values())))
    whose = "" if cells or "competent" in figures else " (bonds 1 to 3)"
    figure = Figure(figsize=(3.9 * len(panels), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (by, labels, rows) in zip(axes, panels, strict=True):
        _points(axis, labels, rows, "competent" not in figures)
        axis.set_xlabel({"bond": "bond (good deeds)", "cost": f"cost{whose}"}.get(by, by))
        axis.set_ylim(-0.02, 1.02)
    axes[0].set_ylabel("P(give)")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(name)
    figure.savefig(path, dpi=130)


def _points(axis: Axes, labels: Sequence[str], rows: Sequence[Mapping[str, Any]], world: bool) -> None:
    at, cells = list(range(len(rows))), "\n" in "".join(labels)
    if world:
        axis.plot(at, [row["world"] for row in rows], linestyle="none" if cells else "--", marker="_", markersize=14,
                  color=_WORLD, label="the world's rate")
    axis.vlines(at, [row["low"] for row in rows], [row["high"] for row in rows], color=_OWN)
    axis.plot(at, [row["value"] for row in rows], marker="o", linestyle="none" if cells else "-", color=_OWN,
              label="the subject")
    axis.set_xticks(at, labels)


def plot_probe(probe: Mapping[str, Any], name: str, path: Path) -> None:
    """The probe's accuracy at the decision after every block, and at earlier sentence ends after the best block."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    best = probe["layers"][probe["best_block"]]
    curve = [(0, best), *((row["sentences_before"], row) for row in probe["curve"])]
    for axis, places in ((left, list(enumerate(probe["layers"]))), (right, [(-back, row) for back, row in curve])):
        for key, label, colour, chance in (("binary", "stranger or bond 3", _OWN, 0.5), ("bond", "bond 0 to 3", _SECOND, 0.25)):
            x = [place for place, _ in places]
            axis.plot(x, [row[key]["value"] for _, row in places], marker="o", color=colour, label=label)
            axis.fill_between(x, [row[key]["low"] for _, row in places], [row[key]["high"] for _, row in places], color=colour,
                              alpha=0.15, linewidth=0)
            axis.axhline(chance, color=colour, linestyle=":", linewidth=1)
        axis.xaxis.get_major_locator().set_params(integer=True)
    left.set_xlabel("at the decision, after block")
    right.set_xlabel(f"sentence ends before the decision (0), after block {probe['best_block']}")
    left.set_ylabel("accuracy, held-out stories")
    left.set_ylim(0, 1.02)
    figure.legend(*left.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=2)
    figure.suptitle(name)
    figure.savefig(path, dpi=130)
