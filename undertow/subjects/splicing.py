"""The splice: the one place that edits a forward pass.

An edit is a *delta* added to the activation, `x + delta`, never "reconstruction + error", so that an edit which changes
nothing leaves the logits bit-identical. The first position of a sequence (the attention sink) and padding are never
edited, nor is a token whose norm is above a ceiling. The model is restored when the `with` block ends, however it ends.
"""

from __future__ import annotations

import contextlib
import inspect
import secrets
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
@dataclass(frozen=True)
class Memory:
    """Opens an edit where it fired at `at_least` of the last `within` tokens of the same text, the token itself included.

    Firings count on every token that is no padding, not the first and not above the norm ceiling, inside the window or not.
    """

    at_least: int
    within: int

    def __post_init__(self) -> None:
        if not 1 <= self.at_least <= self.within:
            raise EditError(f"{self.at_least} firings are asked for among {self.within} tokens",
                            "ask for 1 or more, and no more than there are tokens")

    def opened(self, fired: Bool[Tensor, "batch column"], pos: int) -> Bool[Tensor, "batch pos"]:
        """Of the last `pos` columns those where it is open; padding has not fired and stands left or right of a text."""
        counted = torch.nn.functional.pad(fired.long().cumsum(1), (self.within, 0))
        return (counted[:, -pos:] - counted[:, :-self.within][:, -pos:]) >= self.at_least

    def opened_in_tree(self, fired: Bool[Tensor, "batch pos"], sees: Bool[Tensor, "batch pos pos"]
                       ) -> Bool[Tensor, "batch pos"]:
        """The same for rows in which a token's text is what it sees."""
        depth = sees.sum(dim=-1)
        near = depth[:, :, None] - depth[:, None, :] < self.within
        return (sees & near & fired[:, None, :]).sum(dim=-1) >= self.at_least


@final
class Splice:
    """Counters of a running splice.

    Attributes:
        positions: editable token positions that passed the site, inside the window.
        firings: those at which the edit acted: it fired there, or its memory was open (also where its delta was zero).
    """

    def __init__(self) -> None:
        self.positions = 0
        self.firings = 0


@contextlib.contextmanager
def splice(subject: Subject, site: Site, edit: Edit, norm_ceiling: float | None = None,
           window: Window | None = None, memory: Memory | None = None, must_act: bool = True) -> Iterator[Splice]:
    """Edit every forward pass of `subject` at `site` while the block runs; plain `subject.hf_model` calls included.

    Args:
        subject: the model.
        site: where to edit.
        edit: what to add.
        norm_ceiling: tokens whose activation norm (L2) is above it are massive activations and are left alone.
        window: the columns to edit; everywhere if absent.
        memory: by it an edit acts where it fired before, and its delta is asked for on all tokens; if absent, where it fires.
        must_act: whether it is an error that the edit acted nowhere; False where the texts may hold nothing that it waits for.

    Raises:
        EditError: the block ended without an exception and the edit had acted nowhere (unless `must_act` is False); or an edit
            with a memory met a key-value cache that was filled outside the block.
        NumericsError: the edit asked for a delta that is not finite.
    """
    counts = Splice()
    base, where = subject.hf_model.base_model, port(subject.blocks, site)
    signature = inspect.signature(base.forward)
    under_way: list[_Pass] = []  # one element
    past = _Past()

    def on_call(_module: nn.Module, args: Any, kwargs: Any) -> None:
        call = signature.bind_partial(*args, **kwargs).arguments
        sees, cached = _sees(call), _past(call)
        readable = _readable_positions(call, sees, cached)
        inside = None if window is None else window.columns(cached, readable.shape[1])
        under_way[:] = [_Pass(call.get("past_key_values"), cached, sees, readable, inside)]

    def edited(x: Tensor) -> Tensor:
        of = under_way[0]
        readable, inside = of.readable.to(x.device), of.inside
        if norm_ceiling is not None:
            readable = readable & (x.norm(dim=-1) <= norm_ceiling)
        allowed = readable if inside is None else readable & inside.to(x.device)
        result = _fitting(edit(x, allowed if memory is None else readable), x, site)
        fired = result.fired & readable
        acts = (fired if memory is None else past.opened(memory, of, fired)) & allowed
        delta = _finite(torch.where(acts[..., None], result.delta, 0.0), site)
        counts.positions += int(allowed.sum())
        counts.firings += int(acts.sum())
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
    if must_act and counts.firings == 0:
        raise EditError(f"the edit at {site.name} fired at none of {counts.positions} editable positions",
                        "an edit that never fires proves nothing: run the subject inside the block, or loosen the gate")


