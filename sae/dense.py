"""The training step of dictionaries that are not sparse while they learn (standard L1, gated), by autograd.

Both leave hundreds of latents active a token for most of a run, so that dense products are the right ones. The encoder
reads x·W_encᵀ + (b_enc − W_enc·b_dec), which is (x − b_dec)·W_encᵀ + b_enc without a product for the gradient of x.
Losses are those of sae-lens: decoder rows are free in size, and the penalty is weighted by their norm. (Rows held at norm 1
were tried: at equal learning rate they reach a higher L0 and a higher error, since small rows turn faster.)
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.step import AuxK, GatedWeights, StepResult, Weights, aux_weight


def standard_step(weights: Weights, x: Float[Tensor, "batch d_in"], coefficient: float, aux: AuxK | None = None) -> StepResult:
    """Squared error + coefficient·Σ_j a_j·‖W_dec[j]‖, a = relu(pre) (Bricken et al. 2023), and AuxK for latents that died."""
    leaves = Weights(*(w.detach().requires_grad_() for w in weights))
    with torch.enable_grad():
        pre = torch.addmm(leaves.b_enc - leaves.W_enc @ leaves.b_dec, x, leaves.W_enc.T)
        acts = pre.relu()
        error = acts @ leaves.W_dec + leaves.b_dec - x
        extra = coefficient * (acts @ leaves.W_dec.norm(dim=1)).mean() + _aux_loss(pre, leaves.W_dec, error, aux)
        return _differentiate(leaves, acts, error, extra)


def gated_step(weights: GatedWeights, x: Float[Tensor, "batch d_in"], coefficient: float,
               aux: AuxK | None = None) -> StepResult:
    """Squared error + coefficient·Σ_j relu(π_j)·‖W_dec[j]‖ + ‖x − x̂(relu(π))‖² (Rajamanoharan et al. 2024, arXiv 2404.16014).

    π = (x − b_dec)·W_encᵀ + b_gate opens the gates, a = [π > 0]·relu(exp(r_mag)·(x − b_dec)·W_encᵀ + b_mag). Departs from
    the paper, with sae-lens: the last term moves the decoder too.
    """
    leaves = GatedWeights(*(w.detach().requires_grad_() for w in weights))
    with torch.enable_grad():
        linear = torch.addmm(-(leaves.W_enc @ leaves.b_dec), x, leaves.W_enc.T)
        gate = linear + leaves.b_gate
        acts = (gate > 0) * (linear * leaves.r_mag.exp() + leaves.b_mag).relu()
        error = acts @ leaves.W_dec + leaves.b_dec - x
        opened = gate.relu()
        by_gate = (opened @ leaves.W_dec + leaves.b_dec - x).square().sum(dim=1).mean()
        extra = coefficient * (opened @ leaves.W_dec.norm(dim=1)).mean() + by_gate + _aux_loss(gate, leaves.W_dec, error, aux)
        return _differentiate(leaves, acts, error, extra)


def _aux_loss(pre: Float[Tensor, "batch d_sae"], W_dec: Float[Tensor, "d_sae d_in"], error: Float[Tensor, "batch d_in"],
              aux: AuxK | None) -> Float[Tensor, ""]:
    """AuxK as in the sparse step: the best dead latents of a token reconstruct what is missing."""
    if aux is None or not len(aux.dead):
        return pre.new_zeros(())
    dead_pre = pre[:, aux.dead]
    best = dead_pre.topk(min(aux.k, len(aux.dead)), dim=1, sorted=False)
    fired = torch.zeros_like(dead_pre).scatter(1, best.indices, best.values.relu())
    return aux_weight(aux) * (fired @ W_dec[aux.dead] + error.detach()).square().sum(dim=1).mean()


def _differentiate(leaves: Weights | GatedWeights, acts: Float[Tensor, "batch d_sae"], error: Float[Tensor, "batch d_in"],
                   extra: Float[Tensor, ""]) -> StepResult:
    loss = error.square().sum(dim=1).mean()
    grads = torch.autograd.grad(loss + extra, leaves)
    above = acts.detach() > 0
    positive = acts.detach()[above]
    return StepResult(type(leaves)(*grads), float(loss.detach()), float(extra.detach()), above.any(dim=0),
                      len(positive) / len(acts), float(positive.min()) if len(positive) else 0.0)
