"""Trainers of other projects, each with its own defaults and all its bookkeeping, one step at a time on batches given to it.

sae-lens is always here. `sparsify` (EleutherAI; PyPI: eai-sparsify) and `dictionary_learning` (PyPI: dictionary-learning) take
part where they can be imported. What sets the sparsity is ours; learning rate, optimizer, clipping and the rest are theirs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import time
from collections.abc import Callable, Iterator
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import TrainSpec
from sae.dictionary import Dictionary
from sae.formats import load
from sae.step import AnyWeights

STEPS = 10_000  # of the run that a single step is taken from
Step = Callable[[Float[Tensor, "batch d_in"]], float]
Maker = Callable[[Float[Tensor, "batch d_in"]], Step]  # of a step, from a first batch


class Job(NamedTuple):
    """What is trained: on activations of this width, by this spec, on this device."""

    d_in: int
    spec: TrainSpec
    device: str


def timed(step: Callable[[Tensor], Any]) -> Step:
    """The same step, which returns the milliseconds that it took."""

    def run(batch: Tensor) -> float:
        began = time.perf_counter()
        step(batch)
        if batch.device.type == "cuda":
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - began)

    return run


def peer_makers(job: Job) -> tuple[dict[str, Maker], list[str]]:
    """What makes the step of each peer that can train this job, and a line on each that cannot take part. Imports them all."""
    architecture = job.spec.architecture
    importlib.import_module("sae_lens")
    makers: dict[str, Maker] = {f"sae-lens {architecture} step": lambda _: _sae_lens_step(job)}
    notes: list[str] = []
    others = {"dictionary_learning": _dictionary_learning_step}
    if architecture == "topk":
        others["sparsify"] = _sparsify_step
    else:
        notes.append(f"sparsify has no {architecture}")
    for name, make in others.items():
        try:
            quietly(lambda name=name: importlib.import_module(name))
        except (ImportError, AttributeError, RuntimeError) as error:
            missing = importlib.util.find_spec(name) is None
            notes.append(f"{name} is not installed" if missing else f"{name} cannot be imported: {error}")
        else:
            makers[f"{name} {architecture} step"] = lambda _, make=make: make(job)
    return makers, notes


def quietly(work: Callable[[], Any]) -> Any:
    """What `work` returns; what it prints is dropped."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return work()


# ---------------------------------------------------------------- sae-lens


def sae_lens_dictionary(job: Job, **own: Any) -> Any:
    """sae-lens' training SAE of the job's architecture, with its own defaults but for `own`."""
    import sae_lens

    spec = job.spec
    k, price = {"k": spec.k}, {"l1_coefficient": spec.penalty.coefficient}
    name, sparsity = {
        "topk": ("TopK", k), "batchtopk": ("BatchTopK", k), "standard": ("Standard", price), "gated": ("Gated", price),
        "matryoshka": ("MatryoshkaBatchTopK", {**k, "matryoshka_widths": [*spec.inner_prefixes, spec.d_sae]}),
        "jumprelu": ("JumpReLU", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": spec.k} if spec.k else
                     {"l0_coefficient": spec.penalty.coefficient})}[spec.architecture]
    kind = getattr(sae_lens, f"{name}TrainingSAEConfig")
    config = kind(d_in=job.d_in, d_sae=spec.d_sae, device=job.device, **{**sparsity, **own})
    return sae_lens.TrainingSAE.from_dict(config.to_dict())


def sae_lens_trainer(job: Job, dictionary: Any, batches: Iterator[Tensor], **settings: Any) -> Any:
    """sae-lens' trainer of the spec's length, with its defaults but for `settings`."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    spec = job.spec
    defaults = {"lr": 3e-4, "lr_end": 3e-5}
    config = SAETrainerConfig(total_training_samples=spec.steps * spec.batch_size, train_batch_size_samples=spec.batch_size,
                              device=job.device, **{**defaults, **settings})
    return SAETrainer(cfg=config, sae=dictionary, data_provider=batches)


def take_weights(dictionary: Any, weights: AnyWeights) -> None:
    """Give sae-lens' training SAE the values of our weights; its thresholds stay, which suit its own kernel."""
    for name, value in weights._asdict().items():
        if name == "threshold":
            continue
        getattr(dictionary, name).data = (value.T if name == "W_enc" else value).detach().clone().contiguous()


