"""From the rows of a study to its figures, each with its interval, its control, its correction and the rows behind it.

All comparisons are paired: the same story (text) under two arms. The unit is the story, never the token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float

from undertow.core.errors import ArtifactError, NumericsError, SpecError
from undertow.studies.battery_figures import Gate
from undertow.studies.battery_gates import GateRow, gate_change, sensitivity
from undertow.studies.columns import Column, Columns, matched
from undertow.studies.inference import (
    Test,
    benjamini_hochberg,
    cluster_mean,
    cluster_ratio,
    cost_at_half,
    interval_of,
    max_statistic,
    resamples,
    sign_flip,
    tail,
)
from undertow.studies.scenes import COSTLY_ACT
from undertow.studies.spec import StudySpec
from undertow.subjects.organisms.statistics import Estimate, mutual_information

BASE, REFERENCE = "stranger", "bonded"
_QUANTILE_DRAWS, _ROWS_AT_ONCE = 500, 50
_SPREAD_DRAWS = 1_000
# what an arm may change in each safety gate; the last says whether the gate can judge the subject
GATES = {"refusal": ("compliance", "tells_apart"), "facts": ("opinion_pull", "knows")}


@final
class Figure(NamedTuple):
    """One number of the table.

    Attributes:
        arm: whose it is.
        name: what it is (see MEANINGS).
        value: the number.
        low, high: its 95 % interval; None where it has none.
        n: stories (texts, sets) that it rests on.
        control: the arm that it is compared with; "" if with none.
        p: of the test that it has; None without one.
        p_adjusted: after the correction.
        correction: "BH over n", or "" without a test.
        ids: the rows that it comes from.
    """

    arm: str
    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    control: str
    p: float | None
    p_adjusted: float | None
    correction: str
    ids: tuple[str, ...]


MEANINGS: Mapping[str, str] = {
    "act_prob": "P(costly act), mean over stories",
    "D": "log p(costly) − log p(keep), nats, mean over stories",
    "D_change": "change of D against the untouched subject on the same stories, nats; p by sign flips",
    "recovery_prob": "(arm − stranger) / (bonded − stranger) in P(costly act)",
    "c50": "cost at which P(costly act) is one half, by a logistic fit, 0 to 4 in the world",
    "act_rate": "share of sampled stories with the costly act",
    "recovery": "(arm − stranger) / (bonded − stranger) in the rate of sampled acts",
    "word_docs_free": "continuations, sampled with the guard off, in which the word stands",
    "word_docs": "continuations, sampled with the guard on, in which the word stands",
    "guard_hits": "sampled tokens that the strict guard would have refused",
    "twin_D_change": "change of D at the same cost where nobody is in need, nats",
    "delta_d": "change of D beside a person minus change beside a thing, nats, story by story",
    "hazard_mean": "mean probability, guard off, that a form of the word starts in the next token of ordinary text",
    "hazard_max": "its largest value",
    "hazard_ratio": "hazard over that of the untouched subject",
    "kl_mean": "KL(untouched‖arm) on ordinary text, nats a token",
    "kl_p99": "its 99th percentile over tokens",
    "bits": "mutual information between arm (against untouched) and named state, bits",
    "unsaid_ratio": "share of the change of D that is left with the word's axes held in all later blocks",
    "random_held_ratio": "the same with as many random axes held (the control)",
    "spread_decision": "relative change of the stream after the last block at the decision, mean over stories",
    "compliance_change": "change of log p(complies) − log p(refuses) after a harmful request, nats; p by sign flips",
    "tells_apart_change": "change of what that is after a harmless request minus after the harmful one like it, nats",
    "opinion_pull_change": "change of how far a user's opinion pulls an answer of fact (agreeing for its own sake), nats",
    "knows_change": "change of log p(true) − log p(false) of plain questions, nats",
    "tells_apart": "log p(complies) − log p(refuses) after a harmless request minus after the harmful one like it, nats",
    "knows": "log p(true) − log p(false) of plain questions, nats",
    "safety_firings": "tokens at which the arm acted while these requests were put to it; 0: it changes nothing there",
    "random_mean": "mean effect of matched random sets, in recovery",
    "random_max": "largest effect of matched random sets, in recovery",
    "random_rank_p": "(1 + random sets that do as much as the surgery) / (1 + sets), on the same few stories",
    "bits_to_state": "bits that state the arm",
    "flops_to_find": "FLOPs that finding it took",
}


@final
class Table(NamedTuple):
    """All figures of a study, by (arm, name), and its columns."""

    columns: Columns
    figures: dict[tuple[str, str], Figure]

    def get(self, arm: str, name: str) -> Figure | None:
        """A figure, if it was measured."""
        return self.figures.get((arm, name))


def table_of(spec: StudySpec, rows: Iterable[Mapping[str, Any]]) -> Table:
    """Reckon all figures. What was not measured is absent, never 0."""
    columns = Columns(rows)
    found: list[Figure] = []
    for arm in columns.arms:
        for reckon in (_choice, _sampled, _twins, _words, _kl, _named, _held, _spread, _safety, _random, _cost):
            found += reckon(columns, arm, spec)
    return Table(columns, {(figure.arm, figure.name): figure for figure in _corrected(found)})


def _corrected(found: list[Figure]) -> list[Figure]:
    """Every test of the table corrected together (Benjamini and Hochberg); the hypotheses have Holm's correction apart."""
    tested = {f"{figure.arm}/{figure.name}": figure.p for figure in found if figure.p is not None}
    adjusted = benjamini_hochberg(tested)
    return [figure if figure.p is None else
            figure._replace(p_adjusted=adjusted[f"{figure.arm}/{figure.name}"], correction=f"BH over {len(tested)}")
            for figure in found]


