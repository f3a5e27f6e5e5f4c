"""Which features, were they active before the decision, would be carried to it: attribution over all earlier tokens.

A feature that differs at the decision site is where a state is read; a feature that moves the decision from the tokens before
it is what a state is made of. Here the second kind is looked for, by first order, in the baseline situations alone:

    A_i = mean over situations of Σ_t max(0, h_i − f_{i,t}) · d_i · ∂D/∂x_t,   t before the decision site

with h_i how active latent i typically is where it is active at all (90th percentile on ordinary text). It is the gradient form
of attribution patching (Syed et al., arXiv 2310.10348) with a floor in place of a counterfactual, since a floor is what an
operation can do. D is taken over the first tokens of the acts' wordings, those that belong to one act only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from features.concepts import Situation
from features.deciding import Progress, silent, tokenised
from sae.dictionary import Dictionary
from undertow.core.errors import TextError
from undertow.subjects.sites import Site, port
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import hidden_of, tap

HIGH = 0.9


@final
class Levels(NamedTuple):
    """How active every latent is on ordinary text.

    Attributes:
        rate: share of tokens on which it fires, in [0, 1].
        high: the HIGH quantile of its activation where it fires, in its own units; 0 if it never does.
    """

    rate: Float[np.ndarray, "d_sae"]
    high: Float[np.ndarray, "d_sae"]


def levels(subject: Subject, dictionary: Dictionary, site: Site, rows: Sequence[Sequence[int]]) -> Levels:
    """Levels on texts given as token ids, their first tokens left out."""
    found = []
    for ids in rows:
        codes = dictionary.encode_sparse(tap(subject, torch.tensor([list(ids)]), site)[0, 1:])
        found.append((codes.latents.cpu().numpy(), codes.values.float().cpu().numpy()))
    latents = np.concatenate([pair[0] for pair in found])
    values = np.concatenate([pair[1] for pair in found])
    order = np.lexsort((values, latents))
    values = values[order]
    counts = np.bincount(latents, minlength=dictionary.d_sae)
    starts = counts.cumsum() - counts
    at = starts + np.floor(HIGH * np.maximum(counts - 1, 0)).astype(np.int64)
    high = np.where(counts > 0, values[np.minimum(at, len(values) - 1)], 0.0)
    return Levels(counts / max(1, sum(len(ids) - 1 for ids in rows)), high.astype(float))


def lexical_direction(subject: Subject, site: Site, rows: Sequence[Sequence[int]], tokens: Int64[Tensor, "token"]
                      ) -> Float[Tensor, "d_model"]:
    """The direction, of length 1, that raises the word most by first order: the mean gradient of log P(one of `tokens` comes
    next), summed over the tokens of each text."""
    def said(logits: Float[Tensor, "pos vocab"]) -> Float[Tensor, ""]:
        return logits.log_softmax(dim=-1)[:, tokens.to(logits.device)].logsumexp(dim=-1).sum()

    gradients = torch.cat([slope_of(subject, site, ids, said, 0).gradient for ids in rows])
    return torch.nn.functional.normalize(gradients.float().mean(dim=0), dim=0)


class Slope(NamedTuple):
    """Activations between the first token and the last, and the gradient of something by them."""

    x: Float[Tensor, "pos d_model"]
    gradient: Float[Tensor, "pos d_model"]


def decision_slope(subject: Subject, site: Site, situation: Situation) -> Slope:
    """∂D/∂x at the tokens before the decision site. Raises TextError if no first token tells the acts apart."""
    decision = tokenised(subject, situation)
    costly, keep = ({wording[0] for wording in act} for act in (decision.costly, decision.keep))
    if costly <= keep or keep <= costly:
        raise TextError(f"the acts {situation.costly!r} and {situation.keep!r} cannot be told apart by the first tokens of "
                        "their wordings", "word them so that some begin differently")

    def difference(logits: Float[Tensor, "pos vocab"]) -> Float[Tensor, ""]:
        return logits[-1, sorted(costly - keep)].logsumexp(0) - logits[-1, sorted(keep - costly)].logsumexp(0)

    return slope_of(subject, site, decision.prompt, difference, 1)


def decision_slopes(subject: Subject, site: Site, situations: Sequence[Situation], progress: Progress = silent) -> list[Slope]:
    """`decision_slope` of every situation, in order."""
    slopes = []
    for situation in situations:
        slopes.append(decision_slope(subject, site, situation))
        progress(len(slopes), len(situations))
    return slopes


def room(dictionary: Dictionary, slope: Slope, known: Levels) -> Float[Tensor, "pos d_sae"]:
    """max(0, h_i − f_{i,t}) · d_i · gradient_t: what a floor at h_i changes at every token, by first order."""
    missing = (torch.from_numpy(known.high).to(slope.x) - dictionary.encode(slope.x)).clamp(min=0)
    directions = dictionary.directions(torch.arange(dictionary.d_sae))
    return missing.to(directions) * (slope.gradient.to(directions) @ directions.T)


def attribution_of(dictionary: Dictionary, slopes: Sequence[Slope], known: Levels) -> Float[np.ndarray, "d_sae"]:
    """A of every latent, from `decision_slopes`: in nats of D."""
    total = sum(room(dictionary, slope, known).sum(dim=0).double() for slope in slopes) / len(slopes)
    assert isinstance(total, Tensor)
    return total.numpy(force=True)


def slope_of(subject: Subject, site: Site, ids: Sequence[int], objective: Callable[[Tensor], Tensor], keep: int) -> Slope:
    """Gradient of `objective` (of the logits after the last `keep` tokens; 0: after all) by the activations at `site`."""
    caught: list[Tensor] = []

    def on_output(_module: nn.Module, _args: object, output: object) -> object:
        caught.append(hidden_of(output).detach().requires_grad_())
        return caught[0] if isinstance(output, Tensor) else (caught[0], *output[1:])  # pyright: ignore[reportIndexIssue]

    def on_input(_module: nn.Module, args: tuple[object, ...]) -> tuple[object, ...]:
        caught.append(hidden_of(args).detach().requires_grad_())
        return (caught[0], *args[1:])

    module, reads_input = port(subject.blocks, site)
    hook = module.register_forward_pre_hook(on_input) if reads_input else module.register_forward_hook(on_output)
    try:
        with torch.enable_grad():
            tokens = torch.tensor([list(ids)], device=subject.device)
            logits = subject.hf_model(input_ids=tokens, use_cache=False, logits_to_keep=keep).logits[0]
            (gradient,) = torch.autograd.grad(objective(logits.float()), caught[0])
    finally:
        hook.remove()
    return Slope(caught[0][0, 1:-1].detach(), gradient[0, 1:-1])

