"""Direct logit effect: by hand, and against a finite difference through the real final norm and unembedding."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from features.logit_lens import TokenEffect, logit_effect, promoted, suppressed
from undertow.core.errors import DictionaryError
from undertow.subjects.unembed import UnembedView

W_U = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]])


def test_rms_by_hand() -> None:
    # gamma * d = (2, 3); W_U @ that = (2, 3, 10), mean 5.
    effect = logit_effect(torch.tensor([1.0, 3.0]), UnembedView(torch.tensor([2.0, 1.0]), False, W_U))
    assert effect.tolist() == [-3.0, -2.0, 5.0]


def test_layer_norm_by_hand() -> None:
    # d - mean = (-1, 1); times gamma (-2, 1); W_U @ that = (-2, 1, -2), mean -1.
    effect = logit_effect(torch.tensor([1.0, 3.0]), UnembedView(torch.tensor([2.0, 1.0]), True, W_U))
    assert effect.tolist() == [-1.0, 2.0, -1.0]


def test_order() -> None:
    effect = torch.tensor([0.5, -2.0, 0.5, 1.0])
    assert promoted(effect, 3) == (TokenEffect(3, 1.0), TokenEffect(0, 0.5), TokenEffect(2, 0.5))
    assert suppressed(effect, 2) == (TokenEffect(1, -2.0), TokenEffect(0, 0.5))
    assert len(promoted(effect, 9)) == 4


def test_width_is_checked() -> None:
    with pytest.raises(DictionaryError, match="writes 3 channels; the residual stream has 2"):
        logit_effect(torch.ones(3), UnembedView(torch.ones(2), False, W_U))


def llama() -> tuple[Callable[[Tensor], Tensor], UnembedView]:
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                         num_attention_heads=2, num_key_value_heads=2)).double().eval()
    norm = model.model.norm
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    torch.nn.init.normal_(model.lm_head.weight)
    return lambda x: model.lm_head(norm(x)), UnembedView(norm.weight.detach(), False, model.lm_head.weight.detach())


def gpt2() -> tuple[Callable[[Tensor], Tensor], UnembedView]:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=8)).double().eval()
    norm = model.transformer.ln_f
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    torch.nn.init.normal_(model.lm_head.weight)
    torch.nn.init.normal_(norm.bias)
    return lambda x: model.lm_head(norm(x)), UnembedView(norm.weight.detach(), True, model.lm_head.weight.detach())


@pytest.mark.parametrize("build", [llama, gpt2])
def test_finite_difference(build: Callable[[], tuple[Callable[[Tensor], Tensor], UnembedView]]) -> None:
    """Along a direction that leaves the norm's scale unchanged to first order the formula is exact up to that scale."""
    torch.manual_seed(0)
    logits, unembed = build()
    x, direction = torch.randn(2, 16, dtype=torch.float64)
    centred = x - x.mean() if unembed.centred else x
    scale = float((centred.square().mean() + (1e-5 if unembed.centred else 1e-6)).sqrt())
    tangent = direction - (direction @ centred) / (centred @ centred) * centred
    step = 1e-2  # Llama's norm computes in float32
    with torch.no_grad():
        slope = (logits(x + step * tangent) - logits(x - step * tangent)) / (2 * step)
        off_tangent = (logits(x + step * centred) - logits(x - step * centred)) / (2 * step)
    effect = logit_effect(tangent, unembed)
    torch.testing.assert_close(effect / scale, slope - slope.mean(), rtol=1e-3, atol=1e-3)
    # Negative control: along the stream itself the norm's scale moves too, and the frozen scale is the wrong answer.
    assert (logit_effect(centred, unembed) / scale - off_tangent).abs().max() > 0.3
