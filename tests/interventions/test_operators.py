"""Operators: figures by hand, and the laws that hold for all numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from interventions.operators import OPERATORS, Ablate, Add, Cap, Clamp, Floor, Operator, Strengthen, in_words, operate
from undertow.core.errors import SpecError
from undertow.core.spec import Spec

F = torch.tensor([0.0, 0.5, 2.0, 3.0])
numbers = st.floats(-1e3, 1e3, width=32)
codes = st.lists(st.floats(0, 1e3, width=32), min_size=1, max_size=8).map(torch.tensor)


@pytest.mark.parametrize(("operator", "expected", "words"), [
    (Strengthen(gain=2), [0, 1, 4, 6], "is multiplied by 2"),
    (Strengthen(gain=-1), [0, -0.5, -2, -3], "is multiplied by -1"),
    (Clamp(value=1.5), [1.5, 1.5, 1.5, 1.5], "is set to 1.5"),
    (Floor(value=1), [1, 1, 2, 3], "is raised to 1 where it is lower"),
    (Cap(value=1), [0, 0.5, 1, 1], "is lowered to 1 where it is higher"),
    (Ablate(), [0, 0, 0, 0], "is set to 0"),
    (Add(amount=0.25), [0.25, 0.75, 2.25, 3.25], "gets 0.25 added"),
])
def test_by_hand(operator: Operator, expected: list[float], words: str) -> None:
    before = F.clone()
    assert operate(operator, F).tolist() == expected
    assert torch.equal(F, before)
    assert in_words(operator) == words


def test_every_operator_stands_in_the_table_above() -> None:
    assert {operator.__name__ for operator in OPERATORS} == {"Strengthen", "Clamp", "Floor", "Cap", "Ablate", "Add"}


@settings(max_examples=50)
@given(f=codes, value=numbers)
def test_laws(f: torch.Tensor, value: float) -> None:
    for identity in (Strengthen(gain=1), Add(amount=0), Floor(value=-1e4), Cap(value=1e4)):
        assert torch.equal(operate(identity, f), f)
    assert torch.equal(operate(Ablate(), f), operate(Clamp(value=0), f))
    assert torch.equal(operate(Ablate(), f), operate(Strengthen(gain=0), f))
    floored = operate(Floor(value=value), f)
    assert bool((floored >= f).all()) and bool((floored >= value).all())
    assert torch.equal(operate(Floor(value=value), floored), floored)
    assert torch.equal(operate(Cap(value=value), floored), operate(Clamp(value=value), f))


@settings(max_examples=30)
@given(value=numbers)
def test_the_kind_tells_the_operator(value: float) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Operator)
    valued = (spec(value=value) for spec in (Clamp, Floor, Cap))
    for operator in (Strengthen(gain=value), *valued, Ablate(), Add(amount=value)):
        assert adapter.validate_python(operator.model_dump()) == operator
        assert adapter.validate_json(operator.model_dump_json()) == operator


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "much"])
@pytest.mark.parametrize(("spec", "field"), [(Strengthen, "gain"), (Clamp, "value"), (Floor, "value"), (Cap, "value"),
                                             (Add, "amount")])
def test_figures_that_are_not_finite_are_refused(spec: type[Spec], field: str, bad: object) -> None:
    with pytest.raises(SpecError, match=f"{field} = "):
        spec.checked({field: bad})