def _fitting(result: EditResult, x: Tensor, site: Site) -> EditResult:
    if result.delta.shape != x.shape or result.fired.shape != x.shape[:2]:
        raise EditError(f"the edit at {site.name} returned delta {tuple(result.delta.shape)} and fired "
                        f"{tuple(result.fired.shape)} for an activation {tuple(x.shape)}")
    return result


def _finite(delta: Tensor, site: Site) -> Tensor:
    if not torch.isfinite(delta).all():
        raise NumericsError(f"the edit at {site.name} asked for a delta that is not finite")
    return delta


class _Pass(NamedTuple):
    """The forward pass under way, as it was when it began: its cache and the columns in it, who sees whom, and the tokens that
    may be read and edited."""

    cache: Any
    cached: int
    sees: Bool[Tensor, "batch pos column"] | None
    readable: Bool[Tensor, "batch pos"]
    inside: Bool[Tensor, "pos"] | None


@final
class _Past:
    """What fired in the columns of every key-value cache that was filled while a splice ran.

    It is kept on the cache itself, so that a copy of the cache has it too.
    """

    def __init__(self) -> None:
        self._name = f"fired_{secrets.token_hex(8)}"  # a cache that outlives one splice must not be read by another

    def opened(self, memory: Memory, of: _Pass, fired: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """Where `memory` is open in a pass in which `fired` is what fired."""
        if of.sees is not None:
            if of.cached:
                raise EditError("a gate with a memory cannot follow a tree of tokens behind a key-value cache",
                                "run it without a cache (use_cache=False)")
            return memory.opened_in_tree(fired, of.sees.to(fired.device))
        whole = fired
        if of.cached:
            before: Tensor | None = getattr(of.cache, self._name, None)
            if before is None or before.shape[1] != of.cached or len(fired) % len(before):
                raise EditError(f"a gate with a memory does not know what fired in {of.cached} cached tokens",
                                "run the whole text inside the `with` block, and give its first pass a cache (DynamicCache())")
            repeated = before.repeat_interleave(len(fired) // len(before), dim=0)  # as the cache's rows were
            whole = torch.cat([repeated.to(fired.device), fired], dim=1)
        if of.cache is not None:
            setattr(of.cache, self._name, whole)
        return memory.opened(whole, fired.shape[1])


def _readable_positions(call: dict[str, Any], sees: Bool[Tensor, "batch pos column"] | None, past: int
                        ) -> Bool[Tensor, "batch pos"]:
    """True on tokens that are neither padding nor the first token of their sequence, from the model's own arguments."""
    inputs = call.get("input_ids")
    inputs = call["inputs_embeds"] if inputs is None else inputs
    batch, length = inputs.shape[:2]
    mask = call.get("attention_mask")
    if sees is not None:
        return sees.sum(dim=-1) > 1
    if isinstance(mask, Tensor) and mask.ndim == 2:
        rank = mask.long().cumsum(1)[:, -length:]
        return mask[:, -length:].bool() & (rank > 1)
    return (torch.arange(past, past + length, device=inputs.device) > 0).expand(batch, length)


def _sees(call: dict[str, Any]) -> Bool[Tensor, "batch pos column"] | None:
    """Who sees whom, where the model was told: then padding and a first token see themselves alone."""
    mask = call.get("attention_mask")
    if not (isinstance(mask, Tensor) and mask.ndim == 4):
        return None
    return (mask if mask.dtype == torch.bool else mask == 0)[:, 0]


def _past(call: dict[str, Any]) -> int:
    """Columns that the key-value cache of a pass already holds."""
    cache = call.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())
