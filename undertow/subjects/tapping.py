"""Reading activations: one direct forward hook, and the pass stops right there.

The bridge's own path costs about three times as much and, at the last block, never stops; see `undertow bench harvest`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from undertow.core.errors import SubjectError
from undertow.subjects.sites import Port, Site, hidden_of, port
from undertow.subjects.subject import Subject

__all__ = ["hidden_of", "tap", "tap_sites"]


class _StopForward(Exception):
    """Raised by the tap to leave the forward pass once its activations are in hand."""


def tap(subject: Subject, tokens: Int[Tensor, "batch pos"], site: Site,
        attend: Bool[Tensor, "batch pos"] | None = None) -> Float[Tensor, "batch pos width"]:
    """Activations at `site`; nothing beyond it is computed.

    Args:
        subject: the model.
        tokens: token ids, on any device.
        site: where to read.
        attend: False on padding; all True if absent.
    """
    return tap_sites(subject, tokens, [site], attend)[0]


def tap_sites(subject: Subject, tokens: Int[Tensor, "batch pos"], sites: Sequence[Site],
              attend: Bool[Tensor, "batch pos"] | None = None) -> list[Float[Tensor, "batch pos _"]]:
    """Activations at several sites, from one pass that stops at the last of them; in the order of `sites`."""
    found: dict[Site, Tensor] = {}
    wanted = set(sites)
    hooks = [_hook(port(subject.blocks, site), site, found, len(wanted)) for site in wanted]
    try:
        with torch.inference_mode():
            subject.hf_model.base_model(input_ids=tokens.to(subject.device), use_cache=False,
                                        attention_mask=None if attend is None else attend.to(subject.device).long())
    except _StopForward:
        return [found[site] for site in sites]
    finally:
        for hook in hooks:
            hook.remove()
    missing = next(site for site in sites if site not in found)
    raise SubjectError(f"the forward pass of {subject.name} never reached {missing.name}")


def _hook(where: Port, site: Site, found: dict[Site, Tensor], wanted: int) -> Any:
    def keep(value: Any) -> None:
        found[site] = hidden_of(value)
        if len(found) == wanted:
            raise _StopForward

    def on_output(_module: nn.Module, _args: Any, output: Any) -> None:
        keep(output)

    def on_input(_module: nn.Module, args: Any) -> None:
        keep(args)

    return where.module.register_forward_pre_hook(on_input) if where.is_input else where.module.register_forward_hook(on_output)
