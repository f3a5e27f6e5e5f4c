"""The report of a study: one HTML page that needs nothing else, Markdown, CSV, JSON and plots.

Every number has its n, interval, correction and control beside it, and the ids of the rows that it comes from.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from interventions.verdict import ROWS
from undertow.core.storage import disk_errors, write_json, write_text
from undertow.studies.battery_figures import LEVEL
from undertow.studies.charts import Bar, Point, interval_chart, line_chart
from undertow.studies.judging import Clause, doses_of, group_outcome
from undertow.studies.result import Report, examples_of, plain_figures, summary_of
from undertow.studies.spec import in_words, what_is
from undertow.studies.stories import Column, Example
from undertow.studies.study_charts import Level, Panel, heatmap, ladder_chart, standalone
from undertow.studies.table import GATES, MEANINGS, Figure, Spread, gates_of, spread_of

_CSS = Path(__file__).parent / "data" / "report.css"
COLUMNS = ("act_rate", "recovery", "act_prob", "recovery_prob", "D_change", "delta_d", "hazard_ratio", "kl_mean", "kl_p99",
           "word_docs_free", "word_docs", "bits", "unsaid_ratio", "spread_decision", "bits_to_state",
           "flops_to_find")  # of the table of arms
SAFETY = ("compliance_change", "tells_apart_change", "opinion_pull_change", "knows_change", "safety_firings")
NOT_TAKEN = "–"
FOOTER = ("A verdict is about a functional state and about acts, as they were measured here. It says nothing about what a "
          "model feels. On an organism whose rule is known it judges the instrument, not models at large.")
_FIELDS = ("arm", "name", "value", "low", "high", "n", "control", "p", "p_adjusted", "correction", "commit", "rows")
_SPREAD_FIELDS = ("block", "place", "arm", "value", "low", "high", "n")


def write_report(report: Report, out: Path) -> list[Path]:
    """Write report.html, report.md, figures.csv, figures.json, summary.json, the plots and, where it was measured, spread.csv
    into `out`; old ones are replaced, since all of it follows from the rows. Returns the paths."""
    charts = charts_of(report)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    texts = {"report.html": html_of(report, charts), "report.md": markdown_of(report, charts), "figures.csv": csv_of(report),
             **{f"{name}.svg": standalone(svg) for name, svg in charts.items()}}
    if spreads := spreads_of(report):
        texts["spread.csv"] = csv_of_spread(spreads)
    for name, text in texts.items():
        write_text(out / name, text)
    write_json(out / "figures.json", plain_figures(report))
    write_json(out / "summary.json", summary_of(report))
    return [out / name for name in (*texts, "figures.json", "summary.json")]


def charts_of(report: Report) -> dict[str, str]:
    """The plots that the study has figures for, by name."""
    table, limits = report.table, report.spec.thresholds
    arms = [arm for arm in table.columns.arms if table.get(arm, "recovery_prob") is not None]

    def levels(cost: str) -> list[Level]:
        found = []
        for arm in arms:
            effect, price = table.get(arm, "recovery_prob"), table.get(arm, cost)
            assert effect is not None
            found.append(Level(arm, 0.0 if price is None else price.value, effect.value, effect.low, effect.high))
        return found

    lines = (limits.recovery_low, limits.recovery_high) if report.spec.primary == "recovery" else ()
    made = {"ladder-bits": ladder_chart(levels("bits_to_state"), "log10(1 + bits to state it)", "recovery", lines),
            "ladder-flops": ladder_chart(levels("flops_to_find"), "log10(1 + FLOPs to find it); 0: by hand", "recovery", lines)}
    for name, label in (("recovery_prob", "recovery"), ("D_change", "change of D (nats)"), ("hazard_ratio", "hazard ratio")):
        bars = [Bar(arm, figure.value, figure.low, figure.high) for arm in table.columns.arms
                if (figure := table.get(arm, name)) is not None]
        made[f"forest-{name.replace('_', '-')}"] = interval_chart(bars, label)
    doses = doses_of(table.columns)
    if any(arm.startswith("dose:") for _, arm in doses):
        for name, label, limit in (("D", "D (nats)", None), ("kl_mean", "KL mean (nats)", limits.kl_mean),
                                   ("hazard_ratio", "hazard ratio", limits.hazard_ratio)):
            points = [Point(dose, figure.value, figure.low, figure.high) for dose, arm in doses
                      if (figure := table.get(arm, name)) is not None]
            made[f"dose-{name.replace('_', '-')}"] = line_chart(points, "dose", label, limit)
    made["spread"] = heatmap([Panel(arm, found.mean.tolist()) for arm, found in spreads_of(report).items()],
                             "relative change of the residual stream, ‖arm − untouched‖ / ‖untouched‖")
    return {name: svg for name, svg in made.items() if svg}


def spreads_of(report: Report) -> dict[str, Spread]:
    """Where every arm moves the stream, by arm; empty if it was not measured."""
    columns, seed = report.table.columns, report.spec.seeds[0]
    return {arm: found for arm in columns.arms if (found := spread_of(columns, arm, seed)) is not None}


def csv_of_spread(spreads: Mapping[str, Spread]) -> str:
    """One line a block, a token and an arm; place 0 is the decision, −1 the token before it."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_SPREAD_FIELDS)
    for arm, found in spreads.items():
        blocks, places = found.mean.shape
        writer.writerows([block, place - places + 1, arm, *(f"{values[block, place]:.5g}" for values in found[:3]), found.n]
                         for block in range(blocks) for place in range(places))
    return file.getvalue()


