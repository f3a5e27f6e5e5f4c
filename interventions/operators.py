"""Operators: what is done to the activation of one latent. Pure functions f → f′, in the latent's own units.

An edit of the forward pass is the difference, x + Σ (f′ − f)·d, so an operator that leaves f as it is changes no bit.
"""

from __future__ import annotations

from typing import Annotated, Literal, assert_never, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from undertow.core.spec import Spec


@final
class Strengthen(Spec):
    """f′ = gain · f. Gain 1 is the identity, 0 ablates, and a negative gain turns the latent round."""

    kind: Literal["strengthen"] = "strengthen"
    gain: float


@final
class Clamp(Spec):
    """f′ = value, whatever f was."""

    kind: Literal["clamp"] = "clamp"
    value: float


@final
class Floor(Spec):
    """f′ = max(f, value)."""

    kind: Literal["floor"] = "floor"
    value: float


@final
class Cap(Spec):
    """f′ = min(f, value)."""

    kind: Literal["cap"] = "cap"
    value: float


@final
class Ablate(Spec):
    """f′ = 0."""

    kind: Literal["ablate"] = "ablate"


@final
class Add(Spec):
    """f′ = f + amount."""

    kind: Literal["add"] = "add"
    amount: float


Operator = Annotated[Strengthen | Clamp | Floor | Cap | Ablate | Add, Field(discriminator="kind")]
OPERATORS = (Strengthen, Clamp, Floor, Cap, Ablate, Add)


def operate(operator: Operator, f: Float[Tensor, "token"]) -> Float[Tensor, "token"]:
    """f′ of every token; `f` itself stays as it is."""
    match operator:
        case Strengthen(gain=gain):
            return f * gain
        case Clamp(value=value):
            return torch.full_like(f, value)
        case Floor(value=value):
            return f.clamp(min=value)
        case Cap(value=value):
            return f.clamp(max=value)
        case Ablate():
            return torch.zeros_like(f)
        case Add(amount=amount):
            return f + amount
        case _ as never:
            assert_never(never)


def needs_activity(operator: Operator) -> bool:
    """Whether the operator changes nothing on a token where the latent is silent (f = 0), by its form, not by its figures."""
    return isinstance(operator, Strengthen | Ablate)


def in_words(operator: Operator) -> str:
    """What the operator does, as the end of a sentence that begins with the latent."""
    match operator:
        case Strengthen(gain=gain):
            return f"is multiplied by {gain:g}"
        case Clamp(value=value):
            return f"is set to {value:g}"
        case Floor(value=value):
            return f"is raised to {value:g} where it is lower"
        case Cap(value=value):
            return f"is lowered to {value:g} where it is higher"
        case Ablate():
            return "is set to 0"
        case Add(amount=amount):
            return f"gets {amount:g} added"
        case _ as never:
            assert_never(never)
