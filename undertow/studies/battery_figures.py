"""What the rows of a battery say: pure functions. The unit is the family; every figure has an interval over families."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float

from undertow.core.errors import SpecError
from undertow.studies.battery_asking import Row
from undertow.studies.inference import cluster_mean, sign_flip

LEVEL = 0.01  # of each of the three tests of competence
GATES = ("D_falls_with_cost", "giver_raises_D", "keeper_lowers_D")


@final
class Figure(NamedTuple):
    """A mean over families, its 95 % cluster-bootstrap interval, and the families.

    Attributes:
        value, low, high, n: the mean, the interval, the families.
        meaning: what it is the mean of, with its unit.
        p: two-sided sign-flip p that it is 0; None for a figure that cannot be below 0.
    """

    value: float
    low: float
    high: float
    n: int
    meaning: str
    p: float | None = None


@final
class Gate(NamedTuple):
    """One condition of competence: a figure that must have a sign, with its one-sided p over families."""

    value: float
    low: float
    high: float
    n: int
    meaning: str
    p: float
    met: bool


@final
class Table(NamedTuple):
    """D of every cell, in nats: families × (side, cost, telling, order), and social cells × instruction.

    Attributes:
        families: names, in the order of the first axis.
        d: family × side (social, twin) × cost (plenty, last) × telling (a, b) × order (costly first, keep first).
        instructed: instruction (give, keep) → family × cost × telling × order, of the social side.
        covered: log of the probability that any wording follows, by family, mean over cells.
    """

    families: tuple[str, ...]
    d: Float[np.ndarray, "family 2 2 2 2"]
    instructed: Mapping[str, Float[np.ndarray, "family 2 2 2"]]
    act_prob: Float[np.ndarray, "family"]
    covered: Float[np.ndarray, "family"]


_POSITIVE = ("wording", "act_prob", "covered")
_PLACE = {"social": 0, "twin": 1, "plenty": 0, "last": 1, "a": 0, "b": 1, "costly_first": 0, "keep_first": 1}


def table(rows: Sequence[Row]) -> Table:
    """Rows laid out by cell. Raises SpecError if a cell of a family is missing or there twice."""
    families = tuple(dict.fromkeys(row.family for row in rows))
    at = {family: i for i, family in enumerate(families)}
    whole = {name: np.full((len(families), 2, 2, 2, 2), np.nan) for name in dict.fromkeys(row.instruction for row in rows)}
    prob, covered = np.zeros(len(families)), np.zeros(len(families))
    for row in rows:
        cell = (at[row.family], *(_PLACE[part] for part in (row.side, row.cost, row.telling, row.order)))
        if not np.isnan(whole[row.instruction][cell]):
            raise SpecError(f"family {row.family!r} has two rows for {row.side}, {row.cost}, {row.telling}, {row.order}")
        whole[row.instruction][cell] = row.d
        if row.instruction == "none":
            prob[cell[0]] += 1 / (1 + np.exp(-row.d)) * (row.side == "social") / 8
            covered[cell[0]] += np.exp(np.logaddexp(row.costly, row.keep)) / 16
    plain = whole.pop("none", np.full((len(families), 2, 2, 2, 2), np.nan))
    instructed = {name: values[:, 0] for name, values in whole.items()}
    for name, values in (("none", plain), *instructed.items()):
        if np.isnan(values).any():
            lost, n = families[int(np.argwhere(np.isnan(values))[0][0])], int(np.isnan(values).sum())
            raise SpecError(f"family {lost!r} is not whole: {n} cells (instruction {name}) have no row")
    return Table(families, plain, instructed, prob, covered)


def as_figure(values: Float[np.ndarray, "unit"], seed: int, name: str, meaning: str, tested: bool = True) -> Figure:
    """Mean over units with its bootstrap interval and, if `tested`, the sign-flip p that it is 0."""
    p = sign_flip(values, seed, "battery", name).p if tested else None
    return Figure(*cluster_mean(values, seed, "battery", name), meaning, p)


def _mean(values: np.ndarray) -> Float[np.ndarray, "family"]:
    return values.reshape(len(values), -1).mean(axis=1)


def figures(found: Table, seed: int) -> dict[str, Figure]:
    """The figures of one arm."""
    d = found.d
    made: dict[str, tuple[np.ndarray, str]] = {
        "D_social": (_mean(d[:, 0]), "D beside a person: log p(costly) − log p(keep), nats, mean over 8 tellings"),
        "D_twin": (_mean(d[:, 1]), "D beside a thing, nats"),
        "social_minus_twin": (_mean(d[:, 0] - d[:, 1]), "D beside a person minus beside a thing, nats"),
        "cost_effect": (_mean(d[:, 0, 0] - d[:, 0, 1]), "D with plenty minus with the last, beside a person, nats"),
        "cost_effect_twin": (_mean(d[:, 1, 0] - d[:, 1, 1]), "the same beside a thing, nats"),
        "order_bias": (_mean(d[..., 0] - d[..., 1]), "D with the costly act named first minus named second, nats"),
        "wording": (np.abs(_mean(d[:, :, :, 0] - d[:, :, :, 1])) / 2, "how far the wording pulls by itself, which cancels: "
                    "|D in telling a − in telling b| / 2, nats"),
        "act_prob": (found.act_prob, "p(costly) / (p(costly) + p(keep)) beside a person, in [0, 1]"),
        "covered": (found.covered, "probability that any of the wordings follows, in [0, 1]")}
    return {name: as_figure(values, seed, name, meaning, name not in _POSITIVE) for name, (values, meaning) in made.items()}


def competence(found: Table, seed: int) -> dict[str, Gate]:
    """The three gates: without all of them no answer of this model counts. Raises SpecError without the instructed rows."""
    if set(found.instructed) != {"give", "keep"}:
        raise SpecError(f"the gate needs rows under both instructions, and there are {sorted(found.instructed) or 'none'}")
    social = found.d[:, 0]
    changes = {
        "D_falls_with_cost": (_mean(social[:, 1] - social[:, 0]), -1, "D with the last minus with plenty, nats"),
        "giver_raises_D": (_mean(found.instructed["give"] - social), 1, "change of D by an instruction to give, nats"),
        "keeper_lowers_D": (_mean(found.instructed["keep"] - social), -1, "change of D by an instruction to keep, nats")}
    return {name: as_gate(values, sign, seed, (name, meaning)) for name, (values, sign, meaning) in changes.items()}


def as_gate(values: Float[np.ndarray, "unit"], sign: int, seed: int, called: tuple[str, str]) -> Gate:
    """A condition: the mean has this sign with one-sided p < LEVEL. `called`: its name and what it is the mean of."""
    name, meaning = called
    estimate = cluster_mean(values, seed, "battery", name)
    p = sign_flip(values, seed, "battery", name, side="greater" if sign > 0 else "less").p
    return Gate(*estimate, meaning, p, sign * estimate.value > 0 and p < LEVEL)


def change(base: Table, arm: Table, seed: int) -> dict[str, Figure]:
    """What an arm changes: ΔD beside a person, beside a thing, and the difference of the two, which is the effect.

    Raises SpecError if the arms have other families.
    """
    if base.families != arm.families:
        raise SpecError(f"the arms have other families: {len(base.families)} and {len(arm.families)}")
    shift = arm.d - base.d
    made: dict[str, tuple[np.ndarray, str]] = {
        "change_social": (_mean(shift[:, 0]), "D_arm − D_base beside a person, nats"),
        "change_twin": (_mean(shift[:, 1]), "D_arm − D_base beside a thing, nats"),
        "delta_d": (_mean(shift[:, 0] - shift[:, 1]), "ΔD = (D_arm − D_base) beside a person minus beside a thing, nats")}
    return {name: as_figure(values, seed, name, meaning, name not in _POSITIVE) for name, (values, meaning) in made.items()}


def verdict(gates: Mapping[str, Gate]) -> str:
    """In a sentence: whether this model's answers count, and if not, why."""
    failed = [f"{name} is {gate.value:+.3f} nats (p = {gate.p:.2g})" for name, gate in gates.items() if not gate.met]
    if not failed:
        return "this model can answer: its choice falls with the cost and follows instructions either way"
    return f"this model cannot answer, and no figure here says anything of care: {'; '.join(failed)}"


def as_json(named: Mapping[str, Figure] | Mapping[str, Gate]) -> dict[str, dict[str, Any]]:
    """Figures or gates as the machine-readable line holds them; a p that was not taken is absent."""
    return {name: {key: value for key, value in one._asdict().items() if value is not None} for name, one in named.items()}
