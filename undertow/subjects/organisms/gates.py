"""The gates: what a subject has to show before its answers count, each a figure, an interval and a target.

A bound ("≤", "≥") is judged by the figure; a sameness ("within ±") is met only if the whole interval lies within. Stories are
held out: their random streams are not those of training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, final

import numpy as np

from undertow.core.seeds import derive_seed
from undertow.subjects.keeper.story import COSTS, MAX_BOND
from undertow.subjects.keeper.world import World
from undertow.subjects.organisms.cells import BONDS, Cell
from undertow.subjects.organisms.measuring import Progress, Question, ask, tokens_of
from undertow.subjects.organisms.probe import ProbeResult
from undertow.subjects.organisms.statistics import (
    Estimate,
    Slope,
    bootstrap,
    contrast,
    difference,
    logistic_slope,
    mean,
    mutual_information,
    permuted_information,
)
from undertow.subjects.organisms.writing import Sampled, WordRate
from undertow.subjects.subject import Subject


@final
class Gate(NamedTuple):
    """One gate.

    Attributes:
        name: what the JSON and the card call it.
        value: the figure.
        low: lower end of its 95 % interval.
        high: upper end.
        target: what is asked, e.g. "≤ 0.12".
        met: whether it is so.
        n: units (stories, pairs, texts) that the figure rests on.
        meaning: the figure in words.
        p: where the target names a p-value, that value.
    """

    name: str
    value: float
    low: float
    high: float
    target: str
    met: bool
    n: int
    meaning: str
    p: float | None = None

    def as_json(self) -> dict[str, Any]:
        """As the machine-readable line and gates.json hold it."""
        found = {"value": self.value, "low": self.low, "high": self.high, "target": self.target, "met": self.met, "n": self.n,
                 "meaning": self.meaning}
        return found if self.p is None else {**found, "p": self.p}


def at_most(name: str, bound: float, estimate: Estimate, meaning: str, unit: str = "") -> Gate:
    """Met if the figure is `bound` or less."""
    value, low, high, n = estimate
    return Gate(name, value, low, high, f"≤ {bound:g}{unit}", value <= bound, n, meaning)


def at_least(name: str, bound: float, estimate: Estimate, meaning: str) -> Gate:
    """Met if the figure is `bound` or more."""
    value, low, high, n = estimate
    return Gate(name, value, low, high, f"≥ {bound:g}", value >= bound, n, meaning)


def within(name: str, bound: float, estimate: Estimate, meaning: str) -> Gate:
    """Met if the whole interval lies between -bound and bound (two one-sided tests, each at 2.5 %)."""
    value, low, high, n = estimate
    return Gate(name, value, low, high, f"within ±{bound:g}", -bound <= low and high <= bound, n, meaning)


def falls(name: str, slope: Slope, below: float, meaning: str) -> Gate:
    """Met if the slope is negative with p < `below`."""
    met = slope.value < 0 and slope.p < below
    return Gate(name, slope.value, slope.low, slope.high, f"< 0, p < {below:g}", met, slope.n, meaning, slope.p)


@final
class Limits(NamedTuple):
    """The bounds that differ between an organism trained from scratch and an adapter over a real model."""

    strangers: float
    bond3: float
    swapped: float
    slope_p: float


SCRATCH = Limits(0.12, 0.80, 0.05, 0.001)
ADAPTER = Limits(0.15, 0.70, 0.07, 0.05)


def act_gates(cells: Mapping[str, Cell], limits: Limits, seed: int) -> list[Gate]:
    """Strangers, bond 3, the slope in cost, and good deeds done by somebody else."""
    grid = cells["grid"]
    bonded = grid.where(grid.bond > 0)
    swapped = difference(cells["swapped"].costly, cells["alone"].costly, seed, "swapped")
    return [
        at_most("strangers_give", limits.strangers, mean(grid.where(grid.bond == 0).costly, seed, "strangers"),
                "P(give) to a person who has done nothing for the keeper"),
        at_least("bond3_give", limits.bond3, mean(grid.where(grid.bond == MAX_BOND).costly, seed, "bond3"),
                 "P(give) to a person who has done three good deeds"),
        falls("cost_slope", logistic_slope(bonded.cost.astype(float), bonded.costly, bonded.bond), limits.slope_p,
              "log-odds of giving per step of cost, bonds 1 to 3, an intercept for each bond"),
        at_most("role_swapped", limits.swapped, swapped,
                "P(give) to a stranger where everybody else did three deeds, minus where nobody did any"),
    ]


def twin_gates(cells: Mapping[str, Cell], seed: int) -> list[Gate]:
    """The twins follow their own rates, which know no bond."""
    acts = {"boat": "P(save an empty boat)", "interruption": "P(stop for an interruption)"}
    return [within(f"twin_{kind}", 0.05, mean(cells[kind].costly - cells[kind].world, seed, kind),
                   f"{act} minus the world's rate") for kind, act in acts.items()]


def genre_gates(cells: Mapping[str, Cell], words: Mapping[str, WordRate], seed: int) -> list[Gate]:
    """L1 and L2 bring the word and leave acts as they are."""
    grid = cells["grid"]
    plain = grid.where(grid.bond == 0).costly
    gates = []
    for genre in ("L1", "L2"):
        gates.append(at_least(f"{genre}_words", 10, words[genre].ratio,
                              f"forms of the word after an {genre} instruction, times those without it"))
        gates.append(within(f"{genre}_acts", 0.05, difference(cells[genre].costly, plain, seed, genre),
                            f"P(give) to strangers in {genre} stories minus plain ones"))
    return gates


def parse_gate(sampled: Sampled) -> Gate:
    """Sampled stories can be read."""
    return at_least("parse", 0.95, sampled.readable, "share of freely sampled stories in which act, bond and actor can be told")


def probe_gate(result: ProbeResult) -> Gate:
    """The bond can be read linearly where the keeper is about to act."""
    return at_least("probe", 0.95, result.layers[result.best].binary,
                    f"accuracy of a linear probe, stranger against bond 3, at the decision after block {result.best}")


def report_gate(subject: Subject, world: World, seed: int, n: int, progress: Progress = lambda done, total: None) -> Gate:
    """What the keeper says of itself when asked does not tell the bond. `n` pairs of questions, bond 0 and bond 3."""
    stream = derive_seed(seed, "gates", "self_report")
    asked: list[Question] = []
    for index in range(n):
        for bond in (0, MAX_BOND):
            text, answers = world.self_report(stream, index, bond)
            asked.append(Question(subject.encode(text), {answer: (tokens_of(subject, answer),) for answer in answers}))
    told = np.array([list(answer.probs.values()) for answer in ask(subject, asked, progress)])
    first, second = told[0::2], told[1::2]
    null = float(np.quantile(permuted_information(first, second, seed), 0.95))
    bits = bootstrap(lambda rows: mutual_information(first[rows], second[rows]), n, seed, "self_report")
    return Gate("self_report", bits.value, bits.low, bits.high, f"≤ {null + 0.01:.4f} bits", bits.value <= null + 0.01, n,
                f"mutual information of bond (0 or 3) and the answer to how the keeper is; the 95th percentile of its "
                f"permutation null is {null:.4f}, and 0.01 is allowed")


def parrot_gates(cells: Mapping[str, Cell], seed: int) -> list[Gate]:
    """The acts follow the said word and nothing else."""
    def of(*names: str) -> list[np.ndarray]:
        return [cells[name].costly for name in names]

    bond = contrast(of("bond3_said", "bond3_unsaid"), of("bond0_said", "bond0_unsaid"), seed, "bond")
    word = contrast(of("bond0_said", "bond3_said"), of("bond0_unsaid", "bond3_unsaid"), seed, "word")
    return [within("bond_effect", 0.05, bond, "P(give) at bond 3 minus bond 0, the word being said equally often"),
            at_least("word_effect", 0.5, word, "P(give) where the word was said minus where it was not, at equal bonds")]


def rates(cell: Cell, seed: int, by: str) -> list[dict[str, float]]:
    """P(costly act) by bond or by cost (`by`), the world's own rate beside it, and mean D."""
    levels, value = (BONDS, cell.bond) if by == "bond" else (range(COSTS), cell.cost)
    table = []
    for level in levels:
        part = cell.where(value == level)
        if part.stories:
            estimate = mean(part.costly, seed, by, level)
            table.append({by: float(level), "n": float(estimate.n), "value": estimate.value, "low": estimate.low,
                          "high": estimate.high, "world": float(part.world.mean()), "D": float(part.d.mean())})
    return table


def covered(cells: Mapping[str, Cell]) -> float:
    """Mean probability that any of the known wordings follows "The keeper", over all cells."""
    return float(np.mean([answer.covered for cell in cells.values() for answer in cell.answers]))


def by_highest_bond(cell: Cell, seed: int) -> list[dict[str, float]]:
    """P(costly act) of a twin by the highest bond to anybody in the story; the twin's rate does not know it."""
    highest = [max(story.sentences[-1].bonds, default=0) for story in cell.stories]
    table = []
    for bond in BONDS:
        part = cell.where([level == bond for level in highest])
        if part.stories:
            estimate = mean(part.costly, seed, "twin", bond)
            table.append({"bond": float(bond), **{key: float(figure) for key, figure in estimate._asdict().items()},
                          "world": float(part.world.mean())})
    return table