def opened(dictionary: Any) -> Dictionary:
    """sae-lens' training SAE as it is saved for use, opened by us."""
    with TemporaryDirectory() as folder:
        dictionary.save_inference_model(folder)
        return load(folder)


def _sae_lens_step(job: Job) -> Step:
    trainer = sae_lens_trainer(job, sae_lens_dictionary(job), iter(()))

    def step(batch: Tensor) -> None:  # what its `fit` does a step
        trainer.maybe_reset_sparsity()
        trainer.step(batch)
        trainer.n_training_steps += 1

    return timed(step)


# ---------------------------------------------------------------- dictionary_learning


def _dictionary_learning_step(job: Job) -> Step:
    spec = job.spec
    aims = {"k": spec.k}
    widths = [*spec.inner_prefixes, spec.d_sae]
    shares = [(high - low) / spec.d_sae for low, high in zip([0, *widths], widths, strict=False)]
    module, name, own = {
        "topk": ("top_k", "TopKTrainer", aims), "batchtopk": ("batch_top_k", "BatchTopKTrainer", aims),
        "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer", {**aims, "group_fractions": shares}),
        "jumprelu": ("jumprelu", "JumpReluTrainer", {"target_l0": spec.k} if spec.k else {}),
        "standard": ("standard", "StandardTrainer", {"l1_penalty": spec.penalty.coefficient}),
        "gated": ("gdm", "GatedSAETrainer", {"l1_penalty": spec.penalty.coefficient})}[spec.architecture]
    kind = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)
    trainer = quietly(lambda: kind(steps=STEPS, activation_dim=job.d_in, dict_size=spec.d_sae, layer=0, lm_name="none",
                                    device=job.device, **own))
    done = iter(range(STEPS))
    return timed(lambda batch: trainer.update(step=next(done), x=batch) if name != "StandardTrainer" else
                 trainer.update(next(done), batch))


# ---------------------------------------------------------------- sparsify


class _Enough(Exception):
    """Ends sparsify's endless `fit` after one step."""


class _Output(torch.nn.Module):
    def forward(self, batch: Tensor) -> Tensor:
        return batch


@final
class _Feed(torch.nn.Module):
    """Stands where sparsify's trainer wants a transformer: its one module puts out the batch of activations.

    `stamps` are the times at which it was asked for one; between two of them lies a whole step of the trainer.
    """

    def __init__(self, d_in: int, device: str) -> None:
        super().__init__()
        self.source = _Output()
        self.batch = torch.zeros(1, 1, d_in, device=device)
        self.dummy_inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device)}
        self.device = self.batch.device
        self.limit, self.stamps = 0, [0.0]

    @property
    def base_model(self) -> torch.nn.Module:
        return self

    def forward(self, input_ids: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.stamps.append(time.perf_counter())
        if self.limit and len(self.stamps) > self.limit:
            raise _Enough
        self.source(self.batch[:, :input_ids.shape[1]])


@final
class _Rows:
    """A data set of `STEPS` rows of `size` tokens; the activations are the feed's."""

    def __init__(self, size: int) -> None:
        self._tokens = torch.zeros(size, dtype=torch.long)

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._tokens}

    def select(self, indices: Any) -> _Rows:
        """The rest of the data set, from which `fit` goes on: as long as the whole."""
        return self


def _sparsify_step(job: Job) -> Step:
    sparsify = importlib.import_module("sparsify")
    feed = _Feed(job.d_in, job.device)
    config = sparsify.TrainConfig(sparsify.SparseCoderConfig(num_latents=job.spec.d_sae, k=job.spec.k), batch_size=1,
                                  hookpoints=["source"], log_to_wandb=False, save_every=STEPS)
    trainer = quietly(lambda: sparsify.Trainer(config, _Rows(job.spec.batch_size), feed))

    def step(batch: Tensor) -> float:
        feed.batch, feed.stamps, feed.limit = batch[None], [], 1
        precision = torch.get_float32_matmul_precision()
        with contextlib.suppress(_Enough):
            quietly(trainer.fit)
        torch.set_float32_matmul_precision(precision)  # `fit` leaves it changed for all who come after
        return 1e3 * (feed.stamps[1] - feed.stamps[0])

    return step
