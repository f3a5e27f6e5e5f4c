"""The sparse training step: one dense product (the encoder), everything else on the k active latents a token.

Dense autograd runs six products of 2·B·d·F FLOP a step; only the encoder's is needed. Decoding is a weighted sum of k
decoder rows a token (`embedding_bag`), and so is every gradient:

    recon  = Σ_j a_j·W_dec[j] + b_dec                     ∂L/∂recon = g = 2·(recon − x)/B
    ∂W_dec[j] = Σ_tokens a_j·g                            ∂a_j = g·W_dec[j]      (where a_j > 0)
    ∂W_enc[j] = Σ_tokens ∂a_j·(x − b_dec)                 ∂b_enc[j] = Σ_tokens ∂a_j
    ∂b_dec    = Σ_tokens g − Σ_j ∂b_enc[j]·W_enc[j]

The last line reduces over the batch before the product ("pre-bias gradient"), after Gao et al. 2024 (arXiv 2406.04093),
whose AuxK loss is here too: dead latents reconstruct what the live ones left, and their gradient reaches the encoder.

Nested prefixes (Matryoshka; Bussmann et al. 2025, arXiv 2503.17547) add the loss of the first F₁ < F₂ < … latents alone.
The latents between two prefixes are one *share*; each share is decoded once, prefix m is the sum of the first m shares,
and a latent of share s gets g = Σ_{m ≥ s} g_m. Cost over one prefix: one pass of B·d a share, no further product.

JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435) is as sparse: its pseudo-derivatives live on pairs within half a
bandwidth of their threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.team import ALONE, Team

BLOCK = 1024  # latents whose gradient rows are summed, or corrected, at a time on a CPU: they stay in its cache


class Weights(NamedTuple):
    """Parameters in training layout: the encoder is stored by latent, so that its sparse gradients are contiguous."""

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, "d_in"]


class JumpWeights(NamedTuple):
    """Parameters of a JumpReLU dictionary; `threshold` ≥ 0."""

    W_enc: Float[Tensor, "d_sae d_in"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, "d_in"]
    threshold: Float[Tensor, "d_sae"]

    @property
    def linear(self) -> Weights:
        """All but the thresholds."""
        return Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec)


class GatedWeights(NamedTuple):
    """Parameters of a gated dictionary (Rajamanoharan et al. 2024, arXiv 2404.16014)."""

    W_enc: Float[Tensor, "d_sae d_in"]
    b_gate: Float[Tensor, "d_sae"]
    b_mag: Float[Tensor, "d_sae"]
    r_mag: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, "d_in"]


AnyWeights = Weights | JumpWeights | GatedWeights


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
    """Gradients in the order of the weights, and what the step saw.

    Attributes:
        grads: of the whole loss.
        loss: ‖recon − x‖², summed over channels, mean over tokens, with all latents.
        aux_loss: the rest of the loss, weighted: inner prefixes, AuxK, sparsity penalty.
        fired: latents with a value above zero somewhere in the batch.
        l0: values above zero a token.
        smallest: the smallest value above zero; 0 if there is none.
    """

    grads: AnyWeights
    loss: float
    aux_loss: float
    fired: Bool[Tensor, "d_sae"]
    l0: float
    smallest: float


class Sparsity(NamedTuple):
    """The price of L0, the number of active latents a token, in the units of the squared error.

    With a `target` the penalty is coefficient·target·(L0/target − 1)², L0 being the mean of the batch: tokens may differ,
    as in BatchTopK. Without, it is coefficient·L0.
    """

    coefficient: float
    target: float | None

    def of(self, l0: float) -> tuple[float, float]:
        """(penalty, its derivative by L0)."""
        if self.target is None:
            return self.coefficient * l0, self.coefficient
        off = l0 / self.target - 1
        return self.coefficient * self.target * off * off, 2 * self.coefficient * off


def pre_activations(weights: Weights, x: Float[Tensor, "batch d_in"],
                    out: Float[Tensor, "batch d_sae"] | None = None) -> Float[Tensor, "batch d_sae"]:
    """(x − b_dec)·W_encᵀ + b_enc, into `out` if given (fresh pages for 8·B·F bytes cost a fifth of the product).

    Under autocast the product alone is taken in the lower precision.
    """
    if torch.is_autocast_enabled(x.device.type):
        product = torch.mm(x - weights.b_dec, weights.W_enc.T)
        return torch.add(product, weights.b_enc, out=out)  # pyright: ignore[reportCallIssue]
    return torch.addmm(weights.b_enc, x - weights.b_dec, weights.W_enc.T, out=out)  # pyright: ignore[reportCallIssue]


def top_k(pre: Float[Tensor, "batch d_sae"], k: int) -> Active:
    """The k largest pre-activations of every token (Makhzani & Frey 2013)."""
    batch = pre.shape[0]
    latents = pre.topk(k, dim=1, sorted=False).indices.reshape(-1)
    starts = torch.arange(0, batch * k, k, device=pre.device)
    return Active(torch.arange(batch, device=pre.device).repeat_interleave(k), latents, starts)


def batch_top_k(pre: Float[Tensor, "batch d_sae"], k: int, floor: float = 0.0, team: Team = ALONE) -> Active:
    """The B·k largest positive pre-activations of the whole batch (Bussmann et al. 2024, arXiv 2412.06410).

    `floor` is a guess from the last step that cuts the candidates before they are ranked. The choice is the same for
    every floor: a guess that leaves too few candidates is dropped. Where a team shares the batch, the choice is made over
    all its parts.
    """
    batch, wanted = pre.shape[0], pre.shape[0] * k * team.size
    chosen = (pre > max(floor, 0.0)).nonzero()
    if floor > 0 and team.totals([len(chosen)])[0] < wanted:
        chosen = (pre > 0).nonzero()
    if team.size > 1:
        values = pre[chosen[:, 0], chosen[:, 1]]
        chosen = chosen[values >= team.nth_largest(values, wanted)]
    elif len(chosen) > wanted:
        best = pre[chosen[:, 0], chosen[:, 1]].topk(wanted, sorted=False).indices
        chosen = chosen[best.sort().values]
    return _active(chosen, batch)


def _active(pairs: Int[Tensor, "n 2"], batch: int) -> Active:
    tokens, latents = pairs[:, 0].contiguous(), pairs[:, 1].contiguous()
    counts = torch.bincount(tokens, minlength=batch)
    return Active(tokens, latents, counts.cumsum(0) - counts)


def decode(active: Active, values: Float[Tensor, "n"], W_dec: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "batch d_in"]:
    """Σ_j a_j·W_dec[j] for every token (no bias)."""
    return F.embedding_bag(active.latents, W_dec, active.starts, mode="sum", per_sample_weights=values)


def sparse_step(weights: Weights, x: Float[Tensor, "batch d_in"], pre: Float[Tensor, "batch d_sae"], active: Active,
                aux: AuxK | None = None, prefixes: Sequence[int] = (), into: AnyWeights | None = None) -> StepResult:
    """Loss and gradients of one batch, equal to dense autograd's (see the tests).

    Args:
        weights: the parameters; they are not changed.
        x: activations.
        pre: their pre-activations by `pre_activations`.
        active: which pairs may fire; a pair with a negative pre-activation has value and gradient 0.
        aux: the auxiliary loss, or None.
        prefixes: widths F₁ < F₂ < … below d_sae whose reconstructions are judged too.
        into: gradients of an earlier step, whose memory is used again.
    """
    passed = _through_decoder(weights, x, active, pre[active.tokens, active.latents].clamp(min=0), prefixes)
    d_pre = passed.d_values.masked_fill(passed.values <= 0, 0.0)
    return _result(weights, x, pre, (passed, d_pre), (aux, into))


def jump_step(weights: JumpWeights, x: Float[Tensor, "batch d_in"], pre: Float[Tensor, "batch d_sae"], bandwidth: float,
              sparsity: Sparsity, aux: AuxK | None = None, team: Team = ALONE) -> StepResult:
    """Loss and gradients of one batch of a JumpReLU dictionary: squared error + the price of L0 (+ AuxK).

    Values are a = pre·[pre > θ]. Thresholds learn by the paper's pseudo-derivatives with a rectangular kernel of width ε:
    ∂a/∂θ = −(θ/ε)·[|pre − θ| < ε/2], ∂L0/∂θ = −(1/ε)·[|pre − θ| < ε/2]. Pre-activations get only the true derivative.
    L0 is that of the whole batch, where a team shares it.
    """
    active = _active((pre > weights.threshold - bandwidth / 2).nonzero(), len(x))
    chosen, theta = pre[active.tokens, active.latents], weights.threshold[active.latents]
    is_open = chosen > theta
    passed = _through_decoder(weights.linear, x, active, chosen * is_open, ())
    penalty, slope = sparsity.of(team.means([float(is_open.sum()) / len(x)])[0])
    near = (chosen - theta).abs() < bandwidth / 2
    d_theta = (passed.d_values * theta + slope / len(x)).mul_(near).div_(-bandwidth)
    result = _result(weights.linear, x, pre, (passed, passed.d_values * is_open), (aux, None))
    gradient = torch.zeros_like(weights.threshold).index_add_(0, active.latents, d_theta)
    return result._replace(grads=JumpWeights(*result.grads[:4], gradient), aux_loss=result.aux_loss + penalty)


class _Passed(NamedTuple):
    """Pairs after the decoder. `bags[i]` is the row of `g` that pair i wrote to: its token, in its own share."""

    active: Active
    values: Float[Tensor, "n"]
    bags: Int[Tensor, "n"]
    g: Float[Tensor, "bags d_in"]
    d_values: Float[Tensor, "n"]
    error: Float[Tensor, "batch d_in"]
    inner_loss: float


def _through_decoder(weights: Weights, x: Float[Tensor, "batch d_in"], active: Active, values: Float[Tensor, "n"],
                     prefixes: Sequence[int]) -> _Passed:
    """Decode, and come back as far as the gradient by every value."""
    batch, bags = len(x), active.tokens
    if prefixes:
        active, values, bags = _by_share(active, values, prefixes, batch)
    with torch.enable_grad():  # only the values carry a gradient: this is the kernel for g·W_dec[j] without a gather
        leaf = values.detach().requires_grad_()
        summed = decode(active, leaf, weights.W_dec)
        if prefixes:  # prefix m holds the shares up to m, and a share's gradient is the sum over the prefixes from its own on
            errors = summed.detach().view(-1, *x.shape).cumsum(dim=0) + (weights.b_dec - x)
            g = errors.flip(0).cumsum(dim=0).flip(0).mul_(2.0 / batch).view(-1, x.shape[1])
            error, inner = errors[-1], float(errors[:-1].square().sum()) / batch
        else:
            error, inner = summed.detach() + weights.b_dec - x, 0.0
            g = error * (2.0 / batch)
        d_values = torch.autograd.grad(summed, leaf, g)[0]
    return _Passed(active, values, bags, g, d_values, error, inner)


def _by_share(active: Active, values: Float[Tensor, "n"], prefixes: Sequence[int],
              batch: int) -> tuple[Active, Float[Tensor, "n"], Int[Tensor, "n"]]:
    """The pairs sorted by share and then by token; every (share, token) is one bag."""
    bounds = torch.tensor(prefixes, device=values.device)
    bags, order = (torch.bucketize(active.latents, bounds, right=True) * batch + active.tokens).sort(stable=True)
    counts = torch.bincount(bags, minlength=(len(prefixes) + 1) * batch)
    return Active(active.tokens[order], active.latents[order], counts.cumsum(0) - counts), values[order], bags


def _result(weights: Weights, x: Float[Tensor, "batch d_in"], pre: Float[Tensor, "batch d_sae"],
            after: tuple[_Passed, Float[Tensor, "n"]], more: tuple[AuxK | None, AnyWeights | None]) -> StepResult:
    """Weight gradients from those of the pre-activations. Grouped by latent, they are bags of token rows."""
    (passed, d_pre), (aux, into) = after, more
    latents, values = passed.active.latents, passed.values
    by_latent = torch.sort(latents, stable=True).indices
    counts = torch.bincount(latents, minlength=len(weights.b_enc))
    starts = counts.cumsum(0) - counts
    centred = x - weights.b_dec
    gradient = Weights(
        W_enc=_bags(_Bags(passed.active.tokens[by_latent], d_pre[by_latent], starts), centred, into and into.W_enc),
        b_enc=torch.zeros_like(weights.b_enc).index_add_(0, latents, d_pre),
        W_dec=_bags(_Bags(passed.bags[by_latent], values[by_latent], starts), passed.g, into and into.W_dec),
        b_dec=passed.g[:len(x)].sum(dim=0))  # the first share is part of every prefix
    aux_loss = passed.inner_loss
    if aux is not None and len(aux.dead):
        aux_loss += _add_aux(weights, gradient, pre, -passed.error, centred, aux)
    gradient.b_dec.sub_(gradient.b_enc @ weights.W_enc)
    above = values > 0
    positive = values[above]
    fired = torch.zeros(len(weights.b_enc), dtype=torch.bool, device=values.device)
    fired[latents[above]] = True
    return StepResult(gradient, float(passed.error.square().sum()) / len(x), aux_loss, fired, len(positive) / len(x),
                      float(positive.min()) if len(positive) else 0.0)


class _Bags(NamedTuple):
    """Weighted sums of rows to take: bag j holds the pairs from `starts[j]` on."""

    rows: Int[Tensor, "n"]
    scales: Float[Tensor, "n"]
    starts: Int[Tensor, "bags"]


def _bags(bags: _Bags, source: Float[Tensor, "row d_in"], out: Tensor | None) -> Float[Tensor, "bags d_in"]:
    """Σ scales·source[rows] of every bag, into `out` if given.

    A block of bags at a time on a CPU: at F = 16,384, d = 768 that took 9 ms in place of 32, of which fresh pages were most.
    """
    if source.device.type != "cpu":
        return F.embedding_bag(bags.rows, source, bags.starts, mode="sum", per_sample_weights=bags.scales)
    n = len(bags.starts)
    out = out if out is not None else torch.empty(n, source.shape[1], dtype=source.dtype)
    cuts = [*bags.starts[::BLOCK].tolist(), len(bags.rows)]
    for block, (low, high) in enumerate(pairwise(cuts)):
        here = slice(block * BLOCK, min(n, (block + 1) * BLOCK))
        out[here] = F.embedding_bag(bags.rows[low:high], source, bags.starts[here] - low, mode="sum",
                                    per_sample_weights=bags.scales[low:high])
    return out


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
    weight = aux_weight(aux)
    g = difference * (2.0 * weight / batch)
    d_fired = (g @ decoder.T).masked_fill(fired <= 0, 0.0)
    gradient.W_dec.index_add_(0, aux.dead, fired.T @ g)
    gradient.W_enc.index_add_(0, aux.dead, d_fired.T @ centred)
    gradient.b_enc.index_add_(0, aux.dead, d_fired.sum(dim=0))
    return weight * float(difference.square().sum()) / batch


def aux_weight(aux: AuxK) -> float:
    """The coefficient of the AuxK loss, less where fewer than k latents are dead."""
    return aux.coefficient * min(len(aux.dead) / aux.k, 1.0)


def unit_decoder_(W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Scale every decoder row to norm 1, in place."""
    W_dec.div_(W_dec.norm(dim=1, keepdim=True).clamp(min=1e-12))


def tangent_(gradient: Float[Tensor, "d_sae d_in"], W_dec: Float[Tensor, "d_sae d_in"]) -> None:
    """Remove from every row's gradient the part along the (unit) row, in place: it would only change the norm."""
    size = BLOCK // 4 if gradient.device.type == "cpu" else len(gradient)
    for part, rows in zip(gradient.split(size), W_dec.split(size), strict=True):
        part.addcmul_((part * rows).sum(dim=1, keepdim=True), rows, value=-1)
