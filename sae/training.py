"""Training: activations in, dictionary out. Knows nothing of models, texts or screens.

One dial sets most: the width. Learning rate, warm-up, decay, and the age at which a latent counts as dead are derived.
Activations are scaled by one number so that their mean norm is √d_in; it is folded away in the dictionary that comes out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Literal, NamedTuple, final

import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae.dictionary import JumpReLU, LinearDictionary, Provenance, TopK
from sae.step import (
    Active,
    AuxK,
    StepResult,
    Weights,
    batch_top_k,
    fired_latents,
    pre_activations,
    sparse_step,
    tangent_,
    top_k,
    unit_decoder_,
)
from undertow.core.errors import ArtifactError, NumericsError, SpecError, TextError
from undertow.core.seeds import generator
from undertow.core.spec import Spec
from undertow.core.storage import disk_errors

SAMPLE = 8192  # activations that set the scale and the first b_dec


class TrainSpec(Spec):
    """How to train one dictionary. Fields left None are derived; see the properties."""

    d_sae: int = Field(ge=2)
    k: int = Field(ge=1)
    steps: int = Field(ge=1)
    architecture: Literal["topk", "batchtopk"] = "topk"
    batch_size: int = Field(default=2048, ge=1)
    lr: float | None = Field(default=None, gt=0)
    aux_coefficient: float = Field(default=1 / 32, ge=0)
    seed: int = 0

    @model_validator(mode="after")
    def _sparse(self) -> TrainSpec:
        if self.k >= self.d_sae:
            raise ValueError(f"k = {self.k} must be below the width {self.d_sae}")
        return self

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


class StepReport(NamedTuple):
    """What one step saw, on its own batch: losses per token, fraction of variance unexplained, active latents a token."""

    loss: float
    aux_loss: float
    fvu: float
    l0: float
    dead_share: float
    lr: float


@final
class Trainer:
    """The state of a training run. `Trainer.begin` starts one, `Trainer.resume` goes on with a checkpoint.

    A run is a pure function of the spec and the batches: resuming at step n with the batches from n on gives the same
    weights as not having stopped.
    """

    def __init__(self, spec: TrainSpec, weights: Weights, scale: float) -> None:
        self.spec, self.scale, self.step_number = spec, scale, 0
        self.weights = Weights(*(torch.nn.Parameter(w, requires_grad=True) for w in weights))
        self.threshold = 0.0  # BatchTopK's running mean of the smallest active value, in scaled units
        self.idle = torch.zeros(spec.d_sae, dtype=torch.int64, device=weights.b_enc.device)  # tokens since it fired
        self._optimizer = torch.optim.Adam(list(self.weights), lr=spec.peak_lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self._pre: Tensor | None = None

    @classmethod
    def begin(cls, spec: TrainSpec, sample: Float[Tensor, "token d_in"], device: str = "cpu") -> Trainer:
        """A fresh run: unit random decoder rows, the encoder their transpose, b_dec the mean of `sample`.

        Raises NumericsError if the sample is not finite or is all zero.
        """
        d_in = sample.shape[1]
        norm = float(sample.norm(dim=1).mean())
        if not math.isfinite(norm) or norm == 0:
            raise NumericsError(f"the first {len(sample)} activations have mean norm {norm}", "check the site and the text")
        scale = math.sqrt(d_in) / norm
        rows = torch.randn(spec.d_sae, d_in, generator=generator(spec.seed, "init"))
        unit_decoder_(rows)
        weights = Weights(rows.clone(), torch.zeros(spec.d_sae), rows, sample.mean(dim=0) * scale)
        return cls(spec, Weights(*(w.to(device) for w in weights)), scale)

    @property
    def finished(self) -> bool:
        return self.step_number >= self.spec.steps

    def step(self, batch: Float[Tensor, "batch d_in"]) -> StepReport:
        """One optimizer step. Raises NumericsError, naming the row, if the batch is not finite."""
        weights = Weights(*(w.detach() for w in self.weights))
        x = batch.to(weights.b_dec.device, weights.b_dec.dtype) * self.scale
        with torch.no_grad():
            if self._pre is None or self._pre.shape[0] != len(x):
                self._pre = torch.empty(len(x), self.spec.d_sae, dtype=x.dtype, device=x.device)
            pre = pre_activations(weights, x, self._pre)
            active = self._choose(pre)
            dead = (self.idle >= self.spec.dead_after).nonzero()[:, 0]
            aux = AuxK(dead, max(1, x.shape[1] // 2), self.spec.aux_coefficient) if self.spec.aux_coefficient else None
            result = sparse_step(weights, x, pre, active, aux)
            if not math.isfinite(result.loss):
                _name_bad_row(batch, self.step_number)
            tangent_(result.grads.W_dec, weights.W_dec)
            lr = self._update(weights, result)
            self._count(result, len(x))
        variance = float((x - x.mean(dim=0)).square().sum()) / len(x)
        l0 = float((result.values > 0).sum()) / len(x)
        return StepReport(result.loss, result.aux_loss, result.loss / max(variance, 1e-30), l0,
                          len(dead) / self.spec.d_sae, lr)

    def _choose(self, pre: Float[Tensor, "batch d_sae"]) -> Active:
        if self.spec.architecture == "topk":
            return top_k(pre, self.spec.k)
        return batch_top_k(pre, self.spec.k, floor=0.7 * self.threshold)

    def _update(self, weights: Weights, result: StepResult) -> float:
        lr = self.spec.lr_at(self.step_number)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for parameter, gradient in zip(self.weights, result.grads, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        unit_decoder_(weights.W_dec)
        return lr

    def _count(self, result: StepResult, tokens: int) -> None:
        self.idle += tokens
        self.idle[fired_latents(result.active, result.values, self.spec.d_sae)] = 0
        self.step_number += 1
        positive = result.values[result.values > 0]
        if self.spec.architecture == "batchtopk" and len(positive):
            smallest = float(positive.min())
            self.threshold = smallest if self.threshold == 0 else 0.99 * self.threshold + 0.01 * smallest

    def dictionary(self, provenance: Provenance) -> LinearDictionary:
        """The dictionary as it stands, in the units of the activations given; BatchTopK becomes JumpReLU."""
        W_enc, b_enc, W_dec, b_dec = (w.detach().cpu().clone() for w in self.weights)
        if self.spec.architecture == "topk":
            activation = TopK(self.spec.k)
        else:
            activation = JumpReLU(torch.full((self.spec.d_sae,), self.threshold / self.scale))
        return LinearDictionary(W_enc.T.contiguous(), b_enc / self.scale, W_dec, b_dec / self.scale, activation, provenance)

    def save(self, path: Path) -> None:
        """Write a checkpoint (one safetensors file, whole or not at all)."""
        tensors = {name: w.detach() for name, w in zip(Weights._fields, self.weights, strict=True)}
        for name, parameter in zip(Weights._fields, self.weights, strict=True):
            for key, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"adam.{name}.{key}"] = value
        tensors["idle"] = self.idle
        tensors["scalars"] = torch.tensor([self.scale, self.threshold], dtype=torch.float64)
        facts = {"spec": json.dumps(self.spec.model_dump()), "step": str(self.step_number)}
        temp = path.with_suffix(".tmp")
        with disk_errors(path):
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temp, metadata=facts)
            temp.replace(path)

    @classmethod
    def resume(cls, path: Path, device: str = "cpu") -> Trainer:
        """Go on from a checkpoint. Raises ArtifactError if it cannot be read."""
        try:
            with safe_open(path, "pt", device=device) as file:
                facts = file.metadata()
                # Cloned, since tensors of a mapped file lie at odd addresses, and kernels round by alignment.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except Exception as error:
            raise ArtifactError(f"checkpoint {path} cannot be read: {error}") from error
        spec = TrainSpec.checked(json.loads(facts["spec"]), str(path))
        scale, threshold = tensors["scalars"].tolist()
        run = cls(spec, Weights(*(tensors[name] for name in Weights._fields)), scale)
        run.threshold, run.idle, run.step_number = threshold, tensors["idle"], int(facts["step"])
        for name, parameter in zip(Weights._fields, run.weights, strict=True):
            prefix = f"adam.{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                run._optimizer.state[parameter] = state
        return run


def _name_bad_row(batch: Float[Tensor, "batch d_in"], step: int) -> None:
    bad = (~torch.isfinite(batch).all(dim=1)).nonzero()
    if len(bad):
        raise NumericsError(f"batch {step}: {len(bad)} of {len(batch)} activations are not finite, "
                            f"the first in row {int(bad[0])}")
    raise NumericsError(f"the loss of step {step} is not finite", "try a smaller --lr")


def rebatch(activations: Iterable[Float[Tensor, "_ d_in"]], size: int) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Cut a stream of activation tensors of any lengths into batches of exactly `size`; a tail is dropped."""
    pending: list[Tensor] = []
    held = 0
    for block in activations:
        pending.append(block)
        held += len(block)
        if held < size:
            continue
        joined = torch.cat(pending) if len(pending) > 1 else pending[0]
        whole = held - held % size
        yield from joined[:whole].split(size)
        pending, held = [joined[whole:]], held - whole


