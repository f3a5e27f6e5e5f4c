"""Finished runs with a verdict: found below a folder, opened read-only, and shown as values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, final

from markupsafe import Markup

from dashboards.finding import folders, kind_of
from dashboards.rendering import value_of
from dashboards.store import slug
from interventions.recipe import Recipe
from interventions.verdict import MAX_KL_MEAN, ROWS
from undertow.core.errors import ArtifactError, UserError
from undertow.core.storage import open_artifact
from undertow.studies.charts import Bar, Point, interval_chart, line_chart
from undertow.studies.report import ARM_MEASURES
from undertow.studies.running import KIND
from undertow.studies.stories import Column, Example

ICONS = {"unsaid": "✓", "said": "✗", "no-effect": "○", "inconclusive": "?"}
MEANINGS = {"unsaid": "acts changed; words and ordinary text did not", "said": "the word, or other text, came with the effect",
            "no-effect": "nothing changed beyond what random features do", "inconclusive": "nothing can be concluded"}
# files keep no order of names: the untouched subject comes first, since the others are compared with it
_ARMS = ("stranger", "base", "bonded", "L1", "L2", "L3", "L4", "L4-before", "sham", "random", "lexical", "diffmean", "constant")
_HEADLINES = (("recovery", "recovery of the act rate"), ("recovery_before", "with the surgery off from the decision on"),
              ("delta_d", "ΔD, nats, the twin's change taken off"), ("random_effect_max", "largest matched random set"),
              ("hazard_ratio", "hazard, operated over untouched"),
              ("act_writer_share", "share that only writes the act's words"),
              ("unsaid_ratio", "effect left with the word's features clamped"))
_BOUNDS = ("_low", "_lower", "_high", "_upper")


class Run(NamedTuple):
    """One run: its name in addresses, its folder, and its summary."""

    key: str
    path: Path
    summary: dict[str, Any]

    @property
    def verdict(self) -> str:
        """The word."""
        return str(self.summary.get("verdict", "?"))

    def at(self, *names: str) -> Any:
        """A figure of the summary by the path to it; None if it was not taken."""
        found: Any = self.summary
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found


class Runs(NamedTuple):
    """Runs by name, and what could not be opened."""

    found: dict[str, Run]
    trouble: tuple[str, ...]


class Figure(NamedTuple):
    """A headline figure: what it is called, its value, and its interval in words."""

    meaning: str
    value: str
    bounds: str


class Tried(NamedTuple):
    """A set of features at one dose; figures in words."""

    latents: tuple[int, ...]
    trigger: tuple[int, ...]
    figures: dict[str, Any]

    @property
    def where(self) -> str:
        """At which tokens it acts, in words."""
        if not self.trigger:
            return "everywhere"
        which, within = ", ".join(map(str, self.trigger)), self.figures.get("within", 1)
        return which if within == 1 else f"{which}: at {self.figures['at_least']} of the last {within} tokens"


class RunPage(NamedTuple):
    """Everything that the page of one run shows.

    Attributes:
        run: the run.
        rows: rows of the verdict's table, each with its word; `decided` is the number of the one that decided, from 1.
        figures: headline figures.
        columns: titles of the arms table with their meanings; `arms` its rows.
        charts: plots of the arms, and of doses.
        stories: prompt, seed and columns with the changed words marked.
        trials: sets and doses that were tried.
        features: the chosen features.
        recipe: what was operated; None if nothing was found to operate on.
        provenance: the rest of the summary, flat.
    """

    run: Run
    rows: tuple[tuple[str, str], ...]
    decided: int
    figures: tuple[Figure, ...]
    columns: tuple[tuple[str, str], ...]
    arms: tuple[tuple[str, tuple[str, ...]], ...]
    charts: tuple[Markup, ...]
    stories: tuple[tuple[Example, list[Column]], ...]
    trials: tuple[Tried, ...]
    dose_charts: tuple[Markup, ...]
    features: tuple[dict[str, Any], ...]
    recipe: Recipe | None
    provenance: tuple[tuple[str, str], ...]


@final
class RunShelf:
    """Runs in `folder` and `depth` levels below it; looked through at every question, so that a new run appears by itself."""

    def __init__(self, folder: Path | None, depth: int = 3) -> None:
        self._folder, self._depth = folder, depth

    def list(self) -> Runs:
        """Every run, newest name last."""
        found: dict[str, Run] = {}
        trouble: list[str] = []
        for inside in () if self._folder is None else folders(self._folder, self._depth):
            if kind_of(inside) != KIND:
                continue
            try:
                summary = _json(open_artifact(inside, KIND).path / "summary.json", dict)
            except UserError as error:
                trouble.append(str(error))
                continue
            name = slug(inside.resolve().name)
            names = (name if number == 1 else f"{name}-{number}" for number in range(1, len(found) + 2))
            key = next(free for free in names if free not in found)
            found[key] = Run(key, inside, summary)
        return Runs(found, tuple(trouble))


def run_page(run: Run) -> RunPage:
    """The page of a run. Raises ArtifactError for files that are not what a run writes."""
    summary = run.summary
    try:
        arms = _in_order(summary.get("arms", {}))
        tried = _json(run.path / "trials.json", list)
        trials = tuple(Tried(tuple(trial["latents"]), tuple(trial.get("trigger", ())), trial) for trial in tried)
        examples = [Example(story["prompt"], story["seed"], _in_order(story["texts"]))
                    for story in _json(run.path / "stories.json", list)]
        measures = [measure for measure in ARM_MEASURES if any(measure[0] in arm for arm in arms.values())]
        recipe = run.path / "recipe.yaml"
        return RunPage(
            run, tuple(ROWS), int(summary.get("verdict_row") or 0), _headlines(summary),
            tuple((short, meaning) for _, short, meaning in measures),
            tuple((arm, tuple(_with_bounds(figures, name) for name, _, _ in measures)) for arm, figures in arms.items()),
            _arm_charts(arms), tuple((example, example.columns()) for example in examples), trials, _dose_charts(trials),
            tuple({"id": feature["id"], **feature} for feature in summary.get("features", ())),
            Recipe.load(recipe) if recipe.is_file() else None, tuple(_rest(summary)))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{run.path} holds something that this version does not read: {error!r}",
                            "its own report still opens: report.html in that folder") from None


def _in_order(arms: Mapping[str, Any]) -> dict[str, Any]:
    return {arm: arms[arm] for arm in sorted(arms, key=lambda arm: _ARMS.index(arm) if arm in _ARMS else len(_ARMS))}


def _json(path: Path, kind: type) -> Any:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, kind):
        raise ArtifactError(f"{path} holds {type(found).__name__}, not {kind.__name__}")
    return found


def _headlines(summary: Mapping[str, Any]) -> tuple[Figure, ...]:
    return tuple(Figure(meaning, value_of(summary[name]), _bounds(summary, name)) for name, meaning in _HEADLINES
                 if name in summary)


def _with_bounds(figures: Mapping[str, Any], name: str) -> str:
    return f"{value_of(figures.get(name))} {_bounds(figures, name)}".strip()


def _bounds(figures: Mapping[str, Any], name: str) -> str:
    low, high = (next((figures[name + bound] for bound in pair if name + bound in figures), None)
                 for pair in (_BOUNDS[:2], _BOUNDS[2:]))
    if low is None or high is None:
        return "" if low is None and high is None else f"(≤ {value_of(high)})" if low is None else f"(≥ {value_of(low)})"
    return f"[{value_of(low)}, {value_of(high)}]"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _arm_charts(arms: Mapping[str, Mapping[str, Any]]) -> tuple[Markup, ...]:
    charts = [interval_chart([Bar(arm, figures[name], figures.get(f"{name}_low"), figures.get(f"{name}_high"))
                              for arm, figures in arms.items() if _number(figures.get(name))], label)
              for name, label in (("act_rate", "act rate"), ("D", "D (nats)"), ("hazard_mean", "hazard, mean"))]
    return tuple(Markup(chart) for chart in charts if chart)


def _dose_charts(trials: tuple[Tried, ...]) -> tuple[Markup, ...]:
    """The chosen set at every dose that was tried, as in the run's own report."""
    same = sorted((trial.figures for trial in trials if trial.latents == trials[-1].latents), key=lambda trial: trial["dose"])
    wanted = (("d", "D (nats)", None), ("kl_mean", "KL mean (nats)", MAX_KL_MEAN))
    charts = [line_chart([Point(trial["dose"], trial[name]) for trial in same if _number(trial.get(name))], "dose", label,
                         limit) for name, label, limit in wanted]
    return tuple(Markup(chart) for chart in charts if chart)


def _rest(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the page does not show elsewhere; nested names are joined by dots."""
    shown = {"arms", "features", "title", "verdict", "verdict_reason", "verdict_row",
             *(name + bound for name, _ in _HEADLINES for bound in ("", *_BOUNDS))}
    return [pair for name, value in summary.items() if name not in shown for pair in _flat(name, value)]


def _flat(name: str, value: Any) -> list[tuple[str, str]]:
    if isinstance(value, dict):
        return [pair for inner, item in value.items() for pair in _flat(f"{name}.{inner}", item)]
    return [(name, ", ".join(map(value_of, value)) if isinstance(value, list) else value_of(value))]
