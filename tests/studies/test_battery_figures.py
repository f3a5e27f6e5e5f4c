"""What rows of a battery come to, against hand arithmetic and against planted models that do and do not understand."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest

from undertow.core.errors import SpecError
from undertow.studies.battery_asking import Instruction, Row
from undertow.studies.battery_figures import GATES, change, competence, figures, table, verdict
from undertow.studies.battery_text import COST_LEVELS, ORDERS, SIDES, TELLINGS, Cost, Order, Side, Telling

Model = Callable[[int, Side, Cost, Telling, Order, Instruction], float]


def rows_of(model: Model, families: int = 12) -> list[Row]:
    """Rows of a model that is a formula for D; log p(keep) is −3 throughout."""
    made = []
    for n in range(families):
        for side, cost, telling, order in product(SIDES, COST_LEVELS, TELLINGS, ORDERS):
            for instruction in ("none", "give", "keep") if side == "social" else ("none",):
                d = model(n, side, cost, telling, order, instruction)
                made.append(Row(f"f{n}", side, cost, telling, order, instruction, d - 3.0, -3.0))
    return made


def caring(n: int, side: Side, cost: Cost, telling: Telling, order: Order, instruction: Instruction) -> float:
    """Each effect at its own size: 0.1·n a family, person 0.5, last −0.3, wording ±2, first named 0.7, instructions 1."""
    return (0.1 * n + 0.5 * (side == "social") - 0.3 * (cost == "last") + (2 if telling == "a" else -2)
            + 0.7 * (order == "costly_first") + {"none": 0.0, "give": 1.0, "keep": -1.0}[instruction])


def test_every_effect_is_found_at_its_size() -> None:
    found = figures(table(rows_of(caring)), 0)
    level = 0.1 * np.arange(12).mean() - 0.15 + 0.35
    assert found["D_social"].value == pytest.approx(level + 0.5) and found["D_twin"].value == pytest.approx(level)
    for name, value in (("social_minus_twin", 0.5), ("cost_effect", 0.3), ("cost_effect_twin", 0.3), ("order_bias", 0.7),
                        ("wording", 2.0)):
        figure = found[name]
        assert (figure.value, figure.low, figure.high, figure.n) == pytest.approx((value, value, value, 12)), name
    assert found["D_social"].low < found["D_social"].value < found["D_social"].high
    assert found["cost_effect"].p == pytest.approx(2 / 2**12) and found["wording"].p is None


def test_the_wording_cancels() -> None:
    def plain(*cell: object) -> float:
        return caring(*cell) + (50 if cell[3] == "a" else -50)  # type: ignore[arg-type]

    before, after = figures(table(rows_of(caring)), 0), figures(table(rows_of(plain)), 0)
    assert after["D_social"][:4] == pytest.approx(before["D_social"][:4]) and after["wording"].value == pytest.approx(52)


def test_act_prob_and_coverage_by_hand() -> None:
    rows = [row._replace(costly=np.log(0.3), keep=np.log(0.1)) for row in rows_of(caring, 3)]
    found = figures(table(rows), 0)
    assert found["act_prob"].value == pytest.approx(0.75) and found["covered"].value == pytest.approx(0.4)


def test_a_model_that_understands_is_competent() -> None:
    gates = competence(table(rows_of(caring)), 0)
    assert tuple(gates) == GATES and all(gate.met for gate in gates.values())
    assert [round(gate.value, 6) for gate in gates.values()] == [-0.3, 1.0, -1.0]
    assert verdict(gates).startswith("this model can answer")


@pytest.mark.parametrize(("lost", "model"), [
    ("D_falls_with_cost", lambda *cell: caring(*cell) + 0.3 * (cell[2] == "last")),
    ("giver_raises_D", lambda *cell: caring(*cell) - 1.0 * (cell[5] == "give")),
    ("keeper_lowers_D", lambda *cell: caring(*cell) + 2.0 * (cell[5] == "keep")),  # both instructions raise D
])
def test_each_gate_fails_by_itself(lost: str, model: Model) -> None:
    gates = competence(table(rows_of(model)), 0)
    assert [name for name, gate in gates.items() if not gate.met] == [lost]
    assert verdict(gates).startswith("this model cannot answer") and lost in verdict(gates)


def test_noise_is_not_competent() -> None:
    """Of 40 models that answer at random (family effects, no understanding) at most a few pass any gate, none all three."""
    passed = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        gates = competence(table(rows_of(lambda *cell, rng=rng: rng.normal() + rng.normal(), 10)), seed)
        passed.append(sum(gate.met for gate in gates.values()))
    assert sum(passed) <= 5 and max(passed) < 3


def test_what_an_arm_changes() -> None:
    base = table(rows_of(caring))
    assert all(figure[:3] == (0.0, 0.0, 0.0) for figure in change(base, base, 0).values())
    moved = rows_of(lambda *cell: caring(*cell) + 0.2 + 0.4 * (cell[1] == "social"))
    arm = table([row for row in moved if row.instruction == "none"])
    found = change(base, arm, 0)
    assert [round(found[name].value, 6) for name in ("change_social", "change_twin", "delta_d")] == [0.6, 0.2, 0.4]
    with pytest.raises(SpecError, match="other families"):
        change(base, table(rows_of(caring, 5)), 0)


def test_rows_that_are_not_whole_are_refused() -> None:
    rows = rows_of(caring, 2)
    with pytest.raises(SpecError, match=r"'f1' is not whole: 1 cells \(instruction none\)"):
        table([row for row in rows if row != next(r for r in reversed(rows) if r.instruction == "none")])
    with pytest.raises(SpecError, match=r"'f0' has two rows"):
        table([*rows, rows[0]])
    with pytest.raises(SpecError, match="under both instructions"):
        competence(table([row for row in rows if row.instruction != "keep"]), 0)
