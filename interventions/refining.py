"""Refining a set: what its floors do is improved by exact gradients, taken where the floors stand.

A set is proposed by first order at the untouched subject (`features.balance`). Where its floors are up, the model is another
one: some candidates no longer help, others do. So the weights w of all candidates are improved by sequential quadratic
programming (Nocedal and Wright 2006, chapter 18). Each step takes the gradients of three figures by w, with the floors up,

    g   of the mean P(costly act) in situations, the operation being on in the bench's window and off from the decision on
    m   of the mean of KL(base‖arm) on ordinary text, nats a token
    q   of its 99th percentile: the mean gradient over the tokens whose KL is near it

and goes by the δ that maximises g·δ where, to first order, both stay within their limits, w + δ ≥ 0, the word is moved no
more than before (|L·(w + δ)| ≤ |L·w|, L being `balance`'s under the trial's gate), and δᵀHδ ≤ r²·wᵀHw with `balance`'s H. Only
the blocks above the site are run, forth and back. What comes out is a proposal again: its dose is looked for on other texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy.optimize import minimize
from torch import Tensor

from features.balance import Balance
from interventions.applying import Operated, first_window, is_open
from interventions.recall import Recall
from interventions.recipe import Recipe, Trigger, WindowRule
from interventions.tune import Bench, Trial, TuneSpec, floors, opened, same
from undertow.subjects.organisms.measuring import log_masses
from undertow.subjects.padding import batches, pad
from undertow.subjects.splicing import EditResult, Memory, splice

_RADII = (0.25, 0.25, 0.2, 0.2, 0.15)  # r of every step
_NEAR = 0.15  # how far from the 99th percentile a token's KL may lie, as a share of it
_RIDGE = 0.1  # of H's own diagonal
_LEAST = 1e-3  # of the largest weight
_BATCH = 1_024


@final
@dataclass(frozen=True, eq=False)
class LiftedFloors:
    """Floors at weights · unit as an edit for `splice`, through which gradients run to the weights, not to codes or gate."""

    recall: Recall
    latents: tuple[int, ...]
    weights: Float[Tensor, "k"]
    unit: Float[Tensor, "k"]
    trigger: Trigger | None

    def __call__(self, x: Float[Tensor, "batch pos d_model"], editable: Bool[Tensor, "batch pos"]) -> EditResult:
        looked_at = () if self.trigger is None else self.trigger.latents
        wanted = torch.tensor([*self.latents, *looked_at], dtype=torch.long, device=self.recall.dictionary.W_dec.device)
        with torch.no_grad():
            values = self.recall.latent_values(x[editable], wanted)
            directions = self.recall.dictionary.directions(wanted[: len(self.latents)])
        rise = (self.weights * self.unit - values[:, : len(self.latents)]).clamp(min=0)
        delta = torch.zeros(x.shape, dtype=directions.dtype, device=x.device).masked_scatter(
            editable[..., None].expand_as(x), rise.to(directions) @ directions)
        fired = editable.clone()
        if self.trigger is not None:
            fired[editable] = is_open(self.trigger, values[:, len(self.latents):])
        return EditResult(delta, fired)


@final
class Rise(NamedTuple):
    """Mean P(costly act), in [0, 1], over situations and windows, and its gradient by the weights."""

    value: float
    gradient: Float[np.ndarray, "k"]


@final
class Change(NamedTuple):
    """How far ordinary text is from what it was, nats a token: its mean and the bound of its 99th percentile (`tune.Same`),
    with their gradients by the weights; and the percentile itself."""

    mean: float
    mean_gradient: Float[np.ndarray, "k"]
    p99_high: float
    p99_gradient: Float[np.ndarray, "k"]
    p99: float


@final
class Lifting:
    """Floors of given latents under the gate of a trial, as a differentiable function of their weights.

    Args:
        bench: what the search works on; its `lessons` are read.
        trial: whose gate it is.
        latents: the candidates, of which the weights are.
    """

    def __init__(self, bench: Bench, trial: Trial, latents: Sequence[int]) -> None:
        self._bench, self._latents = bench, tuple(latents)
        self._moved = opened(bench, trial, bench.lessons.texts)
        self._recipe: Recipe = floors(bench, trial)
        self._unit = torch.tensor([float(bench.known.high[latent]) for latent in latents], device=bench.subject.device)

    def rise(self, weights: Float[np.ndarray, "k"], costly: str) -> Rise:
        """Of P(costly act) in the situations of `lessons`."""
        total, gradient = 0.0, np.zeros(len(weights))
        for rule in (self._bench.window, "before_decision"):
            value, slope = self._rise(weights, costly, rule)
            total, gradient = total + value / 2, gradient + slope / 2
        return Rise(total, gradient)

    def _rise(self, weights: Float[np.ndarray, "k"], costly: str, rule: WindowRule) -> tuple[float, Float[np.ndarray, "k"]]:
        bench, questions, edit, window = self._bench, self._bench.lessons.questions, self._edit(weights), first_window(rule)
        value, gradient = 0.0, torch.zeros_like(edit.weights)
        with (torch.enable_grad(), bench.below.shared(),
              splice(bench.subject, bench.site, edit, self._recipe.norm_ceiling, window, self._recipe.memory) as counts):
            operated = Operated(bench.subject, window, rule, counts)
            for answered in log_masses(bench.subject, questions, operated.announce):
                given = torch.stack([masses[costly].exp() for masses in answered.values()]).sum() / len(questions)
                value += float(given.detach())
                gradient += torch.autograd.grad(given, edit.weights)[0]
        return value, gradient.double().numpy(force=True)

    def change(self, weights: Float[np.ndarray, "k"], near: float) -> Change:
        """Of the texts of `lessons`; `near`: about where the 99th percentile is, at whose tokens its gradient is taken."""
        bench, (_, texts, untouched), edit = self._bench, self._bench.lessons, self._edit(weights)
        found = {i: np.zeros(len(logits)) for i, logits in enumerate(untouched)}
        mean, high, tail = torch.zeros_like(edit.weights), torch.zeros_like(edit.weights), 0
        with (torch.enable_grad(), bench.below.shared(),
              splice(bench.subject, bench.site, edit, self._recipe.norm_ceiling, None, self._recipe.memory, False)):
            for batch in ([self._moved[at] for at in some] for some in batches([texts[i] for i in self._moved], _BATCH)):
                rows, attend = pad([texts[i] for i in batch], bench.subject, "right")
                logits = bench.subject.hf_model(input_ids=rows, attention_mask=attend, use_cache=False).logits.float()
                read = attend.bool().index_fill(1, torch.tensor([0], device=attend.device), False)  # all but the first tokens
                kl = _kl(torch.cat([untouched[i] for i in batch]), logits[read])
                found |= zip(batch, (of.double().numpy(force=True) for of in kl.split([len(untouched[i]) for i in batch])),
                             strict=True)
                chosen = ((kl - near).abs() <= _NEAR * near).detach()
                mean += torch.autograd.grad(kl.sum(), edit.weights, retain_graph=True)[0]
                high += torch.autograd.grad(kl[chosen].sum(), edit.weights)[0]
                tail += int(chosen.sum())
        figures = same([found[i] for i in range(len(texts))])
        return Change(figures.mean, (mean / sum(map(len, untouched))).double().numpy(force=True), figures.p99_high,
                      (high / max(tail, 1)).double().numpy(force=True), figures.p99)

    def _edit(self, weights: Float[np.ndarray, "k"]) -> LiftedFloors:
        at = torch.tensor(weights, dtype=torch.float32, device=self._unit.device, requires_grad=True)
        return LiftedFloors(self._bench.recall, self._latents, at, self._unit, self._recipe.trigger)


def refined(bench: Bench, made: Balance, trial: Trial, costly: str, spec: TuneSpec) -> Trial:
    """A trial of the same gate with other weights, which does more for the costly act at about the same change of text.

    Args:
        bench: what to work on.
        made: the effects by which the trial was proposed; its candidates are those of the refinement.
        trial: within the limits.
        costly: the act.
        spec: limits, and how many latents may remain.
    """
    lifting, place = Lifting(bench, trial, made.pool), {latent: i for i, latent in enumerate(made.pool)}
    weights = np.zeros(len(made.pool))
    weights[[place[latent] for latent in trial.latents]] = trial.dose * np.array(trial.weights or (1.0,) * len(trial.latents))
    information = made.harm.T @ made.harm / len(made.harm)
    information += np.diag(_RIDGE * np.diag(information) + 1e-12)
    near, word = trial.kl_p99, made.word[made.fires.opened(trial.trigger, Memory(trial.at_least, trial.within))].sum(axis=0)
    for radius in _RADII:
        rise, change = lifting.rise(weights, costly), lifting.change(weights, near)
        near = change.p99
        bounds = [(change.mean_gradient, spec.kl_mean - change.mean),
                  (change.p99_gradient, spec.kl_p99 - change.p99_high),
                  *((sign * word, abs(word @ weights) - sign * (word @ weights)) for sign in (1, -1))]
        weights = step(weights, rise.gradient, bounds, information, radius)
        weights[np.argsort(-weights * np.maximum(rise.gradient, 0), kind="stable")[spec.size:]] = 0.0
    largest = float(weights.max())
    kept = np.flatnonzero(weights > _LEAST * largest)
    unknown = float("nan")
    return trial._replace(latents=tuple(made.pool[i] for i in kept), weights=tuple(float(weights[i] / largest) for i in kept),
                          dose=largest, kl_mean=unknown, kl_p99=unknown, d=unknown, acts=unknown)


def step(weights: Float[np.ndarray, "k"], gain: Float[np.ndarray, "k"], bounds: Sequence[tuple[Float[np.ndarray, "k"], float]],
         information: Float[np.ndarray, "k k"], radius: float) -> Float[np.ndarray, "k"]:
    """Where the best step leads: the weights w + δ ≥ 0 of the largest gain·δ with a·δ ≤ b for every (a, b) of `bounds` and
    δᵀ(information)δ ≤ radius² · wᵀ(information)w.

    A violated bound (b < 0) is asked for only as far as half of the shrinking δ = −radius · w would mend it, so that there
    always is a step.
    """
    scale = 1 / np.sqrt(np.diag(information))
    most = radius ** 2 * max(float(weights @ information @ weights), 1e-300)
    metric = information * np.outer(scale, scale) / most
    rows = np.array([a * scale / max(np.linalg.norm(a * scale), 1e-300) for a, _ in bounds]).reshape(len(bounds), len(weights))
    rooms = np.array([max(b, -radius / 2 * max(a @ weights, 0.0)) / max(np.linalg.norm(a * scale), 1e-300) for a, b in bounds])
    wanted = gain * scale / max(np.linalg.norm(gain * scale), 1e-300)
    constraints = [{"type": "ineq", "fun": lambda z: rooms - rows @ z, "jac": lambda z: -rows},
                   {"type": "ineq", "fun": lambda z: 1 - z @ metric @ z, "jac": lambda z: -2 * metric @ z}]
    found = minimize(lambda z: (-wanted @ z, -wanted), np.zeros(len(weights)), jac=True, method="SLSQP",
                     bounds=[(-w / s, None) for w, s in zip(weights, scale, strict=True)], constraints=constraints,
                     options={"maxiter": 200})
    return np.maximum(weights + found.x * scale, 0.0)


def _kl(base: Float[Tensor, "token vocab"], arm: Float[Tensor, "token vocab"]) -> Float[Tensor, "token"]:
    """KL(base‖arm) after every token, nats, differentiable in the arm."""
    before, after = base.log_softmax(dim=-1), arm.log_softmax(dim=-1)
    return (before.exp() * (before - after)).sum(dim=-1)
