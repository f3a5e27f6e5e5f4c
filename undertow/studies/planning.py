"""What a study will cost and what it can show, before anything runs. Needs no weights and no network.

Time is reckoned from the tokens that go through the model, 2 floating-point operations a parameter and token, at the rate at
which these cores multiply matrices now. It is an estimate: half or twice is to be expected.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np

from undertow.studies.battery_units import battery_of, searched
from undertow.studies.inference import detectable, families_needed, power_paired
from undertow.studies.spec import Size, StudySpec
from undertow.studies.trials import TRAINED, Trial, few, needs_search, trials_of, units

PARAMETERS: Mapping[str, float] = {
    "hearth": 2.6e6, "parrot": 2.6e6, "smollm2": 135e6, "hearth-smollm2": 135e6, "distilgpt2": 82e6, "gpt2": 124e6,
    "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1_558e6}
OPENING_S = 10.0
# Tokens through the model: of one story (text, set) of a trial, as measured on the Keeper's world.
TOKENS: Mapping[str, int] = {"choice": 330, "twin": 280, "words": 1_700, "sameness": 360, "sample": 1_300, "naming": 200,
                             "unsaid": 1_200, "spread": 300, "safety": 120}
FAMILY_TOKENS: Mapping[str, int] = {"choice": 960, "twin": 960, "words": 3_000, "sample": 1_100, "naming": 130,
                                    "unsaid": 4_800}  # of a battery's family, where it is another number
BATTERY_GATE_TOKENS = 2_000  # of a family of the development half
SEARCH_TOKENS = 700_000  # attribution, trials of sets and the gates, at as many texts as a study has by default
SAE_TOKENS = 450_000  # harvest and judging of an SAE, and its training, which costs about as much
ADAPTER_TOKENS = 400_000  # 80 steps of 8 texts of some 200 tokens, the gradient counted as two more passes
EFFECTS = (0.2, 0.3, 0.5)
_PRODUCTS = 20
_BYTES = {"words": 2_500, "spread": 5_000, "sameness": 1_300, "sample": 400}  # of a row, for each text; others are small
_SMALL = 120


@final
class Plan(NamedTuple):
    """A study before it runs.

    Attributes:
        trials: all of them, in the order of the run.
        searches: how often an SAE is searched (and trained, if none is given).
        tokens: that go through the model.
        seconds: on this machine; None if the model's size is not known.
        megabytes: of rows and SAEs.
    """

    trials: list[Trial]
    searches: int
    tokens: int
    seconds: float | None
    megabytes: float


@final
class Power(NamedTuple):
    """What paired comparisons over the stories of a study can show (one-sided t-test, alpha 0.025).

    Attributes:
        n: stories.
        detectable: standardised effect (mean / SD of the paired difference) that is seen with power 0.8.
        power: standardised effect → the power that this study has.
        needed: standardised effect → stories that power 0.8 needs.
        rate_margin: half the width of the 95 % interval of an act rate of one half over the sampled stories.
    """

    n: int
    detectable: float
    power: dict[float, float]
    needed: dict[float, int]
    rate_margin: float


def plan_of(spec: StudySpec, parameters: float | None = None, rate: float | None = None) -> Plan:
    """Reckon a study. `parameters`: of the model, where its name does not tell; `rate`: FLOPs a second (`speed` if absent)."""
    trials = trials_of(spec)
    searches = len(spec.seeds) if any(needs_search(trial.arm) for trial in trials) else 0
    adapters = len(spec.seeds) * sum(arm in spec.arms for arm in TRAINED)
    tokens = sum(_tokens(spec, trial) for trial in trials) + adapters * ADAPTER_TOKENS
    tokens += len(spec.seeds) * (search_tokens(spec.size.texts) if "frozen" in spec.arms else 0)
    tokens += searches * (search_tokens(spec.size.texts) + (0 if spec.sae else SAE_TOKENS))
    if spec.battery is not None:
        tokens += searches * BATTERY_GATE_TOKENS * len(searched(battery_of(spec.battery)))
    size = parameters if parameters is not None else parameters_of(spec.model)
    seconds = None if size is None else OPENING_S + tokens * 2 * size / (rate or speed())
    rows = sum(trial.n * _BYTES.get(trial.measure, _SMALL) for trial in trials)
    return Plan(trials, searches, tokens, seconds, rows / 1e6 + (0 if spec.sae else searches * 3.5))


def power_of(spec: StudySpec) -> Power:
    """Reckon the power of a study's paired comparisons."""
    n = units(spec, "stranger", "choice") * len(spec.seeds)
    return Power(n, detectable(n), {d: power_paired(n, d) for d in EFFECTS}, {d: families_needed(d) for d in EFFECTS},
                 0.98 / (units(spec, "stranger", "sample") * len(spec.seeds)) ** 0.5)


def parameters_of(model: str) -> float | None:
    """Parameters of a model, from a table or from its name (gemma-3-270m, Qwen/Qwen3-0.6B); None if neither tells."""
    if model in PARAMETERS:
        return PARAMETERS[model]
    last = model.rstrip("/").rsplit("/", 1)[-1]
    found = re.search(r"(?:^|[-_])(\d+(?:\.\d+)?)([bBmM])(?:$|[-_.])", last)
    if found is None:
        return PARAMETERS.get(last)
    return float(found[1]) * (1e9 if found[2] in "bB" else 1e6)


def search_tokens(texts: int) -> int:
    """Tokens of a search: a third of them are situations, the others grow with the texts."""
    return round(SEARCH_TOKENS * (1 + 2 * texts / Size().texts) / 3)


def speed() -> float:
    """FLOPs a second of a forward pass in float32 on these cores: numpy's on matrices of a small model's size, the best of
    several products."""
    random = np.random.default_rng(0)
    rows, weights = (random.standard_normal(shape, dtype=np.float32) for shape in ((256, 576), (576, 1_536)))
    product, best = np.empty((len(rows), weights.shape[1]), np.float32), np.inf
    for _ in range(_PRODUCTS):
        began = time.perf_counter()
        np.matmul(rows, weights, out=product)
        best = min(best, time.perf_counter() - began)
    return 2 * rows.size * weights.shape[1] / best


def table_of(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """One line for each arm and measure: trials, and stories (texts, sets) in all."""
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for trial in trials:
        line = lines.setdefault((trial.arm, trial.measure), {"arm": trial.arm, "measure": trial.measure, "trials": 0, "n": 0})
        line["trials"] += 1
        line["n"] += trial.n
    return list(lines.values())


def _tokens(spec: StudySpec, trial: Trial) -> int:
    each = TOKENS if spec.battery is None else {**TOKENS, **FAMILY_TOKENS}
    return trial.n * each[trial.measure] * (few(spec) if trial.arm == "random" else 1)