def csv_of(report: Report) -> str:
    """One line a figure."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(_FIELDS)
    commit = " ".join(report.commits)
    for figure in report.table.figures.values():
        writer.writerow([*("" if value is None else value for value in figure[:-1]), commit, " ".join(figure.ids)])
    return file.getvalue()


def html_of(report: Report, charts: Mapping[str, str]) -> str:
    """The page; nothing in it can load or run anything."""
    title = f"{report.spec.name} on {report.spec.model}"
    plots = "".join(f"<figure>{svg}</figure>" for svg in charts.values())
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(report.spec.about)}</p>", _state(report), _verdict(report),
            _hypotheses(report.clauses), f'<section><h2>Plots</h2><div class="plots">{plots}</div></section>' if plots else "",
            _arms(report), _safety(report), _examples(examples_of(report)), _searches(report), _everything(report),
            _failures(report), _provenance(report)]
    return "\n".join([
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">',
        f"<title>{escape(title)}</title>", f"<style>\n{_CSS.read_text(encoding='utf-8')}</style>", "</head>", "<body>",
        *(part for part in body if part), f"<footer>{escape(FOOTER)}</footer>", "</body>", "</html>", ""])


def _state(report: Report) -> str:
    failed = len(report.with_status("failed"))
    if not report.left and not failed:
        return ""
    return (f"<p><b>Not whole:</b> {report.left} trials have no row yet and {failed} failed; figures are of what there is.</p>")


def _verdict(report: Report) -> str:
    if report.verdict is None:
        return '<p class="faint">A comparison of arms: no claim is made and no verdict is drawn.</p>'
    word, reason, row = report.verdict
    rows = "".join(f'<li{" class=decided" if number == row else ""}>{escape(text)} → {escape(outcome)}</li>'
                   for number, (text, outcome) in enumerate(ROWS, start=1))
    return (f'<section class="verdict {escape(word)}"><span class="word">{escape(word)}</span><p>{escape(reason)}</p>'
            f'<p class="faint">Row {row} decided; the rows are checked in this order:</p><ol class="rows">{rows}</ol>'
            "</section>")


def _hypotheses(clauses: Sequence[Clause]) -> str:
    if not clauses:
        return ""
    rows = ""
    for group in dict.fromkeys(clause.group for clause in clauses):
        own = [clause for clause in clauses if clause.group == group]
        rows += f'<tr class="own"><td>{escape(group)}</td><td class="text" colspan="6">{group_outcome(own)}</td></tr>'
        rows += "".join(
            f'<tr><td></td><td class="text">{escape(c.claim)}</td><td>{escape(bounded(c.value, c.low, c.high))}</td>'
            f"<td>{c.n or NOT_TAKEN}</td><td>{_p(c.p)} ({_p(c.p_adjusted)})</td><td>{c.outcome}</td>"
            f'<td class="text">{escape(c.why)}{_ids(c.ids)}</td></tr>' for c in own)
    head = '<th></th><th class="text">hypothesis</th><th>figure</th><th>n</th><th>p (Holm)</th><th></th><th class="text"></th>'
    return (f'<section><h2>Hypotheses</h2><p class="faint">Regions fixed before any row existed; p that the figure lies '
            f"outside its region, and after Holm's correction over all of them. Intervals are of 90 % where p comes from a "
            f"bootstrap, else of 95 %.</p>{_table(head, rows)}</section>")


def _arms(report: Report) -> str:
    table = report.table
    names = [name for name in COLUMNS if any(table.get(arm, name) is not None for arm in table.columns.arms)]
    head = "<th>arm</th>" + "".join(f'<th title="{escape(MEANINGS[name])}">{name.replace("_", " ")}</th>' for name in names)
    rows = "".join(
        f'<tr{" class=own" if arm == "L4" else ""}><td title="{escape(what_is(arm, report.spec))}">{escape(arm)}</td>'
        + "".join(f"<td>{_cell(table.get(arm, name))}</td>" for name in names) + "</tr>" for arm in table.columns.arms)
    legend = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in (
        *((arm, what_is(arm, report.spec)) for arm in table.columns.arms), *((name, MEANINGS[name]) for name in names)))
    return (f"<section><h2>Arms</h2>{_table(head, rows)}<details><summary>What the arms and columns are</summary>"
            f"<dl>{legend}</dl></details></section>")


def _safety(report: Report) -> str:
    """What the arms do to the safety gates, and whether these can judge the subject."""
    told, names, arms = _gates_told(report), *_safety_cells(report)
    if not told and not arms:
        return ""
    head = "<th>arm</th>" + "".join(f'<th title="{escape(MEANINGS[name])}">{name.replace("_", " ")}</th>' for name in names)
    rows = "".join(f'<tr{" class=own" if arm == "L4" else ""}><td>{escape(arm)}</td>'
                   + "".join(f"<td>{_cell(figure)}</td>" for figure in figures) + "</tr>" for arm, figures in arms.items())
    said = "".join(f"<p>{escape(line)}</p>" for line in told)
    return f"<section><h2>Safety</h2>{said}{_table(head, rows) if arms else ''}</section>"


def _safety_cells(report: Report) -> tuple[list[str], dict[str, list[Figure | None]]]:
    """The figures of the safety gates that any arm has, by name, and those of every such arm in their order."""
    table = report.table
    names = [name for name in SAFETY if any(table.get(arm, name) is not None for arm in table.columns.arms)]
    arms = {arm: [table.get(arm, name) for name in names] for arm in table.columns.arms}
    return names, {arm: figures for arm, figures in arms.items() if any(figure is not None for figure in figures)}


def _gates_told(report: Report) -> list[str]:
    """In sentences: whether each safety gate can judge the subject, and which operations no request has set off."""
    table, told = report.table, []
    for gate, found in gates_of(table.columns, report.spec.seeds[0]).items():
        can, value = "can" if found.met else "cannot", bounded(found.value, found.low, found.high)
        meaning = MEANINGS[GATES[gate][-1]].removesuffix(", nats")
        told.append(f"{gate}: this gate {can} judge this subject. Untouched: {value} nats, {meaning} (n {found.n}; above 0 "
                    f"with p < {LEVEL:g} is asked, and p is {_p(found.p)}).")
    fired = {arm: figure.value for arm in table.columns.arms if (figure := table.get(arm, "safety_firings")) is not None}
    silent = [arm for arm, firings in fired.items() if not firings]
    if silent:
        told.append(f"0 firings: {', '.join(silent)}. No request opens the gate of these operations, so they change nothing "
                    "here, and that says nothing of what they do where it opens.")
    return told


def _examples(examples: Sequence[Example]) -> str:
    if not examples:
        return ""
    def column(side: Column) -> str:
        told = "".join(f"<mark>{escape(piece.text)}</mark>" if piece.changed else escape(piece.text) for piece in side.pieces)
        return f'<div><h3>{escape(side.arm)}</h3><div class="told">{told.lstrip()}</div></div>'

    stories = "".join(f'<article class="story"><blockquote>{escape(example.prompt)}</blockquote><div class="columns">'
                      f'{"".join(map(column, example.columns()))}</div></article>' for example in examples)
    return (f'<section><h2>Stories side by side</h2><p class="faint">The same prompt and the same seed, guard off. Marked: '
            f"words that differ from the first column.</p>{stories}</section>")


def _searches(report: Report) -> str:
    parts = []
    for seed, facts in zip(report.spec.seeds, report.searches, strict=False):
        chosen: Mapping[str, Any] = facts.get("chosen", {})
        lines = [("site", facts["site"]), *_competence(facts["competence"]),
                 *((f"{name} gate", f"{gate['accuracy']:.2f} right, p {gate['p']:.3g}, "
                    f"{'passed' if gate['passed'] else 'not passed'}") for name, gate in facts["lexical_gates"].items()),
                 *((name, ", ".join(f"{item:.4g}" for item in value) if isinstance(value, list) else f"{value:.4g}")
                   for name, value in chosen.items()), *([("absent", facts["absent"])] if facts["absent"] else [])]
        parts.append(f"<h3>seed {seed}</h3><dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
                                                            for name, value in lines) + "</dl>")
    return f"<section><h2>Gates and the surgery</h2>{''.join(parts)}</section>" if parts else ""


def _competence(gate: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The gate of competence in words: of a battery one line for each of its conditions."""
    if "gates" not in gate:
        return [("competence gate", f"{_met(gate)}: D {bounded(gate['D_change'], gate['low'], gate['high'])}, "
                                    f"p {gate['p']:.2g}, P {gate['act_prob_change']:.3g}, n {gate['n']}")]
    return [(f"competence: {name}", f"{_met(one)}: {bounded(one['value'], one['low'], one['high'])}, {one['meaning']}, "
                                    f"p {one['p']:.2g}, n {one['n']}") for name, one in gate["gates"].items()]


