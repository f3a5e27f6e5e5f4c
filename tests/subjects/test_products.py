"""Products in another precision: what is rounded and what is not."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

from tests import tiny
from undertow.subjects.load import load_subject
from undertow.subjects.organisms.lora import AdaptedModel
from undertow.subjects.organisms.products import MixedLinear, mixed, plain_attention, product_dtype


def layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 40, bias=False), nn.SiLU(), nn.Linear(40, 8, bias=False))


def gradients(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    out = model(x)
    out.square().sum().backward()
    return out.detach(), [cast(torch.Tensor, p.grad) for p in model.parameters()]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_a_product_and_its_gradients_are_those_of_a_linear_layer(dtype: torch.dtype, most: float) -> None:
    plain = layers()
    ours, x = copy.deepcopy(plain), torch.randn(3, 5, 24)
    mixed(ours, dtype)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in plain.named_parameters()]
    (wanted, wanted_grads), (made, made_grads) = gradients(plain, x), gradients(ours, x)
    for one, two in zip([wanted, *wanted_grads], [made, *made_grads], strict=True):
        assert two.dtype == torch.float32
        error = float((one - two).norm() / one.norm())
        assert error < most
        assert dtype == torch.float32 or error > 1e-5  # or nothing was rounded at all


def test_a_frozen_layer_is_rounded_once_and_has_no_gradient() -> None:
    ours = layers()
    weight = cast(torch.Tensor, ours[0].weight).detach().clone()
    mixed(ours, torch.bfloat16, frozen=True)
    first = ours[0]
    assert isinstance(first, MixedLinear)
    assert torch.equal(first.weight, weight.bfloat16())
    x = torch.randn(2, 24, requires_grad=True)
    ours(x).sum().backward()
    assert x.grad is not None
    assert all(p.grad is None for p in ours.parameters())


def test_the_rounding_can_be_taken_back() -> None:
    plain = layers()
    ours, x = copy.deepcopy(plain), torch.randn(2, 24)
    mixed(ours, torch.bfloat16)
    mixed(ours, torch.float32)
    assert torch.equal(ours(x), plain(x))


def test_layers_with_a_bias_are_left_alone() -> None:
    ours = nn.Sequential(nn.Linear(4, 4))
    mixed(ours, torch.bfloat16)
    assert type(ours[0]) is nn.Linear


def test_a_model_in_another_precision_keeps_it(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny.save_subject(tmp_path_factory.mktemp("m") / "m", "llama")
    double, single = (load_subject(str(folder), "cpu", dtype).hf_model for dtype in ("float64", "float32"))
    assert product_dtype(double) == torch.float64
    fast = bool(torch.cpu.get_capabilities().get("amx_bf16"))
    assert product_dtype(single) == (torch.bfloat16 if fast else torch.float32)


def test_an_adapted_model_in_bfloat16_is_near_the_exact_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny.save_subject(tmp_path_factory.mktemp("m") / "m", "llama")
    tokens, positions = torch.tensor([[1, 2, 3, 4]]), torch.arange(4)[None]
    mask = torch.zeros(1, 1, 4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf)

    def outcome(dtype: torch.dtype | None) -> torch.Tensor:
        model = AdaptedModel(load_subject(str(folder), "cpu").hf_model, 1, 2, 0, dtype)
        for layer in model.layers.values():
            torch.nn.init.normal_(layer.lora_B, generator=torch.Generator().manual_seed(1))
        model.refresh()
        states = model.upper(model.lower(tokens, positions, mask), positions, mask)
        return model.log_probs(states[0]).exp().detach()

    exact, rough = outcome(None), outcome(torch.bfloat16)
    assert 0 < float((exact - rough).abs().max()) < 0.05


def test_plain_attention_is_attention() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 7, 8, dtype=torch.float64, requires_grad=True) for heads in (6, 2, 2))
    mask = torch.zeros(2, 1, 7, 7, dtype=torch.float64).masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True).transpose(1, 2)
    made, _ = plain_attention(nn.Module(), query, key, value, mask, scaling=8 ** -0.5)
    torch.testing.assert_close(made, wanted)
    for one, two in zip(*(torch.autograd.grad(out.square().sum(), (query, key, value)) for out in (made, wanted)), strict=True):
        torch.testing.assert_close(one, two)


def test_within_the_blocks_of_an_adapted_model_everything_is_rounded_and_the_stream_is_not(
        tmp_path: Path) -> None:
    source = load_subject(str(tiny.save_subject(tmp_path, "llama")), "cpu").hf_model
    plain, low = (AdaptedModel(copy.deepcopy(source), 1, 4, 0, dtype) for dtype in (None, torch.bfloat16))
    tokens, positions = torch.arange(9)[None] + 5, torch.arange(9)[None]
    mask = torch.zeros(1, 1, 9, 9).masked_fill(~torch.ones(9, 9, dtype=torch.bool).tril(), -torch.inf)
    ends = []
    for model in (plain, low):
        out = model.upper(model.lower(tokens, positions, mask), positions, mask)
        out.square().mean().backward()
        ends.append(out.detach())
        assert all(p.grad is not None and p.grad.dtype == p.dtype == torch.float32 for p in model.parameters().values())
    assert ends[1].dtype == torch.float32
    assert 1e-5 < float((ends[1] - ends[0]).norm() / ends[0].norm()) < 2e-2
