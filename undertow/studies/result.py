"""The result of a study: everything that its folder says, reckoned anew from the rows whenever it is asked for."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from interventions.verdict import Verdict
from undertow.studies.judging import Clause, group_outcome, hypotheses, judged
from undertow.studies.ledger import open_ledger, record_of
from undertow.studies.preparing import SEARCH
from undertow.studies.spec import StudySpec
from undertow.studies.stories import Example
from undertow.studies.table import BASE, Table, gave, table_of
from undertow.studies.trials import trials_of

SHOWN_STORIES = 3
_TOP = {"recovery": ("L4", "recovery"), "recovery_before": ("L4-before", "recovery"), "delta_d": ("L4", "delta_d"),
        "hazard_ratio": ("L4", "hazard_ratio"), "unsaid_ratio": ("L4", "unsaid_ratio"),
        "random_effect_max": ("random", "random_max"), "lexical_hazard_ratio": ("lexical", "hazard_ratio")}


@final
class Report(NamedTuple):
    """A study and what came of it.

    Attributes:
        spec: what was asked.
        record: study.json: digest, versions, commit of its beginning.
        table: all figures.
        clauses: its hypotheses.
        verdict: of a claim; None for a study that makes none.
        searches: search.json of every seed that was searched.
        rows: the latest row of every trial.
        left: trials without a row.
    """

    spec: StudySpec
    record: dict[str, Any]
    table: Table
    clauses: list[Clause]
    verdict: Verdict | None
    searches: list[dict[str, Any]]
    rows: list[dict[str, Any]]
    left: int

    @property
    def commits(self) -> list[str]:
        """Of the code that made the rows."""
        return sorted({str(row["git"]) for row in self.rows})

    def with_status(self, status: str) -> list[dict[str, Any]]:
        """The rows of one status: done, failed, absent."""
        return [row for row in self.rows if row["status"] == status]


def read_result(folder: Path) -> Report:
    """Reckon the result of a study's folder. Raises ArtifactError if it holds no study, or rows that cannot be read."""
    ledger = open_ledger(folder)
    spec, trials = ledger.spec, trials_of(ledger.spec)
    rows = [ledger.rows[trial.key] for trial in trials if trial.key in ledger.rows]
    searches = [json.loads(path.read_text(encoding="utf-8")) for seed in spec.seeds
                if (path := folder / f"search-{seed}" / SEARCH).is_file()]
    table = table_of(spec, rows)
    return Report(spec, record_of(folder), table, hypotheses(spec, table), judged(spec, table, searches), searches, rows,
                  len(trials) - len(rows))


def summary_of(report: Report) -> dict[str, Any]:
    """The result under the names that all results use. What was not measured is absent."""
    arms: dict[str, dict[str, Any]] = {}
    for (arm, name), figure in report.table.figures.items():
        held = arms.setdefault(arm, {"n": figure.n})
        held |= _bounded(name, figure.value, figure.low, figure.high)
    spec = report.spec
    found: dict[str, Any] = {"study": spec.name, "digest": spec.digest(), "model": spec.model, "arms": arms}
    for name, (arm, which) in _TOP.items():
        figure = report.table.get(arm, which)
        if figure is not None:
            found |= _bounded(name, figure.value, figure.low, figure.high)
    if "hazard_ratio_high" in found:
        found["hazard_ratio_upper"] = found["hazard_ratio_high"]
    if report.searches:
        found["competence"] = report.searches[0]["competence"]
    if report.verdict is not None:
        found |= {"verdict": report.verdict.verdict, "verdict_reason": report.verdict.reason, "verdict_row": report.verdict.row}
    groups = list(dict.fromkeys(clause.group for clause in report.clauses))
    return found | {
        "hypotheses": [{key: _plain(value) for key, value in clause._asdict().items() if value is not None}
                       for clause in report.clauses],
        "outcomes": {group: group_outcome([clause for clause in report.clauses if clause.group == group]) for group in groups},
        "seeds": list(spec.seeds), "trials": {status: len(report.with_status(status)) for status in
                                                     ("done", "failed", "absent")} | {"left": report.left},
        "wall_s": round(sum(row["wall_s"] for row in report.rows), 1), "versions": report.record["versions"],
        "commits": report.commits}


def row_means(row: Mapping[str, Any]) -> dict[str, float]:
    """Mean of every figure of a row over its stories, by arm, measure and name; empty for a row without values."""
    values: Mapping[str, Any] = row.get("values", {})
    found: dict[str, float] = {}
    for name, entries in values.items():
        figures = _numbers(entries)
        if figures and name not in ("story", "text", "set", "cost"):
            found[f"{row['arm']}/{row['measure']}/{name}"] = float(np.mean(figures))
    return found


def _numbers(value: Any) -> list[float]:
    """All numbers in nested lists."""
    if isinstance(value, list):
        return [number for entry in value for number in _numbers(entry)]
    return [float(value)] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def examples_of(report: Report, arms: Sequence[str] = (BASE, "L2", "L4", "L4-before")) -> list[Example]:
    """Sampled stories side by side, those first in which the surgery changed the act."""
    shown = [arm for arm in arms if report.table.columns.get(arm, "sample") is not None]
    columns = report.table.columns.paired("sample", *shown) if len(shown) > 1 else None
    if columns is None:
        return []
    base, other = columns[0], columns[shown.index("L4")] if "L4" in shown else columns[1]
    changed = gave(base) != gave(other)
    order = sorted(range(base.n), key=lambda i: (not changed[i], i))[:SHOWN_STORIES]
    return [Example("… " + str(base.values["prompt"][i]), base.units[i][1],
                    {arm: _sentence(str(column.values["text"][i])) for arm, column in zip(shown, columns, strict=True)})
            for i in order]


def _sentence(text: str) -> str:
    end = text.rfind(".")
    return text[: end + 1] if end >= 0 else text


def _bounded(name: str, value: float, low: float | None, high: float | None) -> dict[str, Any]:
    found = {name: _plain(value)}
    return found if low is None or high is None else found | {f"{name}_low": _plain(low), f"{name}_high": _plain(high)}


def _plain(value: Any) -> Any:
    """As JSON has it: an infinite figure is written out."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def plain_figures(report: Report) -> list[Mapping[str, Any]]:
    """Every figure as a JSON mapping, with the ids of its rows."""
    return [{key: _plain(value) for key, value in figure._asdict().items() if value is not None and value != ""}
            for figure in report.table.figures.values()]
