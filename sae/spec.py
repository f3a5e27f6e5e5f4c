"""The spec of a run: from which model, site and text, and how to learn."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from sae.text import TextSpec
from sae.training import TrainSpec
from undertow.core.errors import TextError
from undertow.core.spec import Spec


class LearnSpec(Spec):
    """How to learn, on whatever text: everything of TrainSpec but the number of steps, which the text decides."""

    width: int = Field(ge=2)
    k: int = Field(ge=1)
    architecture: Literal["topk", "batchtopk"] = "topk"
    epochs: float = Field(default=3.0, gt=0)
    batch_size: int = Field(default=2048, ge=1)
    lr: float | None = Field(default=None, gt=0)
    aux_coefficient: float = Field(default=1 / 32, ge=0)

    def train_spec(self, tokens: int, seed: int) -> TrainSpec:
        """The training spec for `tokens` distinct activations, each seen `epochs` times. Raises TextError below a batch."""
        if tokens < self.batch_size:
            raise TextError(f"the text gives {tokens} activations, fewer than one batch of {self.batch_size}",
                            "give a longer text, or a smaller --batch-size")
        steps = max(1, int(tokens * self.epochs) // self.batch_size)
        return TrainSpec.checked({"d_sae": self.width, "k": self.k, "steps": steps, "architecture": self.architecture,
                                  "batch_size": self.batch_size, "lr": self.lr, "seed": seed,
                                  "aux_coefficient": self.aux_coefficient}, "sae train")


class RunSpec(Spec):
    """Everything that decides a run's result, with the code and the machine that the record adds.

    Attributes:
        tokens: distinct activations to train on (all there are, if the text has fewer).
        eval_tokens: held-out activations for FVU, L0 and density.
        ce_tokens: held-out tokens for the loss table, which needs four full passes.
        weights: type of the saved weights; the figures are measured after rounding to it.
    """

    model: str
    site: str
    text: TextSpec
    learn: LearnSpec
    tokens: int = Field(ge=1)
    eval_tokens: int = Field(default=65_536, ge=1)
    ce_tokens: int = Field(default=8_192, ge=1)
    weights: Literal["float32", "float16"] = "float32"
    seed: int = 0