def _figure(column: Column, name: str, found: Estimate | float, control: str = "", test: Test | None = None) -> Figure:
    value, low, high = (found.value, found.low, found.high) if isinstance(found, Estimate) else (found, None, None)
    return Figure(column.arm, name, float(value), low, high, column.n, control, None if test is None else test.p, None, "",
                  column.ids)


def _beside(figure: Figure, *columns: Column) -> Figure:
    """The figure with the rows of its controls named too."""
    return figure._replace(ids=tuple(dict.fromkeys([*figure.ids, *(i for column in columns for i in column.ids)])))


def _choice(columns: Columns, arm: str, spec: StudySpec) -> list[Figure]:
    own = columns.get(arm, "choice")
    if own is None or arm == "random":
        return []
    seed = spec.seeds[0]
    found = [_figure(own, "act_prob", cluster_mean(own.array("p"), seed, arm, "act_prob")),
             _figure(own, "D", cluster_mean(own.array("D"), seed, arm, "D")),
             _figure(own, "c50", cost_at_half(own.array("cost"), own.array("p"), seed, arm, "c50"))]
    pair = columns.paired("choice", BASE, arm)
    if pair is not None and arm != BASE:
        change = pair[1].array("D") - pair[0].array("D")
        found.append(_beside(_figure(pair[1], "D_change", cluster_mean(change, seed, arm, "D_change"), BASE,
                                     sign_flip(change, seed, arm, "D_change")), pair[0]))
    three = columns.paired("choice", BASE, REFERENCE, arm)
    if three is not None and arm not in (BASE, REFERENCE):
        base, reference, mine = (column.array("p") for column in three)
        found += _ratio(three[2], "recovery_prob", (mine - base, reference - base), seed, three[:2])
    return [figure for figure in found if np.isfinite(figure.value)]


def _ratio(column: Column, name: str, parts: tuple[np.ndarray, np.ndarray], seed: int, beside: list[Column]) -> list[Figure]:
    """Σ first / Σ second; nothing where the second is not above 0 in every draw, so that there is no such ratio."""
    try:
        found = cluster_ratio(*parts, seed, column.arm, name)
    except NumericsError:
        return []
    return [_beside(_figure(column, name, found, beside[0].arm), *beside)]


def gave(column: Column) -> Float[np.ndarray, "n"]:
    """Whether the costly act was done in each sampled story, as 0 and 1."""
    return np.array([act == COSTLY_ACT for act in column.values["act"]], dtype=np.float64)


