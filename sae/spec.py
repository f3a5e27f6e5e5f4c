"""The spec of a run: from which model, site and text, and how to learn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from sae.architectures import Architecture, Normalization, Penalty, Precision, TrainSpec, check_sparsity
from sae.harvesting import DEFAULT, StoreSpec
from sae.text import TextSpec
from undertow.core.errors import TextError
from undertow.core.spec import Spec


class LearnSpec(Spec):
    """How to learn, on whatever text: everything of TrainSpec but the number of steps, which the text decides."""

    width: int = Field(ge=2)
    k: int | None = Field(default=None, ge=1)
    architecture: Architecture = "topk"
    epochs: float = Field(default=3.0, gt=0)
    batch_size: int = Field(default=2048, ge=1)
    lr: float | None = Field(default=None, gt=0)
    aux_coefficient: float = Field(default=1 / 32, ge=0)
    prefixes: tuple[int, ...] | None = None
    penalty: Penalty = Penalty()
    normalize: Normalization = "expected_average_only_in"
    precision: Precision = "float32"

    @model_validator(mode="after")
    def _sparse(self) -> LearnSpec:
        check_sparsity(self.architecture, self.k, self.penalty)
        return self

    def describe(self) -> str:
        """In a few words: architecture, width, and what sets the sparsity."""
        price = self.penalty.coefficient
        aim = f"k = {self.k}" if self.k is not None else f"price of sparsity {price:g}"
        return f"{self.architecture}, {self.width:,} latents, {aim}"

    def train_spec(self, tokens: int, seed: int) -> TrainSpec:
        """The training spec for `tokens` distinct activations, each seen `epochs` times. Raises TextError below a batch."""
        if tokens < self.batch_size:
            raise TextError(f"the text gives {tokens} activations, fewer than one batch of {self.batch_size}",
                            "give a longer text, or a smaller --batch-size")
        steps = max(1, int(tokens * self.epochs) // self.batch_size)
        same = self.model_dump(exclude={"width", "epochs"})
        return TrainSpec.checked({**same, "d_sae": self.width, "steps": steps, "seed": seed}, "sae train")


class RunSpec(Spec):
    """Everything that decides a run's result, with the code and the machine that the record adds.

    Attributes:
        tokens: distinct activations to train on (all there are, if the text has fewer).
        eval_tokens: held-out activations for FVU, L0 and density.
        ce_tokens: held-out tokens for the loss table, which needs four full passes.
        store: how the activations lie on disk, and the memory that harvesting them may take.
        weights: type of the saved weights; the figures are measured after rounding to it.
    """

    model: str
    site: str
    text: TextSpec
    learn: LearnSpec
    tokens: int = Field(ge=1)
    eval_tokens: int = Field(default=65_536, ge=1)
    ce_tokens: int = Field(default=8_192, ge=1)
    store: StoreSpec = DEFAULT
    weights: Literal["float32", "float16"] = "float32"
    seed: int = 0