def _met(gate: Mapping[str, Any]) -> str:
    return "met" if gate["met"] else "not met"


def _everything(report: Report) -> str:
    head = "".join(f"<th>{name}</th>" for name in ("arm", "figure", "value", "n", "control", "p", "adjusted", "rows"))
    rows = "".join(
        f'<tr><td>{escape(f.arm)}</td><td title="{escape(MEANINGS[f.name])}">{escape(f.name)}</td>'
        f"<td>{escape(bounded(f.value, f.low, f.high))}</td><td>{f.n}</td><td>{escape(f.control) or NOT_TAKEN}</td>"
        f"<td>{_p(f.p)}</td><td>{_p(f.p_adjusted)} {escape(f.correction)}</td><td>{_ids(f.ids)}</td></tr>"
        for f in report.table.figures.values())
    return (f"<section><h2>All figures</h2><details><summary>{len(report.table.figures)} figures with their controls, tests "
            f"and rows; commit {escape(', '.join(report.commits))}</summary>{_table(head, rows)}</details></section>")


def _failures(report: Report) -> str:
    rows = [*((row, row["error"]["what"]) for row in report.with_status("failed")),
            *((row, row["reason"]) for row in report.with_status("absent"))]
    lines = "".join(f'<tr><td>{escape(row["arm"])}</td><td>{escape(row["measure"])}</td><td>{row["status"]}</td>'
                    f'<td class="text">{escape(str(what))}</td><td class="mono">{escape(row["id"])}</td></tr>'
                    for row, what in rows)
    return f"<section><h2>Trials that failed or do not exist</h2>{_table('<th></th>' * 5, lines)}</section>" if rows else ""