def train(activations: Iterable[Float[Tensor, "_ d_in"]], spec: TrainSpec,
          provenance: Provenance | None = None, device: str = "cpu") -> LinearDictionary:
    """Train on any iterable of activation tensors (rows are tokens) until the spec's steps are done.

    The activations are used in the order given: shuffle them first (`ActivationStore.batches` does).

    Raises:
        TextError: the iterable ended before the last step.
        SpecError: no activations, or tensors that are not two-dimensional.
        NumericsError: NaN or infinity, named by row.
    """
    batches = rebatch(activations, spec.batch_size)
    head: list[Tensor] = []
    for batch in batches:
        head.append(batch)
        if len(head) * spec.batch_size >= SAMPLE or len(head) == spec.steps:
            break
    if not head:
        raise SpecError(f"the activations do not fill one batch of {spec.batch_size}")
    if head[0].ndim != 2:
        raise SpecError(f"activations must be (token, d_in), got shape {tuple(head[0].shape)}")
    run = Trainer.begin(spec, torch.cat(head)[:SAMPLE], device)
    for batch in chain(head, batches):
        run.step(batch)
        if run.finished:
            return run.dictionary(provenance or Provenance.unknown())
    raise TextError(f"the activations ended after step {run.step_number} of {spec.steps}")
