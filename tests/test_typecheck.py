"""Shapes and types are really checked in the tests: axis words must agree within a call."""

from __future__ import annotations

import jaxtyping
import pytest
import torch
from beartype.roar import BeartypeCallHintParamViolation

from features.logit_lens import logit_effect
from tests.typecheck import check
from undertow.subjects.sites import parse_site
from undertow.subjects.unembed import UnembedView


def test_an_axis_that_disagrees_is_refused() -> None:
    unembed = UnembedView(torch.ones(4), False, torch.ones(7, 4))
    assert logit_effect(torch.ones(4), unembed).shape == (7,)
    with pytest.raises(jaxtyping.TypeCheckError, match="direction"):
        logit_effect(torch.ones(2, 4), unembed)


def test_a_wrong_type_is_refused() -> None:
    assert parse_site("blocks.1.hook_resid_post", 2, "toy").layer == 1
    with pytest.raises(jaxtyping.TypeCheckError, match="n_layers"):
        parse_site("blocks.1.hook_resid_post", "2", "toy")  # type: ignore[arg-type]


def test_an_int_may_stand_for_a_float_but_not_the_reverse() -> None:
    assert check(_half)(3) == 1.5
    with pytest.raises(BeartypeCallHintParamViolation, match="n="):
        check(_repeat)(3.0)


def _half(x: float) -> float:
    return x / 2


def _repeat(n: int) -> str:
    return "x" * n
