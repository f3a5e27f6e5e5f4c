"""The architectures, and the spec of a training run: what each needs, and what is derived from the width.

| architecture | active latents | needs | saved as |
|---|---|---|---|
| topk | the k largest of a token | k | topk |
| batchtopk | the B·k largest of a batch | k | jumprelu |
| matryoshka | as batchtopk; every prefix of latents reconstructs too | k (prefixes are derived) | jumprelu |
| jumprelu | those above a threshold that is learnt | k as target of L0, or a price | jumprelu |
| standard | those above zero, under an L1 penalty | a price | standard |
| gated | those whose gate is open, under an L1 penalty on the gates | a price | gated |
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Literal

from pydantic import Field, model_validator

from sae.step import AnyWeights, GatedWeights, JumpWeights, Weights
from undertow.core.spec import Spec

Architecture = Literal["topk", "batchtopk", "matryoshka", "jumprelu", "standard", "gated"]
Normalization = Literal["none", "expected_average_only_in", "layer_norm"]
Precision = Literal["float32", "tf32", "bfloat16"]
BY_BATCH = ("batchtopk", "matryoshka")  # chosen over the whole batch; one threshold stands for the choice afterwards
BY_PRICE = ("standard", "gated")


class Penalty(Spec):
    """The price of sparsity, for activations of mean square norm d_in and unit decoder rows.

    Attributes:
        coefficient: standard and gated: of Σ_j a_j (sae-lens' `l1_coefficient`); jumprelu: of L0 (its `l0_coefficient`).
            Absent: jumprelu aims at L0 = k, at a price that keeps it within a few per cent.
        warm_up: share of the steps over which the price rises from zero.
        bandwidth: width of the kernel by which JumpReLU's thresholds learn.
    """

    coefficient: float | None = Field(default=None, gt=0)
    warm_up: float = Field(default=0.1, ge=0, le=1)
    bandwidth: float = Field(default=0.3, gt=0)


class TrainSpec(Spec):
    """How to train one dictionary. Fields left None are derived; see the properties.

    `normalize` in sae-lens' names: `expected_average_only_in` scales all activations by one number (folded away in what is
    saved), `layer_norm` every activation by its own mean and deviation, `none` not at all. `precision` is that of the large
    products; weights, optimizer and the sparse sums are float32 throughout.
    """

    d_sae: int = Field(ge=2)
    k: int | None = Field(default=None, ge=1)
    steps: int = Field(ge=1)
    architecture: Architecture = "topk"
    batch_size: int = Field(default=2048, ge=1)
    lr: float | None = Field(default=None, gt=0)
    aux_coefficient: float = Field(default=1 / 32, ge=0)
    prefixes: tuple[int, ...] | None = None
    penalty: Penalty = Penalty()
    normalize: Normalization = "expected_average_only_in"
    precision: Precision = "float32"
    seed: int = 0

    @model_validator(mode="after")
    def _fits(self) -> TrainSpec:
        check_sparsity(self.architecture, self.k, self.penalty)
        if self.k is not None and self.k >= self.d_sae:
            raise ValueError(f"k = {self.k} must be below the width {self.d_sae}")
        if self.prefixes is not None:
            if self.architecture != "matryoshka":
                raise ValueError(f"prefixes are matryoshka's; {self.architecture} has none")
            ends = (0, *self.prefixes, self.d_sae)
            if any(a >= b for a, b in pairwise(ends)):
                raise ValueError(f"prefixes {self.prefixes} must rise, and lie between 0 and the width {self.d_sae}")
        return self

    @property
    def active(self) -> int:
        """k, where the architecture has one."""
        if self.k is None:
            raise ValueError(f"{self.architecture} at a price has no k")
        return self.k

    @property
    def inner_prefixes(self) -> tuple[int, ...]:
        """Widths of the nested dictionaries inside the whole one: as given, else 1/16, 1/8, 1/4 and 1/2 of it."""
        if self.architecture != "matryoshka":
            return ()
        if self.prefixes is not None:
            return self.prefixes
        return tuple(sorted({self.d_sae // part for part in (16, 8, 4, 2) if self.d_sae // part}))

    @property
    def peak_lr(self) -> float:
        """Learning rate after warm-up: as given, else 4e-4·√(16384/d_sae)."""
        return self.lr if self.lr is not None else 4e-4 * math.sqrt(16384 / self.d_sae)

    @property
    def dead_after(self) -> int:
        """Tokens without a firing after which a latent is dead: a twentieth of the run, at most 10 million."""
        return min(10_000_000, max(self.batch_size, self.steps * self.batch_size // 20))

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step` (0-based): linear warm-up over 5 %, linear decay to zero over the last 30 %."""
        warm, cool = max(1, self.steps // 20), max(1, self.steps * 3 // 10)
        return self.peak_lr * min(1.0, (step + 1) / warm, (self.steps - step) / cool)

    def warmth(self, step: int) -> float:
        """Share of the full price of sparsity at step `step`: linear over the warm-up."""
        warm = int(self.steps * self.penalty.warm_up)
        return min(1.0, (step + 1) / warm) if warm else 1.0


def check_sparsity(architecture: str, k: int | None, penalty: Penalty) -> None:
    """Raise ValueError unless exactly what the architecture needs is given: k, or a price."""
    priced = penalty.coefficient is not None
    if architecture in BY_PRICE:
        if k is not None:
            raise ValueError(f"{architecture} has no k: its L0 follows from the price of sparsity; leave --k away")
        if not priced:
            raise ValueError(f"{architecture} needs a price of sparsity: try --sparsity 1, and more for a lower L0")
    elif architecture == "jumprelu":
        if priced == (k is not None):
            raise ValueError("jumprelu needs either k, the L0 to aim at, or a price of sparsity (--sparsity)"
                             + (", not both" if priced else ""))
    elif k is None:
        raise ValueError(f"{architecture} needs k, the number of active latents")
    elif priced:
        raise ValueError(f"{architecture} has no price of sparsity: k says how many latents are active")


def weights_of(architecture: Architecture) -> type[AnyWeights]:
    """The parameters that an architecture learns."""
    return {"jumprelu": JumpWeights, "gated": GatedWeights}.get(architecture, Weights)
