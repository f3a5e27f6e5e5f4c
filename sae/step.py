"""The sparse training step: one dense product (the encoder), everything else on the k active latents a token.

Dense autograd runs six products of 2·B·d·F FLOP a step; only the encoder's is needed. Decoding is a weighted sum of k
decoder rows a token (`embedding_bag`), and so is every gradient:

    recon  = Σ_j a_j·W_dec[j] + b_dec                     ∂L/∂recon = g = 2·(recon − x)/B
    ∂W_dec[j] = Σ_tokens a_j·g                            ∂a_j = g·W_dec[j]      (where a_j > 0)
    ∂W_enc[j] = Σ_tokens ∂a_j·(x − b_dec)                 ∂b_enc[j] = Σ_tokens ∂a_j
    ∂b_dec    = Σ_tokens g − Σ_j ∂b_enc[j]·W_enc[j]

The last line reduces over the batch before the product ("pre-bias gradient"), after Gao et al. 2024 (arXiv 2406.04093),
whose AuxK loss is here too: dead latents reconstruct what the live ones left, and their gradient reaches the encoder.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Weights(NamedTuple):
    """Parameters in training layout: the encoder is stored by latent, so that its sparse gradients are contiguous."""

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, "d_in"]


class Active(NamedTuple):
    """Chosen (token, latent) pairs sorted by token; `starts[b]` is the first pair of token b."""

    tokens: Int[Tensor, "n"]
    latents: Int[Tensor, "n"]
    starts: Int[Tensor, "batch"]


class AuxK(NamedTuple):
    """The auxiliary loss: up to `k` of the `dead` latents a token reconstruct the residual, weighted by `coefficient`."""

    dead: Int[Tensor, "dead"]
    k: int
    coefficient: float


class StepResult(NamedTuple):
    """Gradients in the order of Weights, and what the step saw.

    Attributes:
        grads: of the loss Σ‖recon − x‖²/B (+ AuxK).
        loss: mean squared error, summed over channels, mean over tokens; the AuxK term not included.
        aux_loss: the AuxK term, already weighted; 0 without dead latents.
        active: the chosen pairs.
        values: their activations, ≥ 0.
    """

    grads: Weights
    loss: float
    aux_loss: float
    active: Active
    values: Float[Tensor, "n"]


def pre_activations(weights: Weights, x: Float[Tensor, "batch d_in"],
                    out: Float[Tensor, "batch d_sae"] | None = None) -> Float[Tensor, "batch d_sae"]:
    """(x − b_dec)·W_encᵀ + b_enc, into `out` if given (fresh pages for 8·B·F bytes cost a fifth of the product)."""
    return torch.addmm(weights.b_enc, x - weights.b_dec, weights.W_enc.T, out=out)  # pyright: ignore[reportCallIssue]


def top_k(pre: Float[Tensor, "batch d_sae"], k: int) -> Active:
    """The k largest pre-activations of every token (Makhzani & Frey 2013)."""
    batch = pre.shape[0]
    latents = pre.topk(k, dim=1, sorted=False).indices.reshape(-1)
    starts = torch.arange(0, batch * k, k, device=pre.device)
    return Active(torch.arange(batch, device=pre.device).repeat_interleave(k), latents, starts)


def batch_top_k(pre: Float[Tensor, "batch d_sae"], k: int, floor: float = 0.0) -> Active:
    """The B·k largest positive pre-activations of the whole batch (Bussmann et al. 2024, arXiv 2412.06410).

    `floor` is a guess from the last step that cuts the candidates before they are ranked. The choice is the same for
    every floor: a guess that leaves too few candidates is dropped.
    """
    batch, wanted = pre.shape[0], pre.shape[0] * k
    chosen = (pre > max(floor, 0.0)).nonzero()
    if len(chosen) < wanted and floor > 0:
        chosen = (pre > 0).nonzero()
    if len(chosen) > wanted:
        best = pre[chosen[:, 0], chosen[:, 1]].topk(wanted, sorted=False).indices
        chosen = chosen[best.sort().values]
    tokens, latents = chosen[:, 0].contiguous(), chosen[:, 1].contiguous()
    counts = torch.bincount(tokens, minlength=batch)
    return Active(tokens, latents, counts.cumsum(0) - counts)


def decode(active: Active, values: Float[Tensor, "n"], W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
    """Σ_j a_j·W_dec[j] for every token (no bias)."""
    return F.embedding_bag(active.latents, W_dec, active.starts, mode="sum", per_sample_weights=values)


def sparse_step(weights: Weights, x: Float[Tensor, "batch d_in"], pre: Float[Tensor, "batch d_sae"], active: Active,
                aux: AuxK | None = None) -> StepResult:
    """Loss and gradients of one batch, equal to dense autograd's (see the tests).

    Args:
        weights: the parameters; they are not changed.
        x: activations.
        pre: their pre-activations by `pre_activations`.
        active: which pairs may fire; a pair with a negative pre-activation has value and gradient 0.
        aux: the auxiliary loss, or None.
    """
    batch = x.shape[0]
    values = pre[active.tokens, active.latents].clamp(min=0)
    with torch.enable_grad():  # only the values carry a gradient: this is the kernel for g·W_dec[j] without a gather
        leaf = values.detach().requires_grad_()
        summed = decode(active, leaf, weights.W_dec)
        error = summed.detach() + weights.b_dec - x
        g = error * (2.0 / batch)
        d_values = torch.autograd.grad(summed, leaf, g)[0].masked_fill(values <= 0, 0.0)
    # Grouped by latent, the weight gradients are bags of token rows.
    by_latent = torch.sort(active.latents, stable=True).indices
    rows = active.tokens[by_latent]
    counts = torch.bincount(active.latents, minlength=len(weights.b_enc))
    starts = counts.cumsum(0) - counts
    centred = x - weights.b_dec
    gradient = Weights(
        W_enc=F.embedding_bag(rows, centred, starts, mode="sum", per_sample_weights=d_values[by_latent]),
        b_enc=torch.zeros_like(weights.b_enc).index_add_(0, active.latents, d_values),
        W_dec=F.embedding_bag(rows, g, starts, mode="sum", per_sample_weights=values[by_latent]),
        b_dec=g.sum(dim=0))
    aux_loss = 0.0
    if aux is not None and len(aux.dead):
        aux_loss = _add_aux(weights, gradient, pre, -error, centred, aux)
    gradient.b_dec.sub_(gradient.b_enc @ weights.W_enc)
    loss = float(error.square().sum()) / batch
    return StepResult(gradient, loss, aux_loss, active, values)


def _add_aux(weights: Weights, gradient: Weights, pre: Float[Tensor, "batch d_sae"],
             residual: Float[Tensor, "batch d_in"], centred: Float[Tensor, "batch d_in"], aux: AuxK) -> float:
    """Add the AuxK loss c·Σ‖ê − e‖²/B to `gradient`; dense, but on the dead latents only.

    Departs from Gao et al. in the weight: c falls with the number of dead latents below k, as in sae-lens, so that a
    single dead latent is not asked to explain the whole residual.
    """
    batch, k = len(residual), min(aux.k, len(aux.dead))
    dead_pre = pre[:, aux.dead]
    best = dead_pre.topk(k, dim=1, sorted=False)
    fired = torch.zeros_like(dead_pre).scatter_(1, best.indices, best.values.clamp(min=0))
    decoder = weights.W_dec[aux.dead]
    difference = fired @ decoder - residual
    weight = aux.coefficient * min(len(aux.dead) / aux.k, 1.0)
    g = difference * (2.0 * weight / batch)
    d_fired = (g @ decoder.T).masked_fill(fired <= 0, 0.0)
    gradient.W_dec.index_add_(0, aux.dead, fired.T @ g)
    gradient.W_enc.index_add_(0, aux.dead, d_fired.T @ centred)
    gradient.b_enc.index_add_(0, aux.dead, d_fired.sum(dim=0))
    return weight * float(difference.square().sum()) / batch


def unit_decoder_(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Scale every decoder row to norm 1, in place."""
    W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))


def tangent_(gradient: Float[Tensor, "d_sae d_in"], W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Remove from every row's gradient the part along the (unit) row, in place: it would only change the norm."""
    gradient.addcmul_((gradient * W_dec).sum(dim=1, keepdim=True), W_dec, value=-1)


def fired_latents(active: Active, values: Float[Tensor, "n"], d_sae: int) -> Bool[Tensor, "d_sae"]:
    """Latents with a value above zero somewhere in the batch."""
    fired = torch.zeros(d_sae, dtype=torch.bool, device=values.device)
    fired[active.latents[values > 0]] = True
    return fired