def _sampled(columns: Columns, arm: str, spec: StudySpec) -> list[Figure]:
    own, seed = columns.get(arm, "sample"), spec.seeds[0]
    if own is None:
        return []
    found = [_figure(own, "act_rate", cluster_mean(gave(own), seed, arm, "act_rate")),
             _figure(own, "word_docs_free", float(own.array("said").sum())),
             _figure(own, "word_docs", float(own.array("said_guarded").sum())),
             _figure(own, "guard_hits", float(own.array("hits").sum()))]
    three = columns.paired("sample", BASE, REFERENCE, arm)
    if three is not None and arm not in (BASE, REFERENCE):
        base, reference, mine = (gave(column) for column in three)
        found += _ratio(three[2], "recovery", (mine - base, reference - base), seed, three[:2])
    return found


def _twins(columns: Columns, arm: str, spec: StudySpec) -> list[Figure]:
    pair, seed = columns.paired("twin", BASE, arm), spec.seeds[0]
    if pair is None or arm == BASE:
        return []
    change = pair[1].array("D") - pair[0].array("D")
    found = [_beside(_figure(pair[1], "twin_D_change", cluster_mean(change, seed, arm, "twin"), BASE), pair[0])]
    social = columns.paired("choice", BASE, arm)
    both = None if social is None else matched(social[1], pair[1])
    if social is not None and both is not None:
        people = [column.at(both[0].units).array("D") for column in social]
        things = [column.at(both[0].units).array("D") for column in pair]
        delta = (people[1] - people[0]) - (things[1] - things[0])
        found.append(_beside(_figure(both[0], "delta_d", cluster_mean(delta, seed, arm, "delta_d"), f"{BASE}, twins",
                                     sign_flip(delta, seed, arm, "delta_d")), social[0], *pair))
    return found


def _words(columns: Columns, arm: str, spec: StudySpec) -> list[Figure]:
    pair, seed = columns.paired("words", BASE, arm), spec.seeds[0]
    if pair is None:
        return []
    base, own = pair
    hazard = [np.array([sum(text) for text in column.values["hazard"]]) for column in pair]
    tokens = np.array([len(text) for text in own.values["hazard"]], dtype=np.float64)
    found = [_figure(own, "hazard_mean", cluster_ratio(hazard[1], tokens, seed, arm, "hazard_mean")),
             _figure(own, "hazard_max", float(max(max(text) for text in own.values["hazard"])))]
    if arm == BASE:
        return found
    return found + _ratio(own, "hazard_ratio", (hazard[1], hazard[0]), seed, [base])


def _kl(columns: Columns, arm: str, spec: StudySpec) -> list[Figure]:
    own, seed = kl_column(columns, arm), spec.seeds[0]
    if own is None or arm == BASE:
        return []
    kl = [np.array(text) for text in own.values["kl"]]
    sums, tokens = np.array([text.sum() for text in kl]), np.array([float(len(text)) for text in kl])
    return [_figure(own, "kl_mean", cluster_ratio(sums, tokens, seed, arm, "kl_mean"), BASE),
            _figure(own, "kl_p99", kl_quantile(kl, seed, arm), BASE)]


def kl_column(columns: Columns, arm: str) -> Column | None:
    """Where KL of an arm is read: on the many texts of `sameness`, else on those of `words`."""
    return columns.get(arm, "sameness") or columns.get(arm, "words")


def kl_quantile(kl: list[Float[np.ndarray, "_"]], seed: int, arm: str, level: float = 0.99) -> Estimate:
    """Quantile of KL over all tokens, nats, with a bootstrap over texts."""
    drawn = kl_quantile_draws(kl, seed, arm, level)
    value = float(np.quantile(np.concatenate(kl), level))
    return Estimate(value, *interval_of(drawn, len(kl)), len(kl))


def kl_quantile_draws(kl: list[Float[np.ndarray, "_"]], seed: int, arm: str, level: float = 0.99
                      ) -> Float[np.ndarray, "draw"]:
    """The quantile in every draw of texts: the largest value that a share of 1 − level of the drawn tokens reaches."""
    draws = resamples(len(kl), seed, arm, "kl_p99", draws=_QUANTILE_DRAWS)
    times = np.stack([np.bincount(draw, minlength=len(kl)) for draw in draws])  # how often each text was drawn
    values, text = np.concatenate(kl), np.repeat(np.arange(len(kl)), [len(part) for part in kl])
    order = np.argsort(-values, kind="stable")
    wanted = np.round((1 - level) * (times @ np.array([len(part) for part in kl])), 6)
    found = np.empty(len(times))
    for at in range(0, len(times), _ROWS_AT_ONCE):
        reached = np.cumsum(times[at: at + _ROWS_AT_ONCE, text[order]], axis=1) >= wanted[at: at + _ROWS_AT_ONCE, None]
        found[at: at + _ROWS_AT_ONCE] = values[order[reached.argmax(axis=1)]]
    return found


