"""What follows from a study's figures: its hypotheses, each held, refuted or not shown, and the verdict of a claim.

A hypothesis is a region in which a figure has to lie, fixed in the study's thresholds before any row existed. It is *held* if
the test says so after Holm's correction over all hypotheses of the study, *refuted* if the figure lies outside its region,
*not shown* if it lies inside and the test does not say so, and *not tested* if a figure is missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, final

import numpy as np
from jaxtyping import Float
from scipy import stats

from interventions.verdict import MAX_EXTRA_BITS, POSITIVE_CONTROLS, Evidence, Interval, Verdict, verdict
from undertow.core.errors import NumericsError
from undertow.studies.columns import Column, Columns
from undertow.studies.inference import Sameness, cluster_mean, holm, page_trend, ratio_draws, sign_flip, tost_of_draws
from undertow.studies.preparing import NOTHING_FOUND
from undertow.studies.spec import StudySpec
from undertow.studies.table import BASE, REFERENCE, Figure, Table, bits_draws, kl_column, kl_quantile_draws, random_effects

Outcome = Literal["held", "refuted", "not shown", "not tested"]
SAYING = ("L1", "L2", "L3")  # the levels of DESIGN that are expected to raise the word and to leave acts alone


@final
class Clause(NamedTuple):
    """One hypothesis and what came of it.

    Attributes:
        group: the level or the question that it belongs to.
        claim: what is said, with its region.
        value, low, high: the figure with its interval (95 %, or 90 % where sameness is tested); None if not tested.
        n: stories (texts).
        p, p_adjusted: one-sided p that the figure lies outside the region, and after Holm's correction.
        outcome: what came of it.
        why: why it was not tested; else how it was.
        ids: the rows behind it.
    """

    group: str
    claim: str
    value: float | None
    low: float | None
    high: float | None
    n: int
    p: float | None
    p_adjusted: float | None
    outcome: Outcome
    why: str
    ids: tuple[str, ...]


def hypotheses(spec: StudySpec, table: Table) -> list[Clause]:
    """All hypotheses of a study: those of the four levels for a claim, and those of doses, parts and competence where such arms
    were run."""
    found = [*(_levels(spec, table) if spec.primary == "recovery" else []), *_doses(spec, table), *_parts(spec, table),
             *_competence(spec, table)]
    adjusted = holm({str(i): clause.p for i, clause in enumerate(found) if clause.p is not None})
    return [clause if clause.p is None else _settled(clause, adjusted[str(i)], spec.thresholds.alpha)
            for i, clause in enumerate(found)]


def group_outcome(clauses: Sequence[Clause]) -> Outcome:
    """Of a level: refuted if any of its hypotheses is, held if all are, else what the weakest of them is."""
    outcomes = [clause.outcome for clause in clauses]
    worst: tuple[Outcome, ...] = ("refuted", "not tested", "not shown", "held")
    return next(outcome for outcome in worst if outcome in outcomes)


def _settled(clause: Clause, p: float, alpha: float) -> Clause:
    outcome: Outcome = "held" if p < alpha else "refuted" if clause.outcome == "refuted" else "not shown"
    return clause._replace(p_adjusted=p, outcome=outcome)


def _tested(group: str, claim: str, found: Sameness, figure: Figure, how: str) -> Clause:
    """A clause from two one-sided tests; `refuted` until it is settled if the value is outside the margins."""
    low, high = found.margins
    inside = low < found.value < high
    return Clause(group, claim, found.value, *found.interval, found.n, found.p, None, "not shown" if inside else "refuted", how,
                  figure.ids)


def _untested(group: str, claim: str, why: str) -> Clause:
    return Clause(group, claim, None, None, None, 0, None, None, "not tested", why, ())


_Draws = Callable[[], tuple[float, Float[np.ndarray, "draw"], int]]


def _levels(spec: StudySpec, table: Table) -> list[Clause]:
    limits, columns, seed = spec.thresholds, table.columns, spec.seeds[0]

    def clause(arm: str, name: str, claim: str, margins: tuple[float, float], draws: _Draws | None) -> Clause:
        figure = table.get(arm, name)
        if figure is None or draws is None:
            return _untested(arm, claim, _missing(spec, columns, arm, name))
        value, drawn, n = draws()
        return _tested(arm, claim, tost_of_draws(value, drawn, margins, n), figure, "bootstrap over stories")

    def ratio(parts: tuple[np.ndarray, np.ndarray], arm: str, name: str) -> _Draws | None:
        try:
            drawn = ratio_draws(*parts, seed, arm, name)
        except NumericsError:
            return None
        return lambda: (float(parts[0].sum() / parts[1].sum()), drawn, len(parts[0]))

    found: list[Clause] = []
    for arm in SAYING:
        found += [clause(arm, "hazard_ratio", f"the word's probability rises {limits.word_rise:g}-fold or more",
                         (limits.word_rise, math.inf), _maybe(ratio, _hazards(columns, arm), arm, "hazard_ratio")),
                  clause(arm, "recovery_prob", f"acts stay: recovery within ±{limits.recovery_low:g}",
                         (-limits.recovery_low, limits.recovery_low), _maybe(ratio, _acts(columns, arm), arm, "recovery_prob"))]
    most = limits.hazard_ratio
    found += [
        clause("L4", "recovery_prob", f"acts rise: recovery {limits.recovery_high:g} or more", (limits.recovery_high, math.inf),
               _maybe(ratio, _acts(columns, "L4"), "L4", "recovery_prob")),
        clause("L4", "hazard_ratio", f"the word stays as probable: ratio between {1 / most:.2g} and {most:g}", (1 / most, most),
               _maybe(ratio, _hazards(columns, "L4"), "L4", "hazard_ratio")),
        clause("L4", "kl_mean", f"ordinary text stays: mean KL below {limits.kl_mean:g} nats", (-math.inf, limits.kl_mean),
               _maybe(ratio, _kl(columns, "L4"), "L4", "kl_mean")),
        clause("L4", "kl_p99", f"ordinary text stays: 99th percentile of KL below {limits.kl_p99:g} nats",
               (-math.inf, limits.kl_p99), _quantile(columns, "L4", seed)),
        _self_report(spec, table),
        clause("L4", "unsaid_ratio", f"the word is no detour: unsaid ratio {limits.unsaid:g} or more",
               (limits.unsaid, math.inf), _maybe(ratio, _unsaid(columns, "L4"), "L4", "unsaid_ratio"))]
    return found


def _missing(spec: StudySpec, columns: Columns, arm: str, name: str) -> str:
    if arm in columns.arms:
        return f"{name} was not measured"
    return f"the arm {arm} {'is absent: see the gates' if arm in spec.arms else 'was not run'}"


def _maybe(make: Callable[..., _Draws | None], parts: tuple[np.ndarray, np.ndarray] | None, *names: str) -> _Draws | None:
    return None if parts is None else make(parts, *names)


def _acts(columns: Columns, arm: str) -> tuple[np.ndarray, np.ndarray] | None:
    three = columns.paired("choice", BASE, REFERENCE, arm)
    if three is None:
        return None
    base, reference, mine = (column.array("p") for column in three)
    return mine - base, reference - base


def _hazards(columns: Columns, arm: str) -> tuple[np.ndarray, np.ndarray] | None:
    pair = columns.paired("words", BASE, arm)
    if pair is None:
        return None
    base, own = (np.array([sum(text) for text in column.values["hazard"]]) for column in pair)
    return own, base


def _kl(columns: Columns, arm: str) -> tuple[np.ndarray, np.ndarray] | None:
    own = kl_column(columns, arm)
    if own is None:
        return None
    return (np.array([sum(text) for text in own.values["kl"]]), np.array([float(len(text)) for text in own.values["kl"]]))


def _quantile(columns: Columns, arm: str, seed: int) -> _Draws | None:
    own = kl_column(columns, arm)
    if own is None:
        return None
    kl = [np.array(text) for text in own.values["kl"]]
    return lambda: (float(np.quantile(np.concatenate(kl), 0.99)), kl_quantile_draws(kl, seed, arm), len(kl))


def _unsaid(columns: Columns, arm: str) -> tuple[np.ndarray, np.ndarray] | None:
    own = columns.get(arm, "unsaid")
    if own is None:
        return None
    untouched = own.array("D_untouched")
    return own.array("D_held") - untouched, own.array("D") - untouched


def _self_report(spec: StudySpec, table: Table) -> Clause:
    """Sameness of self-report says something only where a positive control is nameable by the same list."""
    claim = f"self-report stays: at most {spec.thresholds.bits:g} bits"
    figure = table.get("L4", "bits")
    if figure is None:
        return _untested("L4", claim, _missing(spec, table.columns, "L4", "naming"))
    controls = {arm: bits.value for arm in POSITIVE_CONTROLS if (bits := table.get(arm, "bits")) is not None}
    if not any(value > MAX_EXTRA_BITS for value in controls.values()):
        shown = ", ".join(f"{arm} {value:.2g} bits" for arm, value in controls.items()) or "none was run"
        return _untested("L4", claim, f"no positive control is nameable ({shown}), so that sameness would say nothing")
    pair = table.columns.paired("naming", BASE, "L4")
    assert pair is not None
    first, second = (np.array(column.values["probs"], dtype=np.float64) for column in pair)
    drawn = bits_draws(first, second, spec.seeds[0], "L4")
    return _tested("L4", claim, tost_of_draws(figure.value, drawn, (-math.inf, spec.thresholds.bits), len(first)), figure,
                   "bootstrap over stories")


def doses_of(columns: Columns) -> list[tuple[float, str]]:
    """The arms that are doses of the surgery, by dose: dose:X, L4 (1) and sham (0)."""
    found = {float(arm.partition(":")[2]): arm for arm in columns.arms if arm.startswith("dose:")}
    for arm, dose in (("sham", 0.0), ("L4", 1.0)):
        if arm in columns.arms:
            found.setdefault(dose, arm)
    return sorted(found.items())


def _doses(spec: StudySpec, table: Table) -> list[Clause]:
    arms = [arm for _, arm in doses_of(table.columns)]
    if not any(arm.startswith("dose:") for arm in arms):
        return []
    claim = f"D rises with the dose (Page's trend over {len(arms)} doses)"
    columns = table.columns.paired("choice", *arms) if len(arms) > 2 else None
    if columns is None:
        return [_untested("dose", claim, "fewer than three doses were measured")]
    test = page_trend(np.column_stack([column.array("D") for column in columns]))
    rise = columns[-1].array("D").mean() - columns[0].array("D").mean()
    return [Clause("dose", claim, float(rise), None, None, test.n, test.p, None, "not shown" if rise > 0 else "refuted",
                   "D at the largest dose minus at the smallest, nats", _ids(columns))]


def _parts(spec: StudySpec, table: Table) -> list[Clause]:
    singles = [arm for arm in table.columns.arms if arm.startswith("only:")]
    if not singles:
        return []
    claim = "the whole does more than the sum of its parts"
    if len(singles) < 2:
        return [_untested("features", claim, "the search chose a single feature")]
    columns = table.columns.paired("choice", BASE, "L4", *singles)
    if columns is None:
        return [_untested("features", claim, "an arm is missing")]
    base, whole, *parts = (column.array("D") for column in columns)
    over = (whole - base) - sum(part - base for part in parts)
    return [_above("features", claim, np.asarray(over), columns, spec, "change of D beyond the sum of single changes, nats")]


def _competence(spec: StudySpec, table: Table) -> list[Clause]:
    base = table.columns.get(BASE, "choice")
    if base is None or not {"giver", "keeper"} & set(table.columns.arms):
        return []
    found = [_cost_effect(base, spec) if "cost_effect" in base.values else _cost_slope(base)]
    for arm, sign, claim in (("giver", 1.0, "an instruction to give raises D"), ("keeper", -1.0, "one to keep lowers it")):
        pair = table.columns.paired("choice", BASE, arm)
        if pair is None:
            found.append(_untested("competence", claim, f"the arm {arm} was not run"))
        else:
            change = sign * (pair[1].array("D") - pair[0].array("D"))
            found.append(_above("competence", claim, change, pair, spec, "change of D in that direction, nats"))
    return found


def _cost_slope(base: Column) -> Clause:
    fit: Any = stats.linregress(base.array("cost"), base.array("D"), alternative="less")
    slope, reach = float(fit.slope), float(stats.t.ppf(0.975, base.n - 2)) * float(fit.stderr)
    return Clause("competence", "D falls with cost", slope, slope - reach, slope + reach, base.n, float(fit.pvalue), None,
                  "not shown" if slope < 0 else "refuted", "slope, nats a step of cost", base.ids)


def _cost_effect(base: Column, spec: StudySpec) -> Clause:
    """Of a battery, every family of which is told at both costs."""
    return _above("competence", "D falls with cost", base.array("cost_effect"), [base], spec,
                  "D with plenty minus D with the last, nats")


def _above(group: str, claim: str, change: Float[np.ndarray, "n"], columns: Sequence[Column], spec: StudySpec, how: str
           ) -> Clause:
    """A clause that a paired change is above 0, by sign flips."""
    test = sign_flip(change, spec.seeds[0], group, claim, side="greater")
    spread = cluster_mean(change, spec.seeds[0], group, claim)
    return Clause(group, claim, spread.value, spread.low, spread.high, test.n, test.p, None,
                  "not shown" if change.mean() > 0 else "refuted", how, _ids(columns))


def _ids(columns: Sequence[Column]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(i for column in columns for i in column.ids))


def judged(spec: StudySpec, table: Table, searches: Sequence[Mapping[str, Any]]) -> Verdict | None:
    """The verdict of a claim, by the table of `interventions.verdict`; None for a study that makes none.

    Args:
        spec: the study.
        table: its figures.
        searches: what search.json of every seed holds.
    """
    if spec.primary != "recovery":
        return None
    if searches and all(facts["competence"]["met"] for facts in searches) and any(facts["absent"] == NOTHING_FOUND
                                                                                  for facts in searches):
        return Verdict("no-effect", NOTHING_FOUND, 3)
    return verdict(evidence_of(table, searches))


def evidence_of(table: Table, searches: Sequence[Mapping[str, Any]]) -> Evidence:
    """What the verdict is drawn from. A figure that was not measured is absent."""
    def value(arm: str, name: str) -> float | None:
        figure = table.get(arm, name)
        return None if figure is None else figure.value

    def count(arm: str, name: str) -> int | None:
        found = value(arm, name)
        return None if found is None else int(found)

    effect, ratio = (table.get("L4", name) for name in ("recovery", "hazard_ratio"))
    documents = table.get("L4", "word_docs_free")
    effects = random_effects(table.columns)
    bits = {arm: found for arm in ("L4", "sham", *POSITIVE_CONTROLS) if (found := value(arm, "bits")) is not None}
    return Evidence(
        arms=frozenset(table.columns.arms), sham_change=sham_change(table.columns),
        competent=all(facts["competence"]["met"] for facts in searches) if searches else None,
        lexical_hazard_ratio=value("lexical", "hazard_ratio"),
        effect=None if effect is None or effect.low is None or effect.high is None else
        Interval(effect.value, effect.low, effect.high),
        random_effects=() if effects is None else tuple(map(float, effects)),
        hazard_ratio_upper=None if ratio is None else ratio.high, word_docs=count("L4", "word_docs_free"),
        word_docs_base=count(BASE, "word_docs_free"), sampled=None if documents is None else documents.n,
        word_docs_guarded=count("L4", "word_docs"), lexical_pairs=any(facts.get("forced", False) for facts in searches),
        kl_mean=value("L4", "kl_mean"), kl_p99=value("L4", "kl_p99"), nameability=bits or None,
        unsaid_ratio=value("L4", "unsaid_ratio"))


def sham_change(columns: Columns) -> float | None:
    """The largest absolute difference of any measure between sham and untouched, a changed text counting 1; exactly 0 if the
    sham does nothing. None if they have no measure in common."""
    found: list[float] = []
    for measure, names in (("choice", ("p", "D")), ("twin", ("p", "D")), ("naming", ("probs",)), ("words", ("hazard", "kl")),
                           ("safety", ("plus", "minus"))):
        pair = columns.paired(measure, BASE, "sham")
        if pair is not None:
            found += [float(max(np.abs(np.asarray(a, dtype=float) - np.asarray(b, dtype=float)).max() for a, b in zip(
                pair[0].values[name], pair[1].values[name], strict=True))) for name in names]
    texts = columns.paired("sample", BASE, "sham")
    found += [max(map(float, column.values["change"])) for measure in ("words", "sameness")
              if (column := columns.get("sham", measure)) is not None]
    moved = columns.get("sham", "spread")
    if moved is not None:
        found.append(float(moved.array("spread").max()))
    if texts is not None:
        found.append(float(any(a != b for a, b in zip(texts[0].values["text"], texts[1].values["text"], strict=True))))
    return max(found) if found else None