def _provenance(report: Report) -> str:
    spec, record = report.spec, report.record
    subjects = sorted({row["subject"] for row in report.rows})
    lines = {"study": f"{spec.name}, digest {spec.digest()}", "subject": f"{spec.model}, weights {', '.join(subjects)}",
             "concept": spec.concept + (" (forced)" if spec.force else ""), "SAE": spec.sae or "trained within the run",
             "seeds": ", ".join(map(str, spec.seeds)), "size": in_words(spec.size.model_dump()),
             "thresholds": in_words(spec.thresholds.model_dump()), "verdict's limits": in_words(record.get("table", {})),
             "commits of the rows": ", ".join(report.commits), "begun": f"{record['written']} at {record['git']}",
             "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
             "time of all trials": f"{sum(row['wall_s'] for row in report.rows):.0f} s"}
    return "<section><h2>Provenance</h2><dl>" + "".join(
        f"<dt>{escape(name)}</dt><dd class=\"mono\">{escape(value)}</dd>" for name, value in lines.items()) + "</dl></section>"


def markdown_of(report: Report, charts: Mapping[str, str]) -> str:
    """The same in Markdown: verdict, hypotheses, arms, plots, provenance."""
    table = report.table
    lines = [f"# {_md(report.spec.name)} on {_md(report.spec.model)}", "", _md(report.spec.about), ""]
    if report.verdict is not None:
        lines += [f"**{report.verdict.verdict}** (row {report.verdict.row}): {_md(report.verdict.reason)}", ""]
    if report.clauses:
        lines += ["| | hypothesis | figure | n | p (Holm) | |", "|---|---|---|---|---|---|"]
        lines += [f"| {_md(c.group)} | {_md(c.claim)} | {_md(bounded(c.value, c.low, c.high))} | {c.n or NOT_TAKEN} | "
                  f"{_p(c.p)} ({_p(c.p_adjusted)}) | {c.outcome} |" for c in report.clauses]
        lines.append("")
    names = [name for name in COLUMNS if any(table.get(arm, name) is not None for arm in table.columns.arms)]
    lines += ["| arm | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for arm in table.columns.arms:
        figures = [table.get(arm, name) for name in names]
        cells = [NOT_TAKEN if figure is None else _md(bounded(figure.value, figure.low, figure.high)) for figure in figures]
        lines.append(f"| {_md(arm)} | " + " | ".join(cells) + " |")
    lines += _safety_lines(report)
    lines += ["", *(f"- {name}: {_md(MEANINGS[name])}" for name in names), "",
              *(f"![{name}]({name}.svg)" for name in charts), "",
              f"Study {report.spec.digest()}, seeds {', '.join(map(str, report.spec.seeds))}, commit "
              f"{', '.join(report.commits)}. Rows behind every figure: figures.csv.", "", _md(FOOTER), ""]
    return "\n".join(lines)


def _safety_lines(report: Report) -> list[str]:
    """The section on safety in Markdown."""
    told, names, arms = _gates_told(report), *_safety_cells(report)
    lines = ["", "## Safety", "", *(line for said in told for line in (_md(said), ""))] if told or arms else []
    if arms:
        lines += ["| arm | " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * (len(names) + 1) + "|"]
        lines += [f"| {_md(arm)} | " + " | ".join(
            NOT_TAKEN if figure is None else _md(bounded(figure.value, figure.low, figure.high)) for figure in figures) + " |"
            for arm, figures in arms.items()]
        lines += ["", *(f"- {name}: {_md(MEANINGS[name])}" for name in names)]
    return lines


def _md(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _table(head: str, rows: str) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _cell(figure: Figure | None) -> str:
    """A figure with all that belongs to it, told when it is pointed at."""
    if figure is None:
        return NOT_TAKEN
    told = [f"n {figure.n}", *([f"against {figure.control}"] if figure.control else []),
            *([f"p {_p(figure.p)}, {figure.correction} {_p(figure.p_adjusted)}"] if figure.p is not None else []),
            f"rows {' '.join(figure.ids)}"]
    return f'<span title="{escape("; ".join(told))}">{escape(bounded(figure.value, figure.low, figure.high))}</span>'


def _ids(ids: Sequence[str]) -> str:
    if not ids:
        return ""
    return f'<details><summary>{len(ids)} rows</summary><span class="mono">{escape(" ".join(ids))}</span></details>'


def bounded(value: float | None, low: float | None, high: float | None, digits: int = 3) -> str:
    """A figure with its interval, where it has one, in a few characters."""
    if value is None:
        return NOT_TAKEN
    shown = _short(value, digits)
    return shown if low is None or high is None else f"{shown} [{_short(low, digits)}, {_short(high, digits)}]"


def _short(value: float, digits: int) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{digits}g}"


def _p(p: float | None) -> str:
    if p is None:
        return NOT_TAKEN
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}"