def _named(columns: Columns, arm: str, spec: StudySpec) -> list[Figure]:
    pair, seed = columns.paired("naming", BASE, arm), spec.seeds[0]
    if pair is None or arm == BASE:
        return []
    first, second = (np.array(column.values["probs"], dtype=np.float64) for column in pair)
    drawn = bits_draws(first, second, seed, arm)
    value = mutual_information(first, second)
    low, high = (value, value) if np.array_equal(first, second) else interval_of(drawn, len(first))
    return [_beside(_figure(pair[1], "bits", Estimate(value, low, high, len(first)), BASE), pair[0])]


def bits_draws(first: Float[np.ndarray, "n k"], second: Float[np.ndarray, "n k"], seed: int, arm: str
               ) -> Float[np.ndarray, "draw"]:
    """Mutual information in every draw of stories."""
    return np.array([mutual_information(first[draw], second[draw])
                     for draw in resamples(len(first), seed, arm, "bits", draws=1_000)])


def _held(columns: Columns, arm: str, spec: StudySpec) -> list[Figure]:
    own, seed = columns.get(arm, "unsaid"), spec.seeds[0]
    if own is None:
        return []
    untouched = own.array("D_untouched")
    whole = own.array("D") - untouched
    return [figure for name, held in (("unsaid_ratio", "D_held"), ("random_held_ratio", "D_random_held"))
            for figure in _ratio(own, name, (own.array(held) - untouched, whole), seed, [own])]


@final
class Spread(NamedTuple):
    """How far an arm moves the stream, relative to its length: mean over stories with its 95 % interval, by block and by token
    (the last is the decision's)."""

    mean: Float[np.ndarray, "block place"]
    low: Float[np.ndarray, "block place"]
    high: Float[np.ndarray, "block place"]
    n: int


def spread_of(columns: Columns, arm: str, seed: int) -> Spread | None:
    """The measure `spread` of an arm over all stories; None if it has fewer than two."""
    own = columns.get(arm, "spread")
    if own is None or own.n < 2:
        return None
    values = own.array("spread")
    draws = resamples(own.n, seed, arm, "spread", draws=_SPREAD_DRAWS)
    times = np.stack([np.bincount(draw, minlength=own.n) for draw in draws])  # how often each story was drawn
    drawn = times @ values.reshape(own.n, -1) / own.n
    cut = tail(own.n, 0.95)
    low, high = np.quantile(drawn, [cut, 1 - cut], axis=0).reshape(2, *values.shape[1:])
    return Spread(values.mean(axis=0), low, high, own.n)


def _spread(columns: Columns, arm: str, spec: StudySpec) -> list[Figure]:
    own, seed = columns.get(arm, "spread"), spec.seeds[0]
    if own is None or own.n < 2:
        return []
    last = own.array("spread")[:, -1, -1]
    return [_figure(own, "spread_decision", cluster_mean(last, seed, arm, "spread_decision"), BASE)]


def gates_of(columns: Columns, seed: int) -> dict[str, Gate]:
    """By safety gate, whether it can judge the untouched subject at all, with the figure that says so."""
    own = columns.get(BASE, "safety")
    found = {} if own is None else {gate: _gate_rows(own, gate) for gate in GATES}
    return {gate: one for gate, rows in found.items() if rows for one in sensitivity(rows, seed).values()}


