"""The sparse step against dense autograd, over shapes, k, dead sets and both ways of choosing."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.step import AuxK, Weights, batch_top_k, pre_activations, sparse_step, tangent_, top_k, unit_decoder_


def random_weights(d_in: int, d_sae: int, seed: int) -> Weights:
    g = torch.Generator().manual_seed(seed)
    draw = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in ((d_sae, d_in), (d_sae,), (d_sae, d_in), (d_in,))]
    return Weights(*draw)


def dense_gradients(weights: Weights, x: torch.Tensor, k: int, by_batch: bool,
                    aux: AuxK | None) -> tuple[float, list[torch.Tensor]]:
    """The same loss by dense matrices and autograd: the independent reference."""
    leaves = [w.clone().requires_grad_() for w in weights]
    W_enc, b_enc, W_dec, b_dec = leaves
    pre = (x - b_dec) @ W_enc.T + b_enc
    rectified = pre.relu()
    if by_batch:
        floor = rectified.flatten().topk(len(x) * k).values[-1]
        acts = torch.where(rectified >= floor, rectified, 0.0)
    else:
        best = pre.topk(k, dim=1)
        acts = torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
    recon = acts @ W_dec + b_dec
    loss = (recon - x).square().sum(1).mean()
    if aux is not None and len(aux.dead):
        dead_pre = pre[:, aux.dead]
        best = dead_pre.topk(min(aux.k, len(aux.dead)), dim=1)
        dead_acts = torch.zeros_like(dead_pre).scatter(1, best.indices, best.values.relu())
        weight = aux.coefficient * min(len(aux.dead) / aux.k, 1.0)
        loss = loss + weight * (dead_acts @ W_dec[aux.dead] - (x - recon).detach()).square().sum(1).mean()
    loss.backward()
    return float(loss.detach()), [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]


@settings(max_examples=60, deadline=None)
@given(batch=st.integers(1, 20), d_in=st.integers(1, 12), d_sae=st.integers(2, 40), data=st.data(), by_batch=st.booleans(),
       seed=st.integers(0, 10_000))
def test_gradients_equal_dense_autograd(batch: int, d_in: int, d_sae: int, data: st.DataObject, by_batch: bool,
                                        seed: int) -> None:
    k = data.draw(st.integers(1, d_sae - 1))
    dead = data.draw(st.lists(st.integers(0, d_sae - 1), unique=True, max_size=d_sae))
    aux = data.draw(st.sampled_from([None, AuxK(torch.tensor(dead, dtype=torch.long), data.draw(st.integers(1, 8)), 0.3)]))
    weights = random_weights(d_in, d_sae, seed)
    x = torch.randn(batch, d_in, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    pre = pre_activations(weights, x)
    if by_batch and int((pre > 0).sum()) < batch * k:
        k = 1  # the reference's floor would be zero
        if int((pre > 0).sum()) < batch:
            return
    got = sparse_step(weights, x, pre, batch_top_k(pre, k) if by_batch else top_k(pre, k), aux)
    loss, gradients = dense_gradients(weights, x, k, by_batch, aux)
    assert abs(got.loss + got.aux_loss - loss) <= 1e-9 * max(1.0, loss)
    for mine, reference in zip(got.grads, gradients, strict=True):
        assert torch.allclose(mine, reference, rtol=1e-7, atol=1e-9 * float(reference.abs().max() + 1))


def test_auxk_reaches_the_encoder_of_dead_latents() -> None:
    """A peer drops this gradient; without the loss a dead latent gets exactly none."""
    weights = random_weights(6, 20, 0)
    weights.b_enc[:5] = -100.0  # never chosen
    weights.b_enc[0] = -0.1
    x = torch.randn(32, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pre = pre_activations(weights, x)
    pre[:, 0] = pre[:, 0].clamp(max=1e-3)  # positive now and then, but never among the top 2
    active = top_k(pre, 2)
    assert not (active.latents < 5).any()
    without = sparse_step(weights, x, pre, active)
    with_aux = sparse_step(weights, x, pre, active, AuxK(torch.arange(5), 3, 1 / 32))
    assert without.grads.W_enc[:5].abs().max() == 0
    assert with_aux.grads.W_enc[0].abs().max() > 0 and with_aux.grads.b_enc[0] != 0


@settings(max_examples=40, deadline=None)
@given(batch=st.integers(1, 10), d_sae=st.integers(2, 30), k=st.integers(1, 10), floor=st.floats(0, 3),
       seed=st.integers(0, 999))
def test_batch_top_k_does_not_depend_on_the_floor(batch: int, d_sae: int, k: int, floor: float, seed: int) -> None:
    pre = torch.randn(batch, d_sae, generator=torch.Generator().manual_seed(seed))
    brute = torch.zeros_like(pre, dtype=torch.bool).flatten()
    brute[pre.flatten().topk(min(batch * k, pre.numel())).indices] = True
    brute &= pre.flatten() > 0
    for guess in (0.0, floor):
        active = batch_top_k(pre, k, guess)
        chosen = torch.zeros_like(pre, dtype=torch.bool)
        chosen[active.tokens, active.latents] = True
        assert torch.equal(chosen.flatten(), brute)
        assert torch.equal(active.tokens, active.tokens.sort().values)


def test_decoder_rows_stay_on_the_sphere() -> None:
    rows = torch.randn(7, 5, dtype=torch.float64)
    unit_decoder_(rows)
    assert torch.allclose(rows.norm(dim=1), torch.ones(7, dtype=torch.float64))
    gradient = torch.randn(7, 5, dtype=torch.float64)
    tangent_(gradient, rows)
    assert (gradient * rows).sum(1).abs().max() < 1e-12
