"""Reading activations: one direct forward hook, and the pass stops right there.

The bridge's own path costs about three times as much and, at the last block, never stops; see `undertow bench harvest`.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from undertow.core.errors import SubjectError
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject


class _StopForward(Exception):
    """Raised by the tap to leave the forward pass once its activation is in hand."""


def hidden_of(value: Any) -> Tensor:
    """The hidden states in a block's inputs or outputs, which are a tensor or a tuple that starts with one."""
    return value if isinstance(value, Tensor) else value[0]


def tap(subject: Subject, tokens: Int[Tensor, "batch pos"], site: Site,
        attend: Bool[Tensor, "batch pos"] | None = None) -> Float[Tensor, "batch pos d_model"]:
    """Activations at `site`; blocks above it are not computed.

    Args:
        subject: the model.
        tokens: token ids, on any device.
        site: where to read.
        attend: False on padding; all True if absent.
    """
    found: list[Tensor] = []

    def on_output(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append(hidden_of(output))
        raise _StopForward

    def on_input(_module: nn.Module, args: Any) -> None:
        found.append(hidden_of(args))
        raise _StopForward

    block = subject.blocks[site.layer]
    hook = (block.register_forward_hook(on_output) if site.kind == "resid_post"
            else block.register_forward_pre_hook(on_input))
    try:
        with torch.inference_mode():
            subject.hf_model.base_model(input_ids=tokens.to(subject.device), use_cache=False,
                                        attention_mask=None if attend is None else attend.to(subject.device).long())
    except _StopForward:
        return found[0]
    finally:
        hook.remove()
    raise SubjectError(f"the forward pass of {subject.name} never reached {site.name}")
