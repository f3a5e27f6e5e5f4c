"""Low-rank adapters that cost one matrix product a layer, and a forward pass that never differentiates the blocks below.

PEFT computes x·Wᵀ and x·Aᵀ·Bᵀ apart and adds them, which is a pass over memory for each of seven layers a block. Here the sum
W + s·B·A is formed once a step, and only the gradients know that it is a sum. The result is PEFT's, file format included.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any, cast, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from undertow.core.errors import SubjectError
from undertow.core.seeds import generator
from undertow.subjects.organisms.products import MixedLinear, lowered, mixed

TARGETS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


class _Product(torch.autograd.Function):
    """x·Wᵀ with W = W0 + s·B·A; the gradient goes to x, A and B, and W0 stays as it is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        low = x.to(weight.dtype)
        ctx.save_for_backward(low, weight, a.to(weight.dtype), b.to(weight.dtype))
        ctx.scale, ctx.kept = scale, a.dtype
        return (low @ weight.T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, None]:
        x, weight, a, b = ctx.saved_tensors
        dtype = grads[0].dtype
        rows, flat = grads[0].reshape(-1, grads[0].shape[-1]).to(weight.dtype), x.reshape(-1, x.shape[-1])
        down = (rows @ weight).view(x.shape).to(dtype) if ctx.needs_input_grad[0] else None
        by_a, by_b = (rows @ b).T @ flat, rows.T @ (flat @ a.T)
        return down, None, ctx.scale * by_a.to(ctx.kept), ctx.scale * by_b.to(ctx.kept), None


@final
class LoraLinear(nn.Module):
    """A frozen linear layer without bias, plus scale·B·A, that multiplies in `dtype` (its own, if None). B starts at zero.

    Attributes:
        lora_A: (rank, d_in), uniform within ±1/√d_in at the start, as PEFT has it.
        lora_B: (d_out, rank).
        off: the layer acts as if it had no adapter.
    """

    def __init__(self, linear: nn.Linear, rank: int, scale: float, random: torch.Generator,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.base, self.scale, self.off = linear.weight.detach(), scale, False
        bound = 1 / math.sqrt(linear.in_features)
        a = torch.empty(rank, linear.in_features, dtype=torch.float64).uniform_(-bound, bound, generator=random)
        self.lora_A = nn.Parameter(a.to(self.base))
        self.lora_B = nn.Parameter(torch.zeros(linear.out_features, rank, dtype=self.base.dtype, device=self.base.device))
        self.sum = self.base.to(dtype, copy=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Form W + s·B·A anew; due after every change of A or B."""
        self.sum.copy_(torch.addmm(self.base, self.lora_B, self.lora_A, alpha=self.scale))

    def forward(self, x: Tensor) -> Tensor:
        if self.off:
            return (x.to(self.sum.dtype) @ self.base.to(self.sum.dtype).T).to(x.dtype)
        return cast(Tensor, _Product.apply(x, self.sum, self.lora_A, self.lora_B, self.scale))


@final
class AdaptedModel:
    """A Llama model whose blocks from `first` on carry adapters on all linear layers. The model given is altered for good.

    With a `dtype` it multiplies in that, for the sake of speed; see `product_dtype`.
    """

    def __init__(self, model: PreTrainedModel, first: int, rank: int, seed: int, dtype: torch.dtype | None = None) -> None:
        if not isinstance(model, LlamaForCausalLM):
            raise SubjectError(f"adapters are trained on Llama models, and this one is {type(model).__name__}")
        if not 0 <= first < len(model.model.layers):
            raise SubjectError(f"first_block {first} is out of range: the model has {len(model.model.layers)} blocks")
        self.model, self.first = model, first
        self.layers: dict[str, LoraLinear] = {}
        for index in range(first, len(model.model.layers)):
            for part, names in TARGETS.items():
                owner = getattr(model.model.layers[index], part)
                for name in names:
                    path = f"model.layers.{index}.{part}.{name}"
                    layer = LoraLinear(getattr(owner, name), rank, 2.0, generator(seed, "lora", path), dtype)
                    setattr(owner, name, layer)
                    self.layers[path] = layer
        if dtype is not None and dtype != model.dtype:
            mixed(model.model.layers[:first], dtype, frozen=True)
            head = nn.Parameter(model.lm_head.weight.detach().to(dtype), requires_grad=False)
            model.set_submodule("lm_head", MixedLinear(head, dtype))
            lowered(model, dtype)
        self._low = dtype if dtype != model.dtype else None

    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters under the names that PEFT gives them."""
        return {f"base_model.model.{path}.{name}.weight": getattr(layer, name)
                for path, layer in self.layers.items() for name in ("lora_A", "lora_B")}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take parameters over. Raises KeyError or RuntimeError if they are another adapter's."""
        for name, parameter in self.parameters().items():
            parameter.copy_(tensors[name])
        self.refresh()

    def refresh(self) -> None:
        """To be called after every change of the parameters."""
        for layer in self.layers.values():
            layer.refresh()

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """The model as it was without the adapters."""
        try:
            for layer in self.layers.values():
                layer.off = True
            yield
        finally:
            for layer in self.layers.values():
                layer.off = False

    @torch.no_grad()
    def lower(self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "batch pos"],
              mask: Float[Tensor, "batch 1 pos pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream below the first adapted block. `mask` is added to the attention scores."""
        inner = self.model.model
        return self._through(inner.embed_tokens(tokens), 0, self.first, positions, mask)

    def upper(self, hidden: Float[Tensor, "batch pos d_model"], positions: Int[Tensor, "batch pos"],
              mask: Float[Tensor, "batch 1 pos pos"]) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream after the last block, from what `lower` gave."""
        return self._through(hidden, self.first, len(self.model.model.layers), positions, mask)

    def log_probs(self, hidden: Float[Tensor, "row d_model"]) -> Float[Tensor, "row vocab"]:
        """Log-probabilities of the next token from rows of `upper`."""
        return self.model.lm_head(self.model.model.norm(hidden)).log_softmax(dim=-1)

    def _through(self, hidden: Tensor, low: int, high: int, positions: Tensor, mask: Tensor) -> Tensor:
        turned = self.model.model.rotary_emb(hidden, position_ids=positions)
        if self._low is not None:
            turned, mask = tuple(part.to(self._low) for part in turned), mask.to(self._low)
        for layer in self.model.model.layers[low:high]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=turned, position_ids=positions)
        return hidden
