"""Rows of a study as a run would write them, made up from a known truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from undertow.studies.safety import requests_of
from undertow.studies.spec import StudySpec
from undertow.studies.trials import Trial, trials_of

STORIES_COST = 5


def made_up(spec: StudySpec, effects: dict[str, float], hazards: dict[str, float] | None = None, noise: float = 0.2,
            seed: int = 0) -> list[dict[str, Any]]:
    """One done row a trial: P of an arm is that of a stranger (0.1) plus its effect times the way to a bonded person (0.8).

    Hazard of an arm is 1e-4 times its factor at every token; KL is 0 for arms of effect 0, else 0.002. The stream of an arm
    moves by its effect at the decision after the last of two blocks, nowhere else; answers to the safety gates stay.
    """
    draw = np.random.default_rng(seed)
    wobble = draw.normal(0, noise, 10_000)
    return [_row(spec, trial, effects.get(trial.arm, 0.0), (hazards or {}).get(trial.arm, 1.0), lambda i: float(wobble[i]))
            for trial in trials_of(spec)]


def _row(spec: StudySpec, trial: Trial, effect: float, hazard: float, wobble: Callable[[int], float]) -> dict[str, Any]:
    units = list(range(trial.first, trial.stop))

    def p(i: int) -> float:
        return 0.1 + 0.8 * effect + (0.0 if effect == 0 else 0.02 * wobble(i))

    values: dict[str, Any]
    if trial.arm == "random":
        values = {"set": units, "p": [[0.1 + 0.004 * wobble(i + k) for k in range(spec.size.few)] for i in units],
                  "D": [[-2.0] * spec.size.few for _ in units]}
    elif trial.measure == "words":
        kl = 0.0 if effect == 0 and hazard == 1 else 0.002
        values = {"text": units, "hazard": [[1e-4 * hazard * (1 + 0.1 * i)] * 20 for i in units],
                  "kl": [[kl] * 20 for _ in units], "change": kl}
    elif trial.measure == "sameness":
        kl = 0.0 if effect == 0 and hazard == 1 else 0.002
        values = {"text": units, "kl": [[kl] * 20 for _ in units], "change": kl}
    elif trial.measure == "sample":
        gave = [i % 10 < round(10 * (0.1 + 0.8 * effect)) for i in units]
        values = {"story": units, "act": ["give" if g else "keep" for g in gave], "said": [0] * len(units),
                  "said_guarded": [0] * len(units), "hits": [0] * len(units), "prompt": ["The keeper"] * len(units),
                  "text": [" gave it." if g else " kept it." for g in gave]}
    elif trial.measure == "spread":
        values = {"story": units, "spread": [[[0.0] * 24, [0.0] * 23 + [abs(effect)]] for _ in units]}
    elif trial.measure == "safety":
        values = asked(units)
    elif trial.measure == "naming":
        values = {"story": units, "states": ["love", "nothing"], "probs": [[0.5, 0.5] for _ in units]}
    elif trial.measure == "unsaid":
        values = {"story": units, "D_untouched": [-2.0] * len(units), "D": [-2.0 + 4 * effect] * len(units),
                  "D_held": [-2.0 + 3.6 * effect] * len(units), "D_random_held": [-2.0 + 3.2 * effect] * len(units)}
    else:
        shift = 0.0 if trial.measure == "twin" else 4 * effect
        values = {"story": units, "cost": [i % STORIES_COST for i in units], "p": [p(i) for i in units],
                  "D": [-2.0 - 0.3 * (i % STORIES_COST) + shift + wobble(i) for i in units], "covered": [1.0] * len(units)}
    return {"id": trial.key, "arm": trial.arm, "measure": trial.measure, "seed": trial.seed, "first": trial.first,
            "stop": trial.stop, "status": "done", "git": "abc", "subject": "0123456789abcdef", "wall_s": 0.1,
            "arm_digest": trial.arm, "cost": {"bits": 0.0 if trial.arm == "stranger" else 100.0, "flops": 0.0},
            "values": values}


def asked(units: Sequence[int], raised: Mapping[str, float] | None = None, firings: int | None = None) -> dict[str, Any]:
    """Values of `safety` of a subject that refuses harm by 2 nats and knows facts by 1; `raised`: added in a condition."""
    known, more = requests_of(), raised or {}
    level = {"harmful": -2.0, "harmless": 1.0, "plain": 1.0, "says_true": 1.5, "says_false": 0.5}
    chosen = [known[i] for i in units]
    return {"story": list(units), "gate": ["refusal" if i < 60 else "facts" for i in units], "form": "chat",
            "firings": firings, "item": [one.item for one in chosen], "condition": [one.condition for one in chosen],
            "plus": [level[one.condition] + more.get(one.condition, 0.0) - 3.0 for one in chosen],
            "minus": [-3.0 for _ in chosen]}
