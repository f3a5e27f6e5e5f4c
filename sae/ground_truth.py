"""Ground truth: does a dictionary find the features that activations were made of? On models of `sae_lens.synthetic`.

Reconstruction does not answer this: on SynthSAEBench (Chanin 2026) the architecture that explains most variance recovers
fewest features. The measures are those of that benchmark, by their definitions.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae.dictionary import Dictionary
from undertow.core.errors import TextError

CHUNK = 4096


class Recovery(NamedTuple):
    """How well the features of the truth are found; all in [0, 1], 1 is perfect.

    Every latent stands for the true feature whose direction is nearest to its own, by |cosine|; several may share one.

    Attributes:
        f1: of "the latent is active" as a sign of "its feature is active", mean over latents; 0 for one that never fires.
        precision: of the same, mean over latents.
        recall: of the same, mean over latents.
        mcc: mean |cosine| over the best one-to-one matching of latents and features (arXiv 2505.20254). Not 0 by chance:
            random directions have some |cosine| too.
        uniqueness: distinct features stood for / latents.
    """

    f1: float
    precision: float
    recall: float
    mcc: float
    uniqueness: float


class Sample(NamedTuple):
    """Activations, and which true features were active in them."""

    x: Float[Tensor, "token d_in"]
    active: Bool[Tensor, "token feature"]


def recovery(dictionary: Dictionary, directions: Float[Tensor, "feature d_in"], samples: Iterable[Sample]) -> Recovery:
    """Judge `dictionary` against the true directions. Raises TextError without a sample."""
    cosine = similarity(dictionary.directions(torch.arange(dictionary.d_sae)).float().cpu(), directions)
    nearest = cosine.argmax(dim=1)
    both, fired, present = torch.zeros(3, dictionary.d_sae, dtype=torch.float64)
    tokens = 0
    for x, active in samples:
        fires, shows = dictionary.encode(x).cpu() != 0, active[:, nearest]
        both += (fires & shows).sum(dim=0)
        fired += fires.sum(dim=0)
        present += shows.sum(dim=0)
        tokens += len(x)
    if not tokens:
        raise TextError("no activation to judge on")
    f1, precision, recall = (float((2 * both / (fired + present).clamp(min=1)).mean()),
                             float((both / fired.clamp(min=1)).mean()), float((both / present.clamp(min=1)).mean()))
    return Recovery(f1, precision, recall, matched(cosine), len(nearest.unique()) / dictionary.d_sae)


def similarity(a: Float[Tensor, "n d_in"], b: Float[Tensor, "m d_in"]) -> Float[Tensor, "n m"]:
    """|cosine| of every row with every row; 0 for a row of zeros."""
    unit = [rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12) for rows in (a, b)]
    return (unit[0] @ unit[1].T).abs()


def matched(cosine: Float[Tensor, "n m"]) -> float:
    """Mean over the one-to-one matching of rows and columns that makes it largest."""
    rows, columns = linear_sum_assignment(cosine.numpy(), maximize=True)
    return float(cosine[torch.as_tensor(rows), torch.as_tensor(columns)].mean())


class SyntheticSize(NamedTuple):
    """A model of `sae_lens.synthetic`: true features, width of the activations, trees of features."""

    features: int = 256
    d_in: int = 64
    trees: int = 16


def bench_model(size: SyntheticSize, seed: int) -> Any:
    """SynthSAEBench's recipe, scaled down: trees of features whose siblings exclude each other, Zipfian firing,
    correlated features, strengths that vary, directions that share too few dimensions."""
    from sae_lens import synthetic
    from sae_lens.synthetic.firing_magnitudes import FoldedNormalMagnitudeConfig, LinearMagnitudeConfig

    config = synthetic.SyntheticModelConfig(
        num_features=size.features, hidden_dim=size.d_in, seed=seed, bias=1.0,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=0.005),
        hierarchy=synthetic.HierarchyConfig(total_root_nodes=size.trees, branching_factor=4, max_depth=2,
                                            mutually_exclusive_portion=1.0, compensate_probabilities=True),
        orthogonalization=synthetic.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=synthetic.LowRankCorrelationConfig(rank=8, correlation_scale=0.1, seed=seed),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0))
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar
        return synthetic.SyntheticModel(config)


def draw(model: Any, n: int, seed: int) -> Sample:
    """`n` activations of a synthetic model, the same for the same seed. It draws from the global stream, which is put back."""
    parts: list[Sample] = []
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for start in range(0, n, CHUNK):
            x, features = model.sample_with_features(min(CHUNK, n - start))
            parts.append(Sample(x, features > 0))
    return Sample(torch.cat([part.x for part in parts]), torch.cat([part.active for part in parts]))


def directions_of(model: Any) -> Float[Tensor, "feature d_in"]:
    """The true directions of a synthetic model."""
    return model.feature_dict.feature_vectors.detach()

