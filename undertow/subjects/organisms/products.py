"""Matrix products of a training: in bfloat16 where the machine has units for it, in float32 elsewhere.

Only the products are rounded, and under an adapter all that lies within a block (`lowered`). Weights, their gradients, the
residual stream and losses stay in float32, so that what is learned does not depend on the machine but for noise
(Micikevicius et al., arXiv 1710.03740).
"""

from __future__ import annotations

from typing import Any, cast, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


def product_dtype(model: PreTrainedModel) -> torch.dtype:
    """In what a model is to multiply: bfloat16 on CUDA from Ampere on and on CPUs with AMX, where it is some times as fast.

    Elsewhere, and for a model that is not in float32, it is the model's own.
    """
    device = model.device
    if model.dtype != torch.float32:
        return model.dtype
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
    return torch.bfloat16 if fast else torch.float32


class _Product(torch.autograd.Function):
    """x·Wᵀ, all three products of which have factors in `dtype`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        low, rows = x.to(dtype), weight.to(dtype)
        ctx.save_for_backward(low, rows)
        return (low @ rows.T).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        low, rows = ctx.saved_tensors
        grad, by_weight = grads[0].to(low.dtype), None
        if ctx.needs_input_grad[1]:
            by_weight = (grad.reshape(-1, grad.shape[-1]).T @ low.reshape(-1, low.shape[-1])).to(grads[0].dtype)
        return (grad @ rows).to(grads[0].dtype), by_weight, None


@final
class MixedLinear(nn.Module):
    """A linear layer without bias that multiplies in `dtype`; its weight stays as it is."""

    def __init__(self, weight: nn.Parameter, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self._dtype = weight, dtype

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return cast(Tensor, _Product.apply(x, self.weight, self._dtype))


def mixed(owner: nn.Module, dtype: torch.dtype, frozen: bool = False) -> None:
    """Make every linear layer within `owner` multiply in `dtype`; parameters keep their names.

    With `frozen` they are rounded once and for all, which spares rounding them at every product.
    """
    for part in list(owner.modules()):
        for name, layer in list(part.named_children()):
            if isinstance(layer, MixedLinear) or (isinstance(layer, nn.Linear) and layer.bias is None):
                weight = cast(nn.Parameter, layer.weight)
                kept = nn.Parameter(weight.detach().to(dtype), requires_grad=False) if frozen else weight
                setattr(part, name, MixedLinear(kept, dtype))


@final
class LoweredNorm(nn.Module):
    """A root-mean-square norm that computes in the stream's dtype and gives its result in `dtype`."""

    def __init__(self, weight: nn.Parameter, epsilon: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight, self._epsilon, self._dtype = weight, epsilon, dtype

    def forward(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self._epsilon)
        return (x * scale * self.weight).to(self._dtype)


def plain_attention(module: nn.Module, query: Float[Tensor, "batch head pos d"], key: Float[Tensor, "batch group pos d"],
                    value: Float[Tensor, "batch group pos d"], attention_mask: Float[Tensor, "batch 1 pos pos"],
                    **options: Any) -> tuple[Float[Tensor, "batch pos head d"], None]:
    """Attention as two products and a softmax, all in the dtype of `query`; signature and result as transformers has them.

    In bfloat16 on a CPU with AMX this takes less than half the time of the fused kernel, whose gradient is slow there.
    """
    batch, heads, size, width = query.shape
    groups = key.shape[1]
    rows = (query * options["scaling"]).reshape(batch * groups, heads // groups * size, width)
    scores = torch.bmm(rows, key.reshape(batch * groups, size, width).transpose(1, 2))
    seen = (scores.view(batch, heads, size, size) + attention_mask).softmax(dim=-1)
    mixed_values = torch.bmm(seen.view(batch * groups, -1, size), value.reshape(batch * groups, size, width))
    return mixed_values.view(batch, heads, size, width).transpose(1, 2), None


def lowered(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Let all that lies within a block be computed in `dtype`; what is added to the stream is added in the stream's own.

    `mask` and angles are then to be given in `dtype`.
    """
    ALL_ATTENTION_FUNCTIONS.register("undertow_plain", plain_attention)
    model.config._attn_implementation = "undertow_plain"
    for layer in model.model.layers:
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = getattr(layer, name)
            setattr(layer, name, LoweredNorm(norm.weight, norm.variance_epsilon, dtype))
