"""Choosing a set, its gate and its dose: proposed by first order, refined where it stands, judged by what it does.

Every gate of the spec gets the set that suits it (`features.balance`), at the largest dose within the limits and at smaller
ones. The best of these is refined (`interventions.refining`) and judged again in the same way. Of all that leaves the word
alone the smallest change of ordinary text is taken with which the act is as likely as was wanted; if none is, the one of the
most likely act. Where everything raises the word, the same is taken of everything, and it is for the verdict to say so.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

from features.balance import Balance, balance, balanced
from interventions.refining import refined
from interventions.tune import Bench, Trial, TuneSpec, judged, largest_dose, opened, response
from undertow.subjects.splicing import Memory

log = logging.getLogger(__name__)
Progress = Callable[[str, int, int], None]


def choose(bench: Bench, pool: Sequence[int], acts: tuple[str, str], spec: TuneSpec, wanted: float = math.inf,
           progress: Progress = lambda phase, done, total: None) -> list[Trial]:
    """Every set and gate that was tried, at every dose that was judged, the best last; empty if no dose of any is within the
    limits.

    Args:
        bench: what to work on.
        pool: candidates, best first; the first `spec.pool` are used.
        acts: the costly and the keeping act.
        spec: limits.
        wanted: P(costly act), as `Trial.acts` has it, beyond which no more is sought.
        progress: called with ("select", gates tried and refined, of how many).
    """
    if not pool:
        return []
    made = balance(bench.dictionary, bench.slopes, pool[: spec.pool], bench.known)
    steps = len(spec.gates) + 1
    trials: list[Trial] = []
    for done, gate in enumerate(spec.gates, start=1):
        proposed = _proposed(made, gate, spec)
        if proposed is not None:
            trials += _at_doses(bench, proposed, acts, spec, spec.factors)
        progress("select", done, steps)

    def worth(trial: Trial) -> tuple[bool, float, float]:
        return trial.word <= spec.word, min(trial.acts, wanted), -trial.kl_p99

    if trials and bench.packs:
        trials += _at_doses(bench, refined(bench, made, max(trials, key=worth), acts[0], spec), acts, spec, spec.fine)
    elif trials:
        log.warning("%s does not compute packed rows exactly, so its set is not refined", bench.subject.name)
    progress("select", steps, steps)
    return sorted(trials, key=worth)


def _proposed(made: Balance, gate: tuple[float, int, int], spec: TuneSpec) -> Trial | None:
    """What first order proposes for a gate; None if nothing does, or if the gate is open too seldom to be judged."""
    price, at_least, within = gate
    found = balanced(made, price, Memory(at_least, within), spec.size)
    if not found.latents or found.open_share < spec.min_open:
        return None
    unknown = float("nan")
    return Trial(found.latents, found.trigger, 1.0, unknown, unknown, unknown, unknown, found.weights, at_least, within)


def _at_doses(bench: Bench, proposed: Trial, acts: tuple[str, str], spec: TuneSpec, factors: Sequence[float]) -> list[Trial]:
    """A set judged at the largest dose within the limits and at smaller ones; empty if there is none."""
    bench = bench._replace(moved=opened(bench, proposed, bench.texts))
    largest = largest_dose(bench, proposed, spec)
    return [] if largest is None else [judged(bench, largest, acts), *response(bench, largest, acts, factors)]
