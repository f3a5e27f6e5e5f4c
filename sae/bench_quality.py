"""Equal quality: our trainer and sae-lens', from the same weights, on the same batches, for as many steps.

The activations are those of the packaged organism `hearth` after block 2, scaled to mean norm √d for both. Learning rate and
its schedule, and the price of sparsity with its warm-up, are ours for both; the rest is each trainer's own default (so are
JumpReLU's first thresholds, kernel and penalty). Where no k decides on sparsity, FVU says little without the L0 beside it.
Judged on activations of held-out documents, from what each saves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import BY_PRICE, Architecture, TrainSpec
from sae.corpus import Split, open_corpus
from sae.dictionary import Dictionary, Provenance
from sae.harvesting import Progress, harvest
from sae.metrics import Reconstruction, reconstruction
from sae.peers import Job, opened, quietly, sae_lens_dictionary, sae_lens_trainer, take_weights
from sae.text import TextSpec
from sae.training import Trainer
from undertow.core.errors import TextError
from undertow.core.seeds import generator
from undertow.subjects.load import load_subject

SUBJECT, SITE, TEXT = "hearth", "blocks.2.hook_resid_post", "keeper:1200"
TOKENS, HELD_OUT = 120_000, 8_000
DATA = f"{SITE} of {SUBJECT}, {TEXT}"
PRICE = 2.0
CHUNK = 4096


class Activations(NamedTuple):
    """Activations to train on and to judge on, of mean norm √d."""

    train: Float[Tensor, "n d_in"]
    held_out: Float[Tensor, "m d_in"]


class QualitySize(NamedTuple):
    """How large the comparison is: latents, active latents, activations a step, steps."""

    d_sae: int = 512
    k: int = 16
    batch: int = 512
    steps: int = 1000


class Pair(NamedTuple):
    """What both reached on the held-out activations."""

    ours: Reconstruction
    theirs: Reconstruction

    @property
    def difference(self) -> float:
        """(our FVU − theirs) / theirs; below zero, ours is better."""
        return self.ours.fvu / self.theirs.fvu - 1


def load_activations(size: QualitySize, cache: Path, progress: Progress) -> Activations:
    """Activations of the packaged organism on its own world, harvested once into the cache."""
    subject = load_subject(SUBJECT, "cpu")
    spec = TextSpec.checked({"source": TEXT, "held_out": 0.06}, "bench")
    wanted: tuple[tuple[Split, int], ...] = (("train", TOKENS), ("held_out", HELD_OUT))
    found: list[Tensor] = []
    for split, n in wanted:
        corpus = open_corpus(spec, split, subject.tokenizer, subject.bos_id)
        store = harvest(subject, subject.site(SITE), corpus, n, cache, progress)
        found.append(torch.cat([x for _, x in store.chunks(CHUNK)]))
    if len(found[0]) < size.batch:
        raise TextError(f"{len(found[0])} activations are fewer than a batch of {size.batch}", "choose a smaller --batch-size")
    return scaled(*found)


def scaled(train: Float[Tensor, "n d_in"], held_out: Float[Tensor, "m d_in"]) -> Activations:
    """Both in units in which the mean norm of the first is √d."""
    factor = math.sqrt(train.shape[1]) / float(train.norm(dim=1).mean())
    return Activations(train * factor, held_out * factor)


def quality_spec(architecture: Architecture, size: QualitySize, seed: int) -> TrainSpec:
    """The training that both carry out."""
    sparse: dict[str, Any] = {"penalty": {"coefficient": PRICE}} if architecture in BY_PRICE else {"k": size.k}
    return TrainSpec.checked({**sparse, "architecture": architecture, "d_sae": size.d_sae, "steps": size.steps,
                              "batch_size": size.batch, "normalize": "none", "seed": seed}, "bench")


def shuffled(x: Float[Tensor, "n d_in"], size: int, seed: int) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Endless batches; every epoch is a permutation."""
    epoch = 0
    while True:
        order = torch.randperm(len(x), generator=generator(seed, "shuffle", epoch))
        for part in range(len(x) // size):
            yield x[order[part * size:(part + 1) * size]]
        epoch += 1


def compare_trainers(spec: TrainSpec, data: Activations) -> Pair:
    """Train both, and judge what each saves."""
    return Pair(*(reconstruction(train(spec, data.train), data.held_out.split(CHUNK)) for train in (train_ours, train_theirs)))


def train_ours(spec: TrainSpec, x: Float[Tensor, "n d_in"]) -> Dictionary:
    """By our trainer."""
    trainer = Trainer.begin(spec, x)
    batches = shuffled(x, spec.batch_size, spec.seed)
    while not trainer.finished:
        trainer.step(next(batches))
    return trainer.dictionary(Provenance.unknown())


def train_theirs(spec: TrainSpec, x: Float[Tensor, "n d_in"]) -> Dictionary:
    """By sae-lens' trainer, from the weights with which ours begins."""
    job = Job(x.shape[1], spec, "cpu")
    warm_up = {"jumprelu": "l0_warm_up_steps", "standard": "l1_warm_up_steps", "gated": "l1_warm_up_steps"}
    own = {name: int(spec.steps * spec.penalty.warm_up) for key, name in warm_up.items() if key == spec.architecture}
    dictionary = sae_lens_dictionary(job, **own)
    take_weights(dictionary, Trainer.begin(spec, x).weights)
    trainer = sae_lens_trainer(job, dictionary, shuffled(x, spec.batch_size, spec.seed), lr=spec.peak_lr, lr_end=spec.peak_lr,
                               lr_warm_up_steps=max(1, spec.steps // 20), lr_decay_steps=max(1, spec.steps * 3 // 10))
    return opened(quietly(trainer.fit))


def quality(architecture: Architecture, size: QualitySize, seeds: int, data: Activations, progress: Progress) -> list[Pair]:
    """The comparison once a seed; `progress` is called after each."""
    found: list[Pair] = []
    for seed in range(seeds):
        found.append(compare_trainers(quality_spec(architecture, size, seed), data))
        progress(seed + 1, seeds)
    return found
