"""The optimizers of a training from nothing: AdamW at first, and Muon for the blocks' matrices while it is polished."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import final

import torch
from torch import Tensor, nn

_DECAY = 0.1
_OUTER = ("embed_tokens.weight", "lm_head.weight")  # their rows are tokens, which are not to be made orthogonal to one another


@final
class Optimizer:
    """AdamW for all parameters, or with `muon` for the embedding, the head and the vectors alone.

    Muon (Jordan et al. 2024) steps along the nearest orthogonal matrix to the momentum; its step is scaled to the root mean
    square of AdamW's (Liu et al., arXiv 2502.16982), so that both take one learning rate.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], muon: bool) -> None:
        self._parameters = parameters
        inner = [p for name, p in parameters.items() if p.ndim == 2 and muon and not name.endswith(_OUTER)]
        taken = {id(p) for p in inner}
        rest = [p for p in parameters.values() if id(p) not in taken]
        groups = [{"params": [p for p in rest if p.ndim == 2], "weight_decay": _DECAY},
                  {"params": [p for p in rest if p.ndim == 1], "weight_decay": 0.0}]
        self._parts: dict[str, torch.optim.Optimizer] = {"adam": torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)}
        if inner:
            self._parts["muon"] = torch.optim.Muon(inner, weight_decay=_DECAY, adjust_lr_fn="match_rms_adamw")

    def step(self, lr: float) -> None:
        """Move the parameters along their gradients, and forget these."""
        for part in self._parts.values():
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What the optimizers remember, by optimizer, kind and parameter."""
        for label, part in self._parts.items():
            for name, parameter in self._parameters.items():
                for key, value in part.state.get(parameter, {}).items():
                    yield f"{label}.{key}.{name}", value

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Remember what `tensors` returned; names of anything else are passed over."""
        parts = {(label, name): part.state for label, part in self._parts.items() for name in self._parameters}
        for full, value in tensors.items():
            label, key, name = [*full.split(".", 2), "", ""][:3]
            if (label, name) in parts:
                parts[label, name].setdefault(self._parameters[name], {})[key] = value
