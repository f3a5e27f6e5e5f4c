"""The training steps against dense autograd, over shapes, k, prefixes, dead sets and every way of choosing."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.dense import gated_step, standard_step
from sae.step import (
    AuxK,
    GatedWeights,
    JumpWeights,
    Sparsity,
    StepResult,
    Weights,
    batch_top_k,
    jump_step,
    pre_activations,
    sparse_step,
    tangent_,
    top_k,
    unit_decoder_,
)


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_weights(d_in: int, d_sae: int, seed: int) -> Weights:
    return Weights(drawn(seed, d_sae, d_in), drawn(seed + 1, d_sae), drawn(seed + 2, d_sae, d_in), drawn(seed + 3, d_in))


def leaves_of(weights: Sequence[Tensor]) -> list[Tensor]:
    return [w.clone().requires_grad_() for w in weights]


def aux_loss(pre: Tensor, W_dec: Tensor, residual: Tensor, aux: AuxK | None) -> Tensor | float:
    if aux is None or not len(aux.dead):
        return 0.0
    dead_pre = pre[:, aux.dead]
    best = dead_pre.topk(min(aux.k, len(aux.dead)), dim=1)
    dead_acts = torch.zeros_like(dead_pre).scatter(1, best.indices, best.values.relu())
    weight = aux.coefficient * min(len(aux.dead) / aux.k, 1.0)
    return weight * (dead_acts @ W_dec[aux.dead] - residual.detach()).square().sum(1).mean()


def assert_gradients(got: StepResult, loss: Tensor, leaves: Sequence[Tensor]) -> None:
    """The same loss, and every gradient equal to 1e-7 relative."""
    loss.backward()
    value = float(loss.detach())
    assert abs(got.loss + got.aux_loss - value) <= 1e-9 * max(1.0, abs(value))
    for mine, leaf in zip(got.grads, leaves, strict=True):
        reference = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
        assert torch.allclose(mine, reference, rtol=1e-7, atol=1e-9 * float(reference.abs().max() + 1))


BATCH, D_IN, D_SAE, SEED = st.integers(1, 20), st.integers(1, 12), st.integers(2, 40), st.integers(0, 10_000)


def some_aux(data: st.DataObject, d_sae: int) -> AuxK | None:
    dead = data.draw(st.lists(st.integers(0, d_sae - 1), unique=True, max_size=d_sae))
    return data.draw(st.sampled_from([None, AuxK(torch.tensor(dead, dtype=torch.long), data.draw(st.integers(1, 8)), 0.3)]))


@settings(max_examples=100, deadline=None)
@given(batch=BATCH, d_in=D_IN, d_sae=D_SAE, data=st.data(), by_batch=st.booleans(), nested=st.booleans(), seed=SEED)
def test_gradients_equal_dense_autograd(batch: int, d_in: int, d_sae: int, data: st.DataObject, by_batch: bool, nested: bool,
                                        seed: int) -> None:
    """TopK, BatchTopK and Matryoshka: every prefix of the latents, and the whole, reconstructs."""
    k = data.draw(st.integers(1, d_sae - 1))
    inner = st.lists(st.integers(1, d_sae - 1), unique=True, min_size=1, max_size=5).map(sorted)
    prefixes = data.draw(inner) if nested else []
    aux = some_aux(data, d_sae)
    weights, x = random_weights(d_in, d_sae, seed), drawn(seed + 9, batch, d_in)
    pre = pre_activations(weights, x)
    if by_batch and int((pre > 0).sum()) < batch * k:
        k = 1  # the reference's floor would be zero
        if int((pre > 0).sum()) < batch:
            return
    got = sparse_step(weights, x, pre, batch_top_k(pre, k) if by_batch else top_k(pre, k), aux, prefixes)

    leaves = leaves_of(weights)
    W_enc, b_enc, W_dec, b_dec = leaves
    dense = (x - b_dec) @ W_enc.T + b_enc
    if by_batch:
        acts = torch.where(dense.relu() >= dense.relu().flatten().topk(batch * k).values[-1], dense.relu(), 0.0)
    else:
        best = dense.topk(k, dim=1)
        acts = torch.zeros_like(dense).scatter(1, best.indices, best.values.relu())
    loss = torch.zeros((), dtype=torch.float64)
    for width in (*prefixes, d_sae):
        recon = acts[:, :width] @ W_dec[:width] + b_dec
        loss = loss + (recon - x).square().sum(1).mean()
    assert_gradients(got, loss + aux_loss(dense, W_dec, x - recon, aux), leaves)
    assert got.l0 == pytest.approx(float((acts > 0).sum()) / batch)
    assert torch.equal(got.fired, (acts > 0).any(0))


@settings(max_examples=80, deadline=None)
@given(batch=BATCH, d_in=D_IN, d_sae=D_SAE, data=st.data(), bandwidth=st.floats(0.05, 3),
       target=st.one_of(st.none(), st.floats(1, 9)), seed=SEED)
def test_jump_relu_learns_by_the_papers_pseudo_derivatives(batch: int, d_in: int, d_sae: int, data: st.DataObject,
                                                           bandwidth: float, target: float | None, seed: int) -> None:
    aux = some_aux(data, d_sae)
    weights = JumpWeights(*random_weights(d_in, d_sae, seed), drawn(seed + 4, d_sae).abs())
    x = drawn(seed + 9, batch, d_in)
    sparsity = Sparsity(0.7, target)
    got = jump_step(weights, x, pre_activations(weights.linear, x), bandwidth, sparsity, aux)

    leaves = leaves_of(weights)
    W_enc, b_enc, W_dec, b_dec, theta = leaves
    pre = (x - b_dec) @ W_enc.T + b_enc
    gate = (pre > theta).double()
    kernel = ((pre - theta).abs() < bandwidth / 2).double().detach() / bandwidth
    learns = theta - theta.detach()  # zero, with derivative 1
    acts = pre * gate - kernel * theta.detach() * learns
    l0 = (gate - kernel * learns).sum() / batch
    price = 0.7 * l0 if target is None else 0.7 * target * (l0 / target - 1) ** 2
    recon = acts @ W_dec + b_dec
    loss = (recon - x).square().sum(1).mean() + price + aux_loss(pre, W_dec, x - recon, aux)
    assert_gradients(got, loss, leaves)
    assert got.l0 == pytest.approx(float(gate.sum()) / batch)


@settings(max_examples=40, deadline=None)
@given(batch=BATCH, d_in=D_IN, d_sae=D_SAE, data=st.data(), gated=st.booleans(), seed=SEED)
def test_standard_and_gated_equal_their_formulas(batch: int, d_in: int, d_sae: int, data: st.DataObject, gated: bool,
                                                 seed: int) -> None:
    aux = some_aux(data, d_sae)
    x, linear = drawn(seed + 9, batch, d_in), random_weights(d_in, d_sae, seed)
    if gated:
        more = [drawn(seed + 5, d_sae), 0.1 * drawn(seed + 6, d_sae)]
        weights = GatedWeights(linear.W_enc, linear.b_enc, more[0], more[1], linear.W_dec, linear.b_dec)
        got = gated_step(weights, x, 0.7, aux)
        leaves = leaves_of(weights)
        W_enc, b_gate, b_mag, r_mag, W_dec, b_dec = leaves
        pre = (x - b_dec) @ W_enc.T + b_gate
        acts = (pre > 0) * ((x - b_dec) @ (W_enc.T * r_mag.exp()) + b_mag).relu()
        gates = pre.relu()
        extra = 0.7 * (gates * W_dec.norm(dim=1)).sum(1).mean() + (gates @ W_dec + b_dec - x).square().sum(1).mean()
    else:
        got = standard_step(linear, x, 0.7, aux)
        leaves = leaves_of(linear)
        W_enc, b_enc, W_dec, b_dec = leaves
        pre = (x - b_dec) @ W_enc.T + b_enc
        acts = pre.relu()
        extra = 0.7 * (acts * W_dec.norm(dim=1)).sum(1).mean()
    recon = acts @ W_dec + b_dec
    loss = (recon - x).square().sum(1).mean() + extra + aux_loss(pre, W_dec, x - recon, aux)
    assert_gradients(got, loss, leaves)


def test_matryoshka_by_hand() -> None:
    """One token, two latents of value 1 and 2, a prefix of one: losses (1 − 3)² and (1 + 2 − 3)²."""
    weights = Weights(torch.tensor([[0.0], [0.0]]), torch.tensor([1.0, 2.0]), torch.ones(2, 1), torch.zeros(1))
    x = torch.tensor([[3.0]])
    pre = pre_activations(weights, x)
    got = sparse_step(weights, x, pre, top_k(pre, 2), prefixes=(1,))
    assert (got.loss, got.aux_loss, got.l0, got.smallest) == (0.0, 4.0, 2.0, 1.0)
    assert isinstance(got.grads, Weights)
    assert got.grads.W_dec.tolist() == [[-4.0], [0.0]]  # the second latent is in no inner prefix, and the whole is exact
    assert got.grads.b_dec.tolist() == [-4.0]


def silent_latents() -> tuple[Weights, Tensor, Tensor]:
    """Weights whose first five latents are never among the best, of which the first is positive now and then."""
    weights = random_weights(6, 20, 0)
    weights.b_enc[:5] = -100.0
    weights.b_enc[0] = -0.1
    weights.W_enc[0] *= 1e-3
    x = drawn(1, 32, 6)
    return weights, x, pre_activations(weights, x)


@pytest.mark.parametrize("prefixes", [(), (3, 10)], ids=["one", "nested"])
def test_auxk_reaches_the_encoder_of_dead_latents(prefixes: tuple[int, ...]) -> None:
    """A peer drops this gradient; without the loss a dead latent gets exactly none."""
    weights, x, pre = silent_latents()
    weights.b_enc[0] = 1e-3
    pre = pre_activations(weights, x)
    active = top_k(pre, 2)
    assert not (active.latents < 5).any()
    without = sparse_step(weights, x, pre, active, None, prefixes)
    with_aux = sparse_step(weights, x, pre, active, AuxK(torch.arange(5), 3, 1 / 32), prefixes)
    assert without.grads.W_enc[:5].abs().max() == 0
    assert with_aux.grads.W_enc[0].abs().max() > 0
    assert isinstance(with_aux.grads, Weights) and with_aux.grads.b_enc[0] != 0


def test_auxk_reaches_the_encoder_under_thresholds() -> None:
    weights, x, _ = silent_latents()
    weights.b_enc[0] = 1e-3
    jump = JumpWeights(*weights, torch.full((20,), 0.5, dtype=torch.float64))
    pre = pre_activations(weights, x)
    for aux, reached in ((None, False), (AuxK(torch.arange(5), 3, 1 / 32), True)):
        got = jump_step(jump, x, pre, 0.1, Sparsity(1.0, None), aux)
        assert bool(got.grads.W_enc[0].abs().max() > 0) == reached


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


@settings(max_examples=30, deadline=None)
@given(batch=st.integers(1, 8), k=st.integers(1, 5), by_batch=st.booleans(), seed=SEED)
def test_ties_are_broken_once(batch: int, k: int, by_batch: bool, seed: int) -> None:
    """Latents that are copies of each other tie exactly; values and gradients belong to the pairs that were chosen."""
    half = random_weights(4, 6, seed)
    weights = Weights(*(torch.cat([w, w]) for w in half[:3]), half.b_dec)
    x = drawn(seed + 9, batch, 4).repeat(2, 1)
    pre = pre_activations(weights, x)
    active = batch_top_k(pre, k) if by_batch else top_k(pre, k)
    mask = torch.zeros_like(pre)
    mask[active.tokens, active.latents] = 1
    assert mask.sum() == len(active.tokens) <= len(x) * k
    leaves = leaves_of(weights)
    acts = ((x - leaves[3]) @ leaves[0].T + leaves[1]).relu() * mask
    assert_gradients(sparse_step(weights, x, pre, active), (acts @ leaves[2] + leaves[3] - x).square().sum(1).mean(), leaves)


def test_gradients_by_blocks_are_those_of_one_bag(monkeypatch: pytest.MonkeyPatch) -> None:
    """More latents than a block, some that never fire, the last block not full; memory of an earlier step is overwritten."""
    import sae.step

    g = torch.Generator().manual_seed(3)
    weights = Weights(*(torch.randn(shape, generator=g) for shape in ((70, 5), (70,), (70, 5), (5,))))
    x = torch.randn(9, 5, generator=g)
    pre = pre_activations(weights, x)
    whole = sparse_step(weights, x, pre, top_k(pre, 3)).grads
    used = Weights(*(torch.full_like(w, 7.0) for w in weights))
    monkeypatch.setattr(sae.step, "BLOCK", 16)
    parts = sparse_step(weights, x, pre, top_k(pre, 3), into=used).grads
    assert parts.W_enc is used.W_enc
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)