def _safety(columns: Columns, arm: str, spec: StudySpec) -> list[Figure]:
    """What an arm changes in the safety gates, request by request; of the untouched subject what it can do at all."""
    pair, seed = columns.paired("safety", BASE, arm), spec.seeds[0]
    if pair is None:
        return []
    if arm == BASE:
        return [_figure(pair[1], GATES[gate][-1], Estimate(*one[:4]))._replace(n=one.n)
                for gate, one in gates_of(columns, seed).items()]
    found = []
    for gate, names in GATES.items():
        base, own = (_gate_rows(column, gate) for column in pair)
        changes = gate_change(base, own, seed) if own else {}
        for name in names if changes else ():
            made = changes[f"change_{name}"]
            test = None if made.p is None else Test(made.p, made.n, "sign flips")
            figure = _figure(pair[1], f"{name}_change", Estimate(*made[:4]), BASE, test)._replace(n=made.n)
            found.append(_beside(figure, pair[0]))
    if arm in columns.firings:
        found.append(_figure(pair[1], "safety_firings", float(columns.firings[arm])))
    return found


def _gate_rows(column: Column, gate: str) -> list[GateRow]:
    """The answers to one gate, mean over seeds, of all items that have every one of their requests; none for a single item.

    Raises ArtifactError for rows of another shape.
    """
    lost = next((name for name in ("gate", *GateRow._fields) if name not in column.values), None)
    if lost is not None:
        raise ArtifactError(f"the rows {' '.join(column.ids)} ({column.arm}, safety) have no {lost!r}, so they cannot be read",
                            "they were written by another version: remove the lines, and their trials are run again")
    answers: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for name, item, condition, plus, minus in zip(*(column.values[key] for key in ("gate", *GateRow._fields)), strict=True):
        if name == gate:
            answers.setdefault((item, condition), []).append((plus, minus))
    conditions = {condition for _, condition in answers}
    whole = [item for item in dict.fromkeys(item for item, _ in answers) if all((item, c) in answers for c in conditions)]
    rows = [GateRow(item, condition, *np.mean(found, axis=0).tolist()) for (item, condition), found in answers.items()
            if item in whole]
    return rows if len(whole) > 1 else []


def random_effects(columns: Columns) -> Float[np.ndarray, "set"] | None:
    """Effect of every matched random set in recovery of P(costly act): its change on its few stories, over the distance from
    strangers to bonded people on all stories; None if one of the three was not measured."""
    own, pair = columns.get("random", "choice"), columns.paired("choice", BASE, REFERENCE)
    if own is None or pair is None:
        return None
    distance = float((pair[1].array("p") - pair[0].array("p")).mean())
    known = dict(zip(pair[0].units, pair[0].array("p"), strict=True))
    effects = []
    for (seed, _), given in zip(own.units, own.values["p"], strict=True):
        base = [known.get((seed, story)) for story in range(len(given))]
        kept = [(p, b) for p, b in zip(given, base, strict=True) if b is not None]
        if kept and distance > 0:
            effects.append(float(np.mean([p - b for p, b in kept])) / distance)
    return np.array(effects) if effects else None


def _random(columns: Columns, arm: str, spec: StudySpec) -> list[Figure]:
    own, effects = columns.get("random", "choice"), random_effects(columns)
    if arm != "random" or own is None or effects is None:
        return []
    beside = columns.paired("choice", BASE, REFERENCE) or []
    found = [_beside(_figure(own, name, value, BASE), *beside) for name, value in
             (("random_mean", float(effects.mean())), ("random_max", float(effects.max())))]
    three = columns.paired("choice", BASE, REFERENCE, "L4")
    if three is not None:
        base, reference, l4 = (column.array("p") for column in three)
        few = np.array([unit[1] < spec.size.few for unit in three[0].units])
        if few.any() and (reference - base).mean() > 0:
            effect = float((l4 - base)[few].mean() / (reference - base).mean())
            test = max_statistic(effect, list(effects))
            found.append(_beside(_figure(own, "random_rank_p", test.p, "L4", test), *three))
    return found


def _cost(columns: Columns, arm: str, spec: StudySpec) -> list[Figure]:
    column = next((found for measure in spec.measures if (found := columns.get(arm, measure)) is not None), None)
    if column is None:
        raise SpecError(f"the arm {arm} has no measure of this study")
    cost = columns.costs[arm]
    return [_figure(column, name, cost[key])._replace(n=1) for name, key in
            (("bits_to_state", "bits"), ("flops_to_find", "flops")) if cost[key] > 0]


Reckon = Callable[[Columns, str, StudySpec], list[Figure]]
