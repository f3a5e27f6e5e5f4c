"""Training: activations in, dictionary out. Knows nothing of models, texts or screens.

One dial sets most: the width. Learning rate, warm-up, decay, and the age at which a latent counts as dead are derived.
Activations are scaled by one number so that their mean norm is √d_in; it is folded away in the dictionary that comes out.
Which latents may fire, and at what price, is the architecture's (`sae.architectures`); all else is the same for all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae.architectures import BY_BATCH, BY_PRICE, Precision, TrainSpec, weights_of
from sae.dense import gated_step, standard_step
from sae.dictionary import Gated, JumpReLU, LinearDictionary, Provenance, ReLU, TopK
from sae.normed import NormedDictionary, normalise
from sae.step import (
    AnyWeights,
    AuxK,
    GatedWeights,
    JumpWeights,
    Sparsity,
    StepResult,
    Weights,
    batch_top_k,
    jump_step,
    pre_activations,
    sparse_step,
    tangent_,
    top_k,
    unit_decoder_,
)
from sae.team import ALONE, Team
from undertow.core.errors import ArtifactError, NumericsError, SpecError, TextError
from undertow.core.seeds import generator
from undertow.core.storage import disk_errors

SAMPLE = 8192  # activations that set the scale and the first b_dec


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
    weights as not having stopped. Where a team trains together every member holds the same state and gives `step` its own
    share of each batch: the run is then that of one process on the whole batches, up to the order of sums.
    """

    def __init__(self, spec: TrainSpec, weights: AnyWeights, scale: float, team: Team = ALONE) -> None:
        self.spec, self.scale, self.step_number, self.team = spec, scale, 0, team
        self.weights = type(weights)(*(torch.nn.Parameter(w, requires_grad=True) for w in weights))
        self.threshold = 0.0  # BatchTopK's running mean of the smallest active value, in scaled units
        self.idle = torch.zeros(spec.d_sae, dtype=torch.int64, device=weights.b_dec.device)  # tokens since it fired
        self._optimizer = torch.optim.Adam(list(self.weights), lr=spec.peak_lr, betas=(0.9, 0.999), eps=1e-8, fused=True)
        self._rows_are_unit = spec.architecture not in BY_PRICE
        self._pre: Tensor | None = None  # memory that steps share: pre-activations, and the sparse gradients
        self._gradients: AnyWeights | None = None

    @classmethod
    def begin(cls, spec: TrainSpec, sample: Float[Tensor, "token d_in"], device: str = "cpu", team: Team = ALONE) -> Trainer:
        """A fresh run: unit random decoder rows, the encoder their transpose, b_dec the mean of `sample`.

        Rows that are free in size begin at a tenth, so that thousands of open latents do not overshoot. JumpReLU's thresholds
        begin where they let through the wanted number of latents on the sample. All is float32; a float64 sample makes all
        float64. Members of a team give the same sample.
        Raises NumericsError if the sample is not finite or is all zero.
        """
        d_in = sample.shape[1]
        norm = float(sample.norm(dim=1).mean())
        if not math.isfinite(norm) or norm == 0:
            raise NumericsError(f"the first {len(sample)} activations have mean norm {norm}", "check the site and the text")
        scale = math.sqrt(d_in) / norm if spec.normalize == "expected_average_only_in" else 1.0
        dtype = sample.dtype if sample.dtype == torch.float64 else torch.float32
        rows = torch.randn(spec.d_sae, d_in, generator=generator(spec.seed, "init")).to(dtype)
        unit_decoder_(rows)
        rows *= 0.1 if spec.architecture in BY_PRICE else 1.0
        seen = normalise(sample, "layer_norm").z if spec.normalize == "layer_norm" else sample * scale
        zeros = torch.zeros(spec.d_sae, dtype=dtype)
        linear = Weights(rows.clone(), zeros, rows, seen.to(dtype).mean(dim=0))
        weights: AnyWeights = linear
        if spec.architecture == "gated":
            weights = GatedWeights(linear.W_enc, zeros, zeros.clone(), zeros.clone(), rows, linear.b_dec)
        if spec.architecture == "jumprelu":
            weights = JumpWeights(*linear, _first_threshold(spec, linear, seen.to(dtype)))
        return cls(spec, type(weights)(*(w.to(device) for w in weights)), scale, team)

    @property
    def finished(self) -> bool:
        return self.step_number >= self.spec.steps

    def step(self, batch: Float[Tensor, "batch d_in"]) -> StepReport:
        """One optimizer step on this member's share of the batch. Raises NumericsError, naming the row, if it is not finite."""
        weights = type(self.weights)(*(w.detach() for w in self.weights))
        x = batch.to(weights.b_dec.device, weights.b_dec.dtype)
        with torch.no_grad():
            x = normalise(x, "layer_norm").z if self.spec.normalize == "layer_norm" else x * self.scale
            dead = (self.idle >= self.spec.dead_after).nonzero()[:, 0]
            result = self._together(self._differentiate(weights, x, dead))
            if not math.isfinite(result.loss):
                _name_bad_row(batch, self.step_number)
            if self._rows_are_unit:
                tangent_(result.grads.W_dec, weights.W_dec)
            _clip(result.grads)
            lr = self._update(weights, result)
            self._count(result, len(x) * self.team.size)
            variance = self._variance(x)
        return StepReport(result.loss, result.aux_loss, result.loss / max(variance, 1e-30), result.l0,
                          len(dead) / self.spec.d_sae, lr)

    def _differentiate(self, weights: AnyWeights, x: Float[Tensor, "batch d_in"], dead: Int[Tensor, "dead"]) -> StepResult:
        """Loss and gradients by the architecture's rule."""
        spec = self.spec
        aux = AuxK(dead, max(1, x.shape[1] // 2), spec.aux_coefficient) if spec.aux_coefficient else None
        if spec.architecture in BY_PRICE:
            price = (spec.penalty.coefficient or 0.0) * spec.warmth(self.step_number)
            with arithmetic(spec.precision, x.device.type):
                if isinstance(weights, GatedWeights):
                    return gated_step(weights, x, price, aux)
                return standard_step(Weights(*weights[:4]), x, price, aux)
        linear = weights.linear if isinstance(weights, JumpWeights) else Weights(*weights[:4])
        pre = self._pre_activations(linear, x)
        if isinstance(weights, JumpWeights):
            price = spec.penalty.coefficient or self.team.means([float(x.square().sum()) / len(x)])[0]
            sparsity = Sparsity(price * spec.warmth(self.step_number), spec.k)
            return jump_step(weights, x, pre, spec.penalty.bandwidth, sparsity, aux, self.team)
        by_batch = spec.architecture in BY_BATCH
        active = batch_top_k(pre, spec.active, 0.7 * self.threshold, self.team) if by_batch else top_k(pre, spec.active)
        result = sparse_step(linear, x, pre, active, aux, spec.inner_prefixes, self._gradients)
        self._gradients = result.grads
        return result

    def _pre_activations(self, weights: Weights, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_sae"]:
        if self._pre is None or self._pre.shape[0] != len(x):
            self._pre = torch.empty(len(x), self.spec.d_sae, dtype=x.dtype, device=x.device)
        with arithmetic(self.spec.precision, x.device.type):
            return pre_activations(weights, x, self._pre)

    def _together(self, result: StepResult) -> StepResult:
        """What one process would have found on the whole batch."""
        team = self.team
        if team.size == 1:
            return result
        team.mean_(result.grads)
        loss, aux_loss, l0 = team.means([result.loss, result.aux_loss, result.l0])
        smallest = team.lowest(result.smallest or math.inf)
        return StepResult(result.grads, loss, aux_loss, team.union(result.fired), l0, smallest if l0 else 0.0)

    def _variance(self, x: Float[Tensor, "batch d_in"]) -> float:
        """Σ‖x − x̄‖² a token, over the whole batch."""
        mean = x.mean(dim=0)
        self.team.mean_([mean])
        return self.team.means([float((x - mean).square().sum()) / len(x)])[0]

    def _update(self, weights: AnyWeights, result: StepResult) -> float:
        lr = self.spec.lr_at(self.step_number)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        for parameter, gradient in zip(self.weights, result.grads, strict=True):
            parameter.grad = gradient
        self._optimizer.step()
        if self._rows_are_unit:
            unit_decoder_(weights.W_dec)
        if isinstance(weights, JumpWeights):
            weights.threshold.clamp_(min=0)  # below zero it would let negative pre-activations through
        return lr

    def _count(self, result: StepResult, tokens: int) -> None:
        self.idle += tokens
        self.idle[result.fired] = 0
        self.step_number += 1
        if self.spec.architecture in BY_BATCH and result.smallest:
            first = self.threshold == 0
            self.threshold = result.smallest if first else 0.99 * self.threshold + 0.01 * result.smallest

    def dictionary(self, provenance: Provenance) -> LinearDictionary | NormedDictionary:
        """The dictionary as it stands, in the units of the activations given; those chosen by batch become JumpReLU."""
        kept = type(self.weights)(*(w.detach().cpu().clone() for w in self.weights))
        kept = kept if self._rows_are_unit else _with_unit_rows(kept)
        match kept:
            case GatedWeights():
                bias, activation = kept.b_gate, Gated(kept.b_mag / self.scale, kept.r_mag)
            case JumpWeights():
                bias, activation = kept.b_enc, JumpReLU(kept.threshold / self.scale)
            case Weights():
                bias, activation = kept.b_enc, JumpReLU(torch.full((self.spec.d_sae,), self.threshold / self.scale))
                if self.spec.architecture == "topk":
                    activation = TopK(self.spec.active)
                if self.spec.architecture == "standard":
                    activation = ReLU()
        made = LinearDictionary(kept.W_enc.T.contiguous(), bias / self.scale, kept.W_dec, kept.b_dec / self.scale, activation,
                                provenance)
        return NormedDictionary(made, "layer_norm") if self.spec.normalize == "layer_norm" else made

    def save(self, path: Path) -> None:
        """Write a checkpoint (one safetensors file, whole or not at all)."""
        named = self.weights._asdict()
        tensors = {name: w.detach() for name, w in named.items()}
        for name, parameter in named.items():
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
    def resume(cls, path: Path, device: str = "cpu", team: Team = ALONE) -> Trainer:
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
        kind = weights_of(spec.architecture)
        run = cls(spec, kind(*(tensors[name] for name in kind._fields)), scale, team)
        run.threshold, run.idle, run.step_number = threshold, tensors["idle"], int(facts["step"])
        for name, parameter in run.weights._asdict().items():
            prefix = f"adam.{name}."
            state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            if state:
                run._optimizer.state[parameter] = state
        return run


@contextmanager
def arithmetic(precision: Precision, device: str) -> Iterator[None]:
    """Large products inside are taken in `precision`: TF32 where the device has it, bfloat16 by autocast."""
    before = torch.get_float32_matmul_precision()
    lower: AbstractContextManager[object] = torch.autocast(device, torch.bfloat16) if precision == "bfloat16" else nullcontext()
    try:
        if precision == "tf32":
            torch.set_float32_matmul_precision("high")
        with lower:
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _clip(gradients: AnyWeights) -> None:
    """Scale gradients to norm 1 at most, in place: Adam then weighs every batch alike, and does not remember huge first ones.

    After as many steps on a small Llama's residual stream: TopK reaches FVU 0.158 with it, 0.162 without. Thresholds are left
    out: their gradients grow with the price of L0, and would hold the others down (JumpReLU: 0.156; clipped together, 0.162).
    """
    clipped = gradients.linear if isinstance(gradients, JumpWeights) else gradients
    norm = math.sqrt(sum(float(torch.linalg.vector_norm(gradient)) ** 2 for gradient in clipped))
    if norm > 1:
        for gradient in clipped:
            gradient.div_(norm)


def _with_unit_rows(weights: AnyWeights) -> AnyWeights:
    """The same function with decoder rows of norm 1: their sizes go into the codes."""
    norms = weights.W_dec.norm(dim=1).clamp(min=1e-12)
    named = {name: getattr(weights, name) * norms for name in ("b_enc", "b_gate", "b_mag") if name in weights._fields}
    return weights._replace(W_enc=weights.W_enc * norms[:, None], W_dec=weights.W_dec / norms[:, None], **named)


def _first_threshold(spec: TrainSpec, weights: Weights, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "d_sae"]:
    """One threshold for all latents, above which k of them lie on average (a sixteenth of the width where no k is given)."""
    pre = pre_activations(weights, x[:1024])
    wanted = spec.k or max(1, spec.d_sae // 16)
    level = float(pre.flatten().topk(len(pre) * wanted).values[-1])
    return torch.full((spec.d_sae,), max(level, 0.0), dtype=x.dtype)


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
          provenance: Provenance | None = None, device: str = "cpu") -> LinearDictionary | NormedDictionary:
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
