"""The splice: the one place that edits a forward pass.

An edit is a *delta* added to the activation, `x + delta`, never "reconstruction + error", so that an edit which changes
nothing leaves the logits bit-identical. The first position of a sequence (the attention sink) and padding are never
edited, nor is a token whose norm is above a ceiling. The model is restored when the `with` block ends, however it ends.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from undertow.core.errors import EditError, NumericsError
from undertow.subjects.sites import Site, hidden_of, port
from undertow.subjects.subject import Subject


class EditResult(NamedTuple):
    """What an edit wants: `delta` is added where `fired`; elsewhere the activation stays as it is."""

    delta: Float[Tensor, "batch pos d_model"]
    fired: Bool[Tensor, "batch pos"]


@runtime_checkable
class Edit(Protocol):
    """A pure function of the activations at one site.

    `editable` is False on padding, on position 0, outside the window and above the norm ceiling; what an edit asks for
    there is ignored.
    """

    def __call__(self, x: Float[Tensor, "batch pos d_model"],
                 editable: Bool[Tensor, "batch pos"]) -> EditResult: ...


@final
@dataclass
class Window:
    """Where a running splice edits: columns `start` <= c < `stop` of its batch (`stop` None: to the end).

    Columns are counted from 0 in what the model has seen since its cache was empty, padding included: with a key-value
    cache, column = cached columns + index. The window is read at every forward pass and may be moved between two.
    """

    start: int = 0
    stop: int | None = None

    def columns(self, past: int, length: int) -> Bool[Tensor, "pos"]:
        """True where a pass over `length` columns after `past` cached ones is inside. Raises EditError for a bound below 0."""
        if self.start < 0 or (self.stop is not None and self.stop < 0):
            raise EditError(f"the window from column {self.start} to {self.stop} has a bound below 0",
                            "columns are counted from the left, from 0")
        column = torch.arange(past, past + length)
        return (column >= self.start) & (column < (past + length if self.stop is None else self.stop))


@final
class Splice:
    """Counters of a running splice.

    Attributes:
        positions: editable token positions that passed the site, inside the window.
        firings: those at which the edit fired (also where its delta was zero).
    """

    def __init__(self) -> None:
        self.positions = 0
        self.firings = 0


@contextlib.contextmanager
def splice(subject: Subject, site: Site, edit: Edit, norm_ceiling: float | None = None,
           window: Window | None = None) -> Iterator[Splice]:
    """Edit every forward pass of `subject` at `site` while the block runs; plain `subject.hf_model` calls included.

    Args:
        subject: the model.
        site: where to edit.
        edit: what to add.
        norm_ceiling: tokens whose activation norm (L2) is above it are massive activations and are left alone.
        window: the columns to edit; everywhere if absent.

    Raises:
        EditError: the block ended without an exception and the edit had fired nowhere.
        NumericsError: the edit asked for a delta that is not finite.
    """
    counts = Splice()
    base, where = subject.hf_model.base_model, port(subject.blocks, site)
    signature = inspect.signature(base.forward)
    editable: list[Tensor] = []  # of the pass under way; one element

    def on_call(_module: nn.Module, args: Any, kwargs: Any) -> None:
        call = signature.bind_partial(*args, **kwargs).arguments
        allowed = _editable_positions(call)
        if window is not None:
            allowed = allowed & window.columns(_past(call), allowed.shape[1]).to(allowed.device)
        editable[:] = [allowed]

    def edited(x: Tensor) -> Tensor:
        allowed = editable[0].to(x.device)
        if norm_ceiling is not None:
            allowed = allowed & (x.norm(dim=-1) <= norm_ceiling)
        result = edit(x, allowed)
        if result.delta.shape != x.shape or result.fired.shape != x.shape[:2]:
            raise EditError(f"the edit at {site.name} returned delta {tuple(result.delta.shape)} and fired "
                            f"{tuple(result.fired.shape)} for an activation {tuple(x.shape)}")
        fired = result.fired & allowed
        delta = torch.where(fired[..., None], result.delta, 0.0)
        if not torch.isfinite(delta).all():
            raise NumericsError(f"the edit at {site.name} asked for a delta that is not finite")
        counts.positions += int(allowed.sum())
        counts.firings += int(fired.sum())
        return x + delta.to(x.dtype)

    def on_output(_module: nn.Module, _args: Any, output: Any) -> Any:
        return edited(output) if isinstance(output, Tensor) else (edited(hidden_of(output)), *output[1:])

    def on_input(_module: nn.Module, args: Any) -> Any:
        return (edited(hidden_of(args)), *args[1:])

    with contextlib.ExitStack() as hooks:
        hooks.callback(base.register_forward_pre_hook(on_call, with_kwargs=True).remove)
        hooks.callback((where.module.register_forward_pre_hook(on_input) if where.is_input
                        else where.module.register_forward_hook(on_output)).remove)
        yield counts
    if counts.firings == 0:
        raise EditError(f"the edit at {site.name} fired at none of {counts.positions} editable positions",
                        "an edit that never fires proves nothing: run the subject inside the block, or loosen the gate")


def _editable_positions(call: dict[str, Any]) -> Bool[Tensor, "batch pos"]:
    """True on tokens that are neither padding nor the first token of their sequence, from the model's own arguments."""
    inputs = call.get("input_ids")
    inputs = call["inputs_embeds"] if inputs is None else inputs
    batch, length = inputs.shape[:2]
    mask = call.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        rank = mask.long().cumsum(1)[:, -length:]
        return mask[:, -length:].bool() & (rank > 1)
    if isinstance(mask, Tensor) and mask.ndim == 4:  # who sees whom: padding and a first token see themselves alone
        sees = mask if mask.dtype == torch.bool else mask == 0
        return sees[:, 0, -length:].sum(dim=-1) > 1
    past = _past(call)
    return (torch.arange(past, past + length, device=inputs.device) > 0).expand(batch, length)


def _past(call: dict[str, Any]) -> int:
    """Columns that the key-value cache of a pass already holds."""
    cache = call.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())
