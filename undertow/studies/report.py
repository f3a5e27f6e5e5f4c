"""The report of a study as one HTML page that needs nothing else: no script, no network, plots and styles inline."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple, final

from interventions.verdict import MAX_HAZARD_RATIO, MAX_KL_MEAN, ROWS
from undertow.core.errors import SpecError
from undertow.studies.charts import Bar, Point, interval_chart, line_chart
from undertow.studies.stories import Column, Example

_STYLE = Path(__file__).parent / "data" / "report.css"
NOT_TAKEN = "–"
ARM_MEASURES: tuple[tuple[str, str, str], ...] = (
    ("n", "n", "stories"),
    ("act_rate", "acts", "share of sampled stories with the costly act [95 % interval]"),
    ("D", "D", "log p(costly) − log p(keep), nats, mean over stories and wordings"),
    ("hazard_mean", "hazard", "mean probability, guard off, that a form of the word starts in the next token, in strangers' "
     "stories up to the decision"),
    ("hazard_max", "max", "its largest value"),
    ("kl_mean", "KL", "KL(untouched‖arm) on neutral text, nats a token, mean"),
    ("kl_p99", "p99", "its 99th percentile"),
    ("guard_hits", "guard hits", "sampled tokens that the strict guard would have refused"),
    ("words_expected", "words", "how often the word was to be expected in all of the sampled documents, guard off: its "
     "probability summed over what was written [95 % interval]"),
    ("word_docs_free", "word docs", "documents, sampled with the guard off, in which the word stands"),
    ("word_docs", "guarded", "documents, sampled with the guard on, in which the word stands"),
)
_ARMS = {
    "stranger": "the untouched subject", "base": "the untouched subject", "bonded": "the context in which it acts so by itself",
    "L1": "a prompt names the topic", "L2": "an instruction gives the role", "L3": "trained on affectionate text",
    "L4": "the surgery", "L4-before": "the surgery, off from the decision on", "sham": "the surgery with no change",
    "random": "matched random features", "lexical": "features of the word", "diffmean": "difference of means added",
    "constant": "one direction added at every token",
}
_FIGURES: tuple[tuple[str, str], ...] = (
    ("recovery", "recovery: (L4 − stranger) / (bonded − stranger), in act rate"),
    ("recovery_before", "recovery with the surgery off from the decision on"),
    ("delta_d", "ΔD, nats, the twin's change taken off"),
    ("random_effect_max", "largest effect of matched random sets"),
    ("hazard_ratio", "hazard, L4 over untouched"),
    ("act_writer_share", "share of the effect that only writes the act's words"),
    ("unsaid_ratio", "unsaid ratio: effect left with features of the word clamped"),
)
_BOUNDS = ("_low", "_lower", "_high", "_upper")
_SHOWN = {"arms", "verdict", "verdict_reason", "verdict_row", "title", *(name for name, _ in _FIGURES)}


@final
class Dose(NamedTuple):
    """One point of the dose curve, measured on development stories.

    Attributes:
        gain: the dose; 0 is none.
        effect: in the unit of the study's effect, with its 95 % interval where it was taken.
        kl_mean: nats a token, where it was taken.
        hazard_ratio: arm over base, where it was taken.
    """

    gain: float
    effect: float
    effect_low: float | None = None
    effect_high: float | None = None
    kl_mean: float | None = None
    hazard_ratio: float | None = None


def report_html(summary: Mapping[str, Any], stories: Sequence[Example] = (), features: Sequence[Mapping[str, Any]] = (),
                curve: Sequence[Dose] = ()) -> str:
    """The page. What was not measured is shown as not measured, never as 0.

    Args:
        summary: what summary.json holds: `verdict`, `verdict_reason`, `arms`, `recovery`, …; `verdict_row` (from 1) marks the
            row that decided, `title` heads the page. Names that this page does not know are listed under provenance.
        stories: examples, shown side by side.
        features: the selected features, each `id` with its evidence by name; a list becomes a fold-out (contexts).
        curve: doses.

    Raises SpecError for a summary without a verdict.
    """
    for name in ("verdict", "verdict_reason"):
        if name not in summary:
            raise SpecError(f"the summary has no {name!r}, so there is nothing to report", f"it holds {', '.join(summary)}")
    title = str(summary.get("title", "Undertow: feature surgery"))
    body = [f"<h1>{escape(title)}</h1>", _verdict(summary), _figures(summary), _arms(summary.get("arms", {})),
            _stories(stories), _curve(curve), _features(features), _provenance(summary)]
    return "\n".join([
        '<!doctype html>', '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # nothing in the page may load or run anything, whatever a story or a name says
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">',
        f"<title>{escape(title)}: {escape(str(summary['verdict']))}</title>",
        f"<style>\n{_STYLE.read_text(encoding='utf-8')}</style>", "</head>", "<body>", *(part for part in body if part),
        "<footer>A verdict is about a functional state and about acts, as they were measured here. It says nothing about what "
        "a model feels. On an organism whose rule is known it judges the instrument, not models at large.</footer>",
        "</body>", "</html>", ""])


def _verdict(summary: Mapping[str, Any]) -> str:
    word, row = str(summary["verdict"]), summary.get("verdict_row")
    rows = "".join(f'<li{" class=decided" if number == row else ""}>{escape(text)} → {escape(outcome)}</li>'
                   for number, (text, outcome) in enumerate(ROWS, start=1))
    decided = f"Row {row} decided; the rows are checked in this order:" if row else "The rows, in the order they are checked:"
    kind = word if word in {outcome for _, outcome in ROWS} else "other"
    return (f'<section class="verdict {kind}"><span class="word">{escape(word)}</span>'
            f"<p>{escape(str(summary['verdict_reason']))}</p>"
            f'<p class="faint">{decided}</p><ol class="rows">{rows}</ol></section>')


def _figures(summary: Mapping[str, Any]) -> str:
    cells = [f'<div class="figure"><b>{_figure(summary[name])}</b> {_bounds(summary, name)}'
             f'<p class="faint">{escape(meaning)}</p></div>' for name, meaning in _FIGURES if name in summary]
    return f'<div class="figures">{"".join(cells)}</div>' if cells else ""


def _arms(arms: Mapping[str, Mapping[str, Any]]) -> str:
    if not arms:
        return ""
    measures = [(name, head, meaning) for name, head, meaning in ARM_MEASURES if any(name in arm for arm in arms.values())]
    head = "".join(f'<th title="{escape(meaning)}">{escape(short)}</th>' for _, short, meaning in measures)
    rows = "".join(f'<tr{" class=own" if name == "L4" else ""}><td title="{escape(_ARMS.get(name, ""))}">{escape(name)}</td>'
                   + "".join(f"<td>{_with_bounds(arm, measure)}</td>" for measure, _, _ in measures) + "</tr>"
                   for name, arm in arms.items())
    legend = _list([(short, meaning) for _, short, meaning in measures] + [(arm, _ARMS[arm]) for arm in arms if arm in _ARMS])
    charts = [interval_chart([_bar(name, arm, measure) for name, arm in arms.items() if _is_number(arm.get(measure))], label)
              for measure, label in (("act_rate", "act rate"), ("D", "D (nats)"))]
    return (f"<section><h2>Arms</h2>{_table(f'<th>arm</th>{head}', rows)}"
            f"<details><summary>What the arms and columns are</summary>{legend}</details>{_plots(charts)}</section>")


def _table(head: str, rows: str) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _bar(name: str, arm: Mapping[str, Any], measure: str) -> Bar:
    return Bar(name, arm[measure], arm.get(f"{measure}_low"), arm.get(f"{measure}_high"))


def _stories(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    return ('<section><h2>Stories side by side</h2><p class="faint">The same prompt and the same seed. Marked: in the first '
            "column the words that the second does not have there; in the others the words that differ from the first.</p>"
            + "".join(_story(example) for example in examples) + "</section>")


def _story(example: Example) -> str:
    columns = "".join(f'<div><h3>{escape(column.arm)} <span class="faint">{_changed(column)}</span></h3>'
                      f'<div class="told">{_marked(column)}</div></div>' for column in example.columns())
    return (f'<article class="story"><blockquote>{escape(example.prompt)}</blockquote>'
            f'<span class="faint">seed {example.seed}</span><div class="columns">{columns}</div></article>')


def _changed(column: Column) -> str:
    return f"{column.changed:.0%} marked" if column.changed else "nothing marked"


def _marked(column: Column) -> str:
    return "".join(f"<mark>{escape(piece.text)}</mark>" if piece.changed else escape(piece.text)
                   for piece in column.pieces).lstrip()


def _curve(curve: Sequence[Dose]) -> str:
    if not curve:
        return ""
    panels: tuple[tuple[list[Point], str, float | None], ...] = (
        ([Point(d.gain, d.effect, d.effect_low, d.effect_high) for d in curve], "effect", None),
        ([Point(d.gain, d.kl_mean) for d in curve if d.kl_mean is not None], "KL mean (nats)", MAX_KL_MEAN),
        ([Point(d.gain, d.hazard_ratio) for d in curve if d.hazard_ratio is not None], "hazard ratio", MAX_HAZARD_RATIO))
    columns = [name for name in Dose._fields if any(getattr(dose, name) is not None for dose in curve)]
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    rows = "".join("<tr>" + "".join(f"<td>{_figure(getattr(d, name))}</td>" for name in columns) + "</tr>" for d in curve)
    return ('<section><h2>Dose and response</h2><p class="faint">On development stories. Dashed: the limit of the verdict.</p>'
            + _plots(line_chart(points, "dose", label, limit) for points, label, limit in panels)
            + f"<details><summary>The figures</summary>{_table(head, rows)}</details></section>")


def _features(features: Sequence[Mapping[str, Any]]) -> str:
    if not features:
        return ""
    names = list(dict.fromkeys(name for feature in features for name in feature))
    columns = [name for name in names if name == "id"] + [name for name in names if name != "id"]
    quoted = {name for name in columns if any(isinstance(feature.get(name), (list, tuple)) for feature in features)}
    head = "".join(f"<th{' class=text' if name in quoted else ''}>{escape(str(name).replace('_', ' '))}</th>"
                   for name in columns)
    rows = "".join("<tr>" + "".join(_cell(feature.get(name)) for name in columns) + "</tr>" for feature in features)
    return (f'<section><h2>Selected features</h2><p class="faint">{len(features)} features, in the order of selection. They '
            f"carry no name: a short id and what was measured of them.</p>{_table(head, rows)}</section>")


def _cell(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        quotes = "".join(f"<blockquote>{escape(str(item))}</blockquote>" for item in value)
        return f'<td class="text"><details><summary>{len(value)} shown</summary>{quotes}</details></td>'
    return f"<td>{_figure(value)}</td>"


def _provenance(summary: Mapping[str, Any]) -> str:
    shown = _SHOWN | {name + bound for name in _SHOWN for bound in _BOUNDS}
    rest = [(name, _nested(value)) for name, value in summary.items() if name not in shown]
    return f"<section><h2>Gates and provenance</h2>{_list(rest, raw=True)}</section>" if rest else ""


def _nested(value: Any) -> str:
    """A value of JSON as HTML."""
    if isinstance(value, Mapping):
        return _list([(str(name), _nested(inner)) for name, inner in value.items()], raw=True)
    if isinstance(value, (list, tuple)):
        return ", ".join(_nested(inner) for inner in value)
    return f'<span class="mono">{_figure(value)}</span>'


def _list(pairs: Sequence[tuple[str, str]], raw: bool = False) -> str:
    """A definition list; `raw` says that the definitions are HTML already."""
    items = (f"<dt>{escape(name)}</dt><dd>{value if raw else escape(value)}</dd>" for name, value in pairs)
    return f"<dl>{''.join(items)}</dl>"


def _plots(charts: Iterable[str]) -> str:
    drawn = "".join(f"<figure>{chart}</figure>" for chart in charts if chart)
    return f'<div class="plots">{drawn}</div>' if drawn else ""


def _with_bounds(values: Mapping[str, Any], name: str) -> str:
    return f"{_figure(values.get(name))} {_bounds(values, name)}".strip()


def _bounds(values: Mapping[str, Any], name: str) -> str:
    """What is known of the interval of a figure."""
    low, high = (next((values[name + bound] for bound in pair if name + bound in values), None)
                 for pair in (_BOUNDS[:2], _BOUNDS[2:]))
    if low is None and high is None:
        return ""
    if low is None or high is None:
        return f"({'≤' if low is None else '≥'} {_figure(high if low is None else low)})"
    return f"[{_figure(low)}, {_figure(high)}]"


def _figure(value: Any) -> str:
    """A value in a few characters, escaped."""
    if value is None:
        return NOT_TAKEN
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return escape(f"{value:.3g}") if math.isfinite(value) else "not finite"
    if isinstance(value, int):
        return f"{value:,}"
    return escape(str(value))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
