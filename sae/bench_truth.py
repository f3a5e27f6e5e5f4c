"""Recovery of known features: our trainer and sae-lens' on the same synthetic activations, from the same weights.

SynthSAEBench's recipe scaled down: 256 features in 64 dimensions, an SAE of 64 latents, k 4, 2,000 steps of 512. The learning
rate is the same for both; at 0.003 both explain more variance than at 0.001. What a training recovers depends on its seed: F1
differs by several hundredths between seeds, for either trainer.
"""

from __future__ import annotations

from typing import NamedTuple

from sae.architectures import Architecture
from sae.bench_quality import QualitySize, quality_spec, scaled, train_ours, train_theirs
from sae.ground_truth import Recovery, Sample, SyntheticSize, bench_model, directions_of, draw, recovery
from sae.harvesting import Progress

SIZE = SyntheticSize()
TRAINING = QualitySize(64, 4, 512, 2000)
LEARNING_RATE = 3e-3
TRAIN, HELD_OUT = 200_000, 20_000
DATA = f"a synthetic model of {SIZE.features} features in {SIZE.d_in} dimensions"


class TruthPair(NamedTuple):
    """What both recovered."""

    ours: Recovery
    theirs: Recovery


def recover_both(architecture: Architecture, seed: int) -> TruthPair:
    """Make a model, train both on the same stream, judge both on other activations."""
    model = bench_model(SIZE, seed)
    train, held_out = draw(model, TRAIN, 2 * seed), draw(model, HELD_OUT, 2 * seed + 1)
    data = scaled(train.x, held_out.x)
    spec = quality_spec(architecture, TRAINING, seed).model_copy(update={"lr": LEARNING_RATE})
    judged = [Sample(data.held_out, held_out.active)]
    return TruthPair(*(recovery(by(spec, data.train), directions_of(model), judged) for by in (train_ours, train_theirs)))


def truth_pairs(architecture: Architecture, seeds: int, progress: Progress) -> list[TruthPair]:
    """The comparison once a seed; `progress` is called after each."""
    found: list[TruthPair] = []
    for seed in range(seeds):
        found.append(recover_both(architecture, seed))
        progress(seed + 1, seeds)
    return found
