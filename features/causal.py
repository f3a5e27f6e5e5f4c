"""Causes: which latents move D when they are set to what they are in the positive situation.

All of it happens at the decision site of the negative situations: an activation x with codes f is changed to
x + Σ_i (μ_i − f_i)·d_i, where μ_i is the latent's mean in the positive situations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from numpy import ndarray
from scipy.stats import rankdata
from torch import Tensor

from features.concepts import Pair
from features.contrast import Families, encode
from features.deciding import Decision, Primed, Progress, d_gradient, d_under, read_last, silent, tokenised
from sae.dictionary import Dictionary, known_latents
from undertow.core.errors import DictionaryError
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject

_SMALL = 1e-3  # nats; shares of a smaller change of D say nothing


@final
@dataclass(frozen=True, eq=False)
class Baseline:
    """The negative situations of some pairs, read once, to be patched many times. Made by `read_baseline`.

    Attributes:
        subject, dictionary, site: where.
        decisions: the situations as tokens; primed: their prompts, computed up to the decision site.
        families: which family each belongs to.
        x: their activations at the decision site.
        codes: their codes.
        targets: what a patched latent is set to, e.g. `FeatureTable.mean_positive`.
        d: D of each, unpatched, in nats.
    """

    subject: Subject
    dictionary: Dictionary
    site: Site
    decisions: tuple[Decision, ...]
    primed: tuple[Primed, ...]
    families: Families
    x: Float[Tensor, "n d_model"]
    codes: Float32[ndarray, "n d_sae"]
    targets: Float32[ndarray, "d_sae"]
    d: Float64[ndarray, "n"]

    def writes(self, row: int, latents: Sequence[int]) -> Float[Tensor, "k d_model"]:
        """What setting each latent to its target adds to the activation of situation `row`."""
        chosen = list(latents)
        change = torch.from_numpy(self.targets[chosen] - self.codes[row, chosen])
        directions = self.dictionary.directions(torch.tensor(chosen, dtype=torch.long)).float().cpu()
        return change[:, None] * directions


def read_baseline(subject: Subject, dictionary: Dictionary, site: Site, pairs: Sequence[Pair],
                  targets: Float32[ndarray, "d_sae"], progress: Progress = silent) -> Baseline:
    """Read the negative situations of `pairs`. Raises DictionaryError if `targets` are of another SAE."""
    if len(targets) != dictionary.d_sae:
        raise DictionaryError(f"targets of {len(targets)} latents given with an SAE of {dictionary.d_sae}",
                              "use the table that was scanned with this SAE")
    families = Families.of(pairs)
    decisions = tuple(tokenised(subject, pair.negative) for pair in pairs)
    x = read_last(subject, site, [decision.prompt for decision in decisions])
    primed, d = [], []
    for decision in decisions:
        primed.append(Primed(subject, decision.prompt))
        with torch.no_grad():
            d.append(float(d_under(primed[-1], decision, site, torch.zeros(1, subject.d_model))))
        progress(len(d), len(decisions))
    codes = encode(dictionary, x)
    return Baseline(subject, dictionary, site, decisions, tuple(primed), families, x, codes, targets, np.array(d))


def changes(baseline: Baseline, deltas: Callable[[int], Float[Tensor, "k d_model"]], site: Site | None = None,
            progress: Progress = silent) -> Float64[ndarray, "n k"]:
    """Exact change of D in nats, for every situation and each of its `deltas(row)`, added at `site` (the baseline's)."""
    found = []
    with torch.no_grad():
        for row, decision in enumerate(baseline.decisions):
            patched = d_under(baseline.primed[row], decision, site or baseline.site, deltas(row))
            found.append(patched.numpy(force=True) - baseline.d[row])
            progress(row + 1, len(baseline.decisions))
    return np.stack(found)


def patch_effects(baseline: Baseline, latents: Sequence[int], progress: Progress = silent) -> Float64[ndarray, "k"]:
    """Exact effect on D, in nats, of setting each latent alone to its target: mean over families."""
    known_latents(torch.tensor(list(latents), dtype=torch.long), baseline.dictionary.d_sae)
    return baseline.families.mean(changes(baseline, lambda row: baseline.writes(row, latents), progress=progress))


def joint_effects(baseline: Baseline, sets: Sequence[Sequence[int]], site: Site | None = None,
                  progress: Progress = silent) -> Float64[ndarray, "n set"]:
    """Exact change of D, in nats, in every situation, of setting all latents of a set at once; one column a set."""
    def deltas(row: int) -> Float[Tensor, "set d_model"]:
        return torch.stack([baseline.writes(row, chosen).sum(dim=0) for chosen in sets])

    return changes(baseline, deltas, site, progress)


@final
class Attribution(NamedTuple):
    """First-order effects on D in nats, mean over families.

    Attributes:
        latents: of setting each latent alone to its target.
        error: of setting the SAE's error (x − x̂) to its mean in the positive situations.
        whole: of setting the whole activation to the positive mean; the sum of all the others, if targets are positive means.
        exact: the true effect of setting the whole activation to the positive mean, to compare `whole` with.
    """

    latents: Float64[ndarray, "d_sae"]
    error: float
    whole: float
    exact: float


def attribution(baseline: Baseline, pairs: Sequence[Pair], at: Sequence[float] = (0.0,),
                progress: Progress = silent) -> Attribution:
    """Attribution patching on latents: gradient of D × (target − f), with the SAE's error as a node of its own.

    Args:
        baseline: the negative situations.
        pairs: the pairs that it was read from; their positive sides give the mean activation.
        at: how far on the way to the positive mean the gradients are taken and averaged; (0,) is plain attribution patching
            (Syed et al. 2023, arXiv 2310.10348), evenly spread midpoints are integrated gradients (Sundararajan et al. 2017).
        progress: called with (situations done, of how many).
    """
    dictionary, families = baseline.dictionary, baseline.families
    positive = read_last(baseline.subject, baseline.site, [baseline.subject.encode(pair.positive.prompt) for pair in pairs])
    goal = torch.from_numpy(families.mean(positive.double().numpy())).float()
    gradients = _gradients(baseline, [goal - x for x in baseline.x], at, progress)
    errors = baseline.x - _decoded(dictionary, baseline.codes)
    positive_errors = positive - _decoded(dictionary, encode(dictionary, positive))
    error_goal = torch.from_numpy(families.mean(positive_errors.double().numpy()))
    every = torch.arange(dictionary.d_sae)
    slopes = (gradients @ dictionary.directions(every).float().cpu().T).numpy()
    effects = slopes * (baseline.targets - baseline.codes)
    along_error = (gradients.double() * (error_goal - errors.double())).sum(dim=1).numpy()
    along_whole = (gradients * (goal - baseline.x)).sum(dim=1).double().numpy()
    exact = changes(baseline, lambda row: (goal - baseline.x[row])[None])
    return Attribution(families.mean(effects.astype(np.float64)), float(families.mean(along_error)),
                       float(families.mean(along_whole)), float(families.mean(exact[:, 0])))


def _decoded(dictionary: Dictionary, codes: Float32[ndarray, "n d_sae"]) -> Float[Tensor, "n d_model"]:
    with torch.inference_mode():
        return dictionary.decode(torch.from_numpy(codes)).float().cpu()


def _gradients(baseline: Baseline, ways: Sequence[Float[Tensor, "d_model"]], at: Sequence[float],
               progress: Progress = silent) -> Float[Tensor, "n d_model"]:
    """∂D/∂x of every situation, averaged over points on its way."""
    found = []
    for decision, primed, way in zip(baseline.decisions, baseline.primed, ways, strict=True):
        slopes = [d_gradient(primed, decision, baseline.site, part * way) for part in at]
        found.append(torch.stack(slopes).mean(dim=0))
        progress(len(found), len(ways))
    return torch.stack(found)


def attribution_given(baseline: Baseline, chosen: Sequence[int], latents: Sequence[int]) -> Float64[ndarray, "k"]:
    """First-order effect on D, in nats, of setting each of `latents` to its target where `chosen` have been set already."""
    ways = [baseline.writes(row, chosen).sum(dim=0) for row in range(len(baseline.decisions))]
    gradients = _gradients(baseline, ways, (1.0,))
    effects = np.stack([(baseline.writes(row, latents) @ gradients[row]).numpy() for row in range(len(ways))])
    return baseline.families.mean(effects.astype(np.float64))


@final
class CausalDirection(NamedTuple):
    """The difference of means v = x̄⁺ − x̄⁻ at the decision site, and what of it the SAE carries.

    Attributes:
        direction: v, in units of the activation.
        carried: v̂ = Σ_i (f̄_i⁺ − f̄_i⁻)·d_i, the part that is written in latents.
        cosine: cosine of v and v̂, in [−1, 1].
        explained: 1 − ‖v − v̂‖² / ‖v‖², at most 1.
        effect: exact mean change of D when v is added, in nats; carried_effect: when v̂ is added.
        causal_share: carried_effect / effect; None where the effect is below 0.001 nats.
    """

    direction: Float[Tensor, "d_model"]
    carried: Float[Tensor, "d_model"]
    cosine: float
    explained: float
    effect: float
    carried_effect: float
    causal_share: float | None


def causal_direction(baseline: Baseline, pairs: Sequence[Pair], progress: Progress = silent) -> CausalDirection:
    """The difference of means over families, added to every negative situation; `pairs` are those of the baseline."""
    positive = read_last(baseline.subject, baseline.site, [baseline.subject.encode(pair.positive.prompt) for pair in pairs])
    mean = baseline.families.mean
    v = torch.from_numpy(mean((positive - baseline.x).double().numpy())).float()
    difference = mean((encode(baseline.dictionary, positive) - baseline.codes).astype(np.float64))
    fired = [int(i) for i in np.flatnonzero(difference)]
    rows = baseline.dictionary.directions(torch.tensor(fired, dtype=torch.long)).float().cpu()
    carried = torch.from_numpy(difference[fired]).float() @ rows
    both = changes(baseline, lambda row: torch.stack([v, carried]), progress=progress)
    effect, carried_effect = (float(value) for value in mean(both))
    return CausalDirection(v, carried, float(torch.cosine_similarity(v, carried, dim=0)),
                           float(1 - (v - carried).square().sum() / v.square().sum().clamp_min(1e-30)), effect, carried_effect,
                           carried_effect / effect if abs(effect) >= _SMALL else None)


@final
class WriterShare(NamedTuple):
    """Change of D by a set, and the part of it that the set writes straight into the words of the acts (both in nats)."""

    effect: float
    direct: float

    @property
    def share(self) -> float | None:
        """direct / effect; None where the effect is below 0.001 nats. Near 1: the set writes the act's words, no state."""
        return self.direct / self.effect if abs(self.effect) >= _SMALL else None


def act_writer_share(baseline: Baseline, latents: Sequence[int]) -> WriterShare:
    """The act-writer share of a set: D's change with the outputs of all later blocks held at what they are unpatched.

    With these held the delta stands unchanged at the end of the last block, at the decision site and nowhere else, so the same
    delta is added there: it then passes through the final norm and the unembedding alone.
    """
    last = Site(baseline.subject.n_layers - 1, "resid_post")
    whole, direct = (joint_effects(baseline, [latents], site)[:, 0] for site in (None, last))
    return WriterShare(float(baseline.families.mean(whole)), float(baseline.families.mean(direct)))


def writer_shares(baseline: Baseline, latents: Sequence[int], effects: Float64[ndarray, "k"]) -> list[float | None]:
    """The act-writer share of each latent alone, given its `patch_effects`; None where the effect is below 0.001 nats."""
    last = Site(baseline.subject.n_layers - 1, "resid_post")
    direct = baseline.families.mean(changes(baseline, lambda row: baseline.writes(row, latents), last))
    return [float(part / whole) if abs(whole) >= _SMALL else None for part, whole in zip(direct, effects, strict=True)]


def rank_correlation(first: Float64[ndarray, "k"], second: Float64[ndarray, "k"]) -> float | None:
    """Spearman's rank correlation, in [−1, 1]; None for fewer than three values, or where one side is constant."""
    if len(first) < 3 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])
