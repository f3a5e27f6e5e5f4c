"""Ground truth: the measures by hand and against sae-lens' own; noise scores low; both trainers on one stream."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from sae.bench_truth import SIZE, truth_pairs
from sae.dictionary import LinearDictionary, Provenance, ReLU, TopK
from sae.ground_truth import Sample, bench_model, directions_of, draw, matched, recovery, similarity
from undertow.core.errors import TextError


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dictionary_of(encoder: torch.Tensor, decoder: torch.Tensor, activation: Any = None) -> LinearDictionary:
    """Latents that read `encoder`'s rows and write `decoder`'s."""
    return LinearDictionary(encoder.T.contiguous(), torch.zeros(len(encoder)), decoder, torch.zeros(decoder.shape[1]),
                            activation or ReLU(), Provenance.unknown())


def test_measures_by_hand() -> None:
    """Three features along the axes; two latents share the first, one writes the third with the wrong sign, none the second."""
    directions = torch.eye(3)
    decoder = torch.tensor([[2.0, 0, 0], [0.8, 0.6, 0], [0, 0, -1]])
    encoder = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])  # latent 1 fires with feature 1, and stands for feature 0
    active = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1], [0, 0, 0]]).bool()
    x = active.float()
    x[3, 0] = 1.0  # latent 0 fires where no feature is
    found = recovery(dictionary_of(encoder, decoder), directions, [Sample(x[:1], active[:1]), Sample(x[1:], active[1:])])
    # latent 0: fires on 0, 1, 3; feature 0 on 0, 1: precision 2/3, recall 1, F1 4/5
    # latent 1: fires on 1, 2; stands for feature 0 (cosine 0.8), which is on 0, 1: 1/2, 1/2, 1/2
    # latent 2: fires on 2; feature 2 on 2: 1, 1, 1
    assert found.f1 == pytest.approx((4 / 5 + 1 / 2 + 1) / 3)
    assert found.precision == pytest.approx((2 / 3 + 1 / 2 + 1) / 3) and found.recall == pytest.approx((1 + 1 / 2 + 1) / 3)
    assert found.mcc == pytest.approx((1 + 0.6 + 1) / 3)  # the matching gives latent 1 the feature that is left
    assert found.uniqueness == pytest.approx(2 / 3)
    with pytest.raises(TextError, match="no activation"):
        recovery(dictionary_of(encoder, decoder), directions, [])


def test_measures_are_those_of_sae_lens(sae_lens: Any) -> None:
    """Their functions on random latents, more and fewer than there are features, some of which never fire."""
    from sae_lens.synthetic import compute_classification_metrics, feature_uniqueness, mean_correlation_coefficient

    for width in (5, 20):
        directions, rows = drawn(0, 12, 8), drawn(width, width, 8)
        x, active = drawn(1, 200, 8), drawn(2, 200, 12) > 0.5
        made = dictionary_of(rows, rows, TopK(3))
        found = recovery(made, directions, [Sample(x, active)])
        theirs = compute_classification_metrics(made.encode(x), active.float(), rows, directions)
        assert found[:3] == pytest.approx((theirs.f1_score, theirs.precision, theirs.recall), abs=1e-6)
        assert found.mcc == pytest.approx(mean_correlation_coefficient(rows, directions), abs=1e-6)
        assert found.uniqueness == pytest.approx(feature_uniqueness(rows, directions))


def test_the_truth_scores_high_and_noise_low(sae_lens: Any) -> None:
    """Latents that are the 64 most frequent features against random ones of the same number."""
    model = bench_model(SIZE, 0)
    directions, sample = directions_of(model), draw(model, 4_000, seed=1)
    again = draw(model, 4_000, seed=1)
    assert torch.equal(sample.x, again.x) and torch.equal(sample.active, again.active)
    assert not torch.equal(sample.x, draw(model, 4_000, seed=2).x)
    frequent = sample.active.float().mean(dim=0).argsort(descending=True)[:64]
    centred = Sample(sample.x - model.feature_dict.bias.detach(), sample.active)
    truth, noise = directions[frequent], drawn(3, 64, SIZE.d_in)
    known, random = (recovery(dictionary_of(rows, rows, TopK(4)), directions, [centred]) for rows in (truth, noise))
    assert known.mcc == pytest.approx(1, abs=1e-5) and known.uniqueness == 1 and known.f1 > 0.7
    assert random.mcc < 0.5 and random.f1 < 0.15
    assert matched(similarity(truth, truth.flip(0))) == pytest.approx(1, abs=1e-5)  # in any order


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
def test_recovery_is_not_below_sae_lens(architecture: Any, sae_lens: Any) -> None:
    """SynthSAEBench scaled down, 3 seeds. Noise: the mean of paired differences may lie two of its standard errors below 0."""
    found = truth_pairs(architecture, 3, lambda *_: None)
    for measure in ("f1", "mcc"):
        differences = [getattr(pair.ours, measure) - getattr(pair.theirs, measure) for pair in found]
        noise = statistics.stdev(differences) / math.sqrt(len(differences))
        assert statistics.mean(differences) > -2 * max(noise, 0.003), (measure, found)
        assert min(getattr(pair.ours, measure) for pair in found) > 0.6
