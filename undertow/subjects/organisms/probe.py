"""A linear probe of the bond: trained on half of the stories, judged on the other half.

A probe says what can be read, not what the model uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from undertow.subjects.keeper.story import Story
from undertow.subjects.organisms.measuring import Progress, act_question, sentence_ends
from undertow.subjects.organisms.statistics import Estimate, mean, stream
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import hidden_of, tap

_SHRINKAGES = (0.003, 0.01, 0.03, 0.1, 0.3, 0.9)


@final
class Linear(NamedTuple):
    """A linear reading: standardise by `centre` and `scale`, add `weight` and `bias`, take the largest class."""

    centre: Float[np.ndarray, "d"]
    scale: Float[np.ndarray, "d"]
    weight: Float[np.ndarray, "d classes"]
    bias: Float[np.ndarray, "classes"]

    def read(self, x: Float[np.ndarray, "n d"]) -> Int[np.ndarray, "n"]:
        """The class of every row."""
        return (((x - self.centre) / self.scale) @ self.weight + self.bias).argmax(axis=1)


class _Spread(NamedTuple):
    """Standardisation, class means, class shares, and the directions and variances of what lies within classes."""

    centre: Float[np.ndarray, "d"]
    scale: Float[np.ndarray, "d"]
    means: Float[np.ndarray, "classes d"]
    shares: Float[np.ndarray, "classes"]
    directions: Float[np.ndarray, "rank d"]
    variances: Float[np.ndarray, "rank"]


@final
class Reading(NamedTuple):
    """What a probe read: stranger against bond 3, and the bond itself (chance: 0.5, and 0.25)."""

    binary: Estimate
    bond: Estimate


@final
class ProbeResult(NamedTuple):
    """Accuracy at the decision after every block, and at earlier sentence ends after the best block.

    Attributes:
        layers: for every block, in order.
        best: the block with the highest binary accuracy.
        curve: (sentence ends before the decision, reading there): 1 is the full stop just before "The keeper".
    """

    layers: tuple[Reading, ...]
    best: int
    curve: tuple[tuple[int, Reading], ...]


def fit(x: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"], classes: int) -> Linear:
    """Linear discriminant with a shrunken covariance; how much it shrinks is chosen on every fourth row.

    (Regression onto one-hot labels would not do: with classes in a row it never finds the middle ones.)
    """
    inner = np.arange(len(x)) % 4 != 0 if len(x) >= 8 else np.ones(len(x), dtype=bool)
    tried = _spread(x[inner], labels[inner], classes)
    judged = ~inner if len(x) >= 8 else inner
    right = [np.sum(_discriminant(tried, shrink).read(x[judged]) == labels[judged]) for shrink in _SHRINKAGES]
    return _discriminant(_spread(x, labels, classes), _SHRINKAGES[int(np.argmax(right))])


def _spread(x: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"], classes: int) -> _Spread:
    centre, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 1e-9 * max(float(scale.max()), 1e-30), scale, np.inf)  # a constant channel says nothing
    z, counts = (x - centre) / scale, np.bincount(labels, minlength=classes)
    means = np.stack([z[labels == k].sum(axis=0) / max(counts[k], 1) for k in range(classes)])
    _, singular, directions = np.linalg.svd(z - means[labels], full_matrices=False)
    return _Spread(centre, scale, means, counts / len(x), directions, singular**2 / len(x))


def _discriminant(spread: _Spread, shrink: float) -> Linear:
    level = shrink * max(float(spread.variances.sum()) / len(spread.centre), 1e-12)
    along = spread.means @ spread.directions.T
    rest = (spread.means - along @ spread.directions) / level
    weight = ((along / ((1 - shrink) * spread.variances + level)) @ spread.directions + rest).T
    with np.errstate(divide="ignore"):
        prior = np.log(spread.shares)  # -inf for a class without rows, which is then never read
    return Linear(spread.centre, spread.scale, weight, prior - 0.5 * (spread.means * weight.T).sum(axis=1))


def accuracy(x: Float[np.ndarray, "n d"], labels: Int[np.ndarray, "n"], trained_on: Bool[np.ndarray, "n"], classes: int,
             seed: int) -> Estimate:
    """Share of the rows not trained on whose class is read rightly."""
    probe = fit(x[trained_on], labels[trained_on], classes)
    right = probe.read(x[~trained_on]) == labels[~trained_on]
    return mean(right.astype(float), seed, "probe")


def probe_bond(subject: Subject, stories: Sequence[Story], seed: int, progress: Progress = lambda done, total: None,
               furthest: int = 12) -> ProbeResult:
    """Read the bond at the first decision of `stories` (all bonds, in any order) and up to `furthest` sentence ends before."""
    bonds = np.array([story.episodes[0].bond for story in stories])
    half = _halves(bonds, seed)
    prompts = [act_question(subject, story).prompt for story in stories]
    total = 2 * len(stories)
    at_decision = []
    for done, prompt in enumerate(prompts):
        at_decision.append(_after_every_block(subject, prompt))
        progress(done + 1, total)
    layers = tuple(_reading(np.stack([row[layer] for row in at_decision]), bonds, half, seed)
                   for layer in range(subject.n_layers))
    best = max(range(subject.n_layers), key=lambda layer: layers[layer].binary.value)
    earlier: list[Float[np.ndarray, "places d"]] = []
    site = subject.site(f"blocks.{best}.hook_resid_post")
    for done, (story, prompt) in enumerate(zip(stories, prompts, strict=True)):
        places = sentence_ends(subject, story)[::-1][:furthest]
        earlier.append(tap(subject, torch.tensor([prompt]), site)[0, places].float().cpu().numpy())
        progress(len(stories) + done + 1, total)
    return ProbeResult(layers, best, _curve(earlier, bonds, half, seed))


def _halves(bonds: Int[np.ndarray, "n"], seed: int) -> Bool[np.ndarray, "n"]:
    """True on a random half of the stories of every bond."""
    rng, half = stream(seed, "probe", "halves"), np.zeros(len(bonds), dtype=bool)
    for bond in np.unique(bonds):
        rows = rng.permutation(np.flatnonzero(bonds == bond))
        half[rows[: (len(rows) + 1) // 2]] = True
    return half


def _curve(earlier: Sequence[Float[np.ndarray, "_ d"]], bonds: Int[np.ndarray, "n"], half: Bool[np.ndarray, "n"],
           seed: int) -> tuple[tuple[int, Reading], ...]:
    curve = []
    for back in range(max(map(len, earlier))):
        has = np.array([len(rows) > back for rows in earlier])
        if _enough(bonds[has], half[has]):
            x = np.stack([rows[back] for rows in earlier if len(rows) > back])
            curve.append((back + 1, _reading(x, bonds[has], half[has], seed)))
    return tuple(curve)


def _enough(bonds: Int[np.ndarray, "n"], half: Bool[np.ndarray, "n"]) -> bool:
    """True if both halves hold at least two stories of every bond (later sentences are missing from short stories)."""
    return all(np.sum((bonds == bond) & side) >= 2 for bond in range(4) for side in (half, ~half))


def _reading(x: Float[np.ndarray, "n d"], bonds: Int[np.ndarray, "n"], half: Bool[np.ndarray, "n"], seed: int) -> Reading:
    extreme = (bonds == 0) | (bonds == 3)
    binary = accuracy(x[extreme], (bonds[extreme] == 3).astype(int), half[extreme], 2, seed)
    return Reading(binary, accuracy(x, bonds, half, 4, seed))


def _after_every_block(subject: Subject, prompt: Sequence[int]) -> Float[np.ndarray, "layers d"]:
    """The residual stream at the last token of `prompt` after every block, in one forward pass."""
    found: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda _module, _args, output: found.append(hidden_of(output)[0, -1]))
             for block in subject.blocks]
    try:
        with torch.inference_mode():
            subject.hf_model.base_model(input_ids=torch.tensor([list(prompt)], device=subject.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).float().cpu().numpy()
