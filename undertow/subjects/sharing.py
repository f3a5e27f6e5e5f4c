"""What lies below an edit, computed once: arms that differ from a site on share the blocks below it."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from undertow.core.recency import Recent
from undertow.subjects.sites import Site, hidden_of
from undertow.subjects.subject import Subject

MOST_BYTES = 1 << 30


@final
class Below:
    """The activations that enter the rest of the model at `site`, by the pass's tokens, positions and mask.

    While `shared()` is open, a pass of the subject that is like an earlier one begins at the site. The numbers are those of
    the whole pass, to the bit. Passes with a key-value cache, or with gradients of the subject's own parameters, are run
    whole. What is edited or read below the site would not be seen: open it around passes that do neither.

    Attributes:
        hits: passes that began at the site.
        misses: passes that were run whole and kept.
    """

    def __init__(self, subject: Subject, site: Site, most_bytes: int = MOST_BYTES) -> None:
        self.hits = self.misses = 0
        self._subject = subject
        self._blocks = list(subject.blocks)[: site.layer + (site.kind == "resid_post")]
        self._kept: Recent[Any] = Recent(most_bytes, lambda made: hidden_of(made).nbytes)

    @contextlib.contextmanager
    def shared(self) -> Iterator[None]:
        """Share while the block runs."""
        if not self._blocks or any("forward" in vars(block) for block in self._blocks):  # nothing below, or open already
            yield
            return
        base = self._subject.hf_model.base_model
        signature = inspect.signature(base.forward)
        now = _Pass()

        def on_call(_module: nn.Module, args: Any, kwargs: Any) -> None:
            trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in base.parameters())
            now.key = None if trained else _key(signature.bind_partial(*args, **kwargs).arguments)
            now.known = self._kept.get(now.key)
            self.hits += now.known is not None

        hook = base.register_forward_pre_hook(on_call, with_kwargs=True)
        try:
            for block in self._blocks:
                # An attribute of the instance, and not another module in its place, so that hooks on the block still run.
                block.forward = self._wrapped(block.forward, now, block is self._blocks[-1])
            yield
        finally:
            hook.remove()
            for block in self._blocks:
                vars(block).pop("forward", None)

    def _wrapped(self, forward: Callable[..., Any], now: _Pass, last: bool) -> Callable[..., Any]:
        def shared_forward(*args: Any, **kwargs: Any) -> Any:
            if now.known is not None:
                return _outside_inference(now.known)  # every block gives what the last one gave: only that is read
            made = forward(*args, **kwargs)
            if last and now.key is not None:
                self.misses += 1
                self._kept.put(now.key, made)
            return made

        return shared_forward


@final
@dataclass
class _Pass:
    """The pass that is under way: what it depends on, if it can be shared, and what is known of it."""

    key: bytes | None = None
    known: Any = None


def _key(call: dict[str, Any]) -> bytes | None:
    """What a pass depends on, or None for one that cannot be shared."""
    cached = call.get("past_key_values") is not None or call.get("use_cache") is not False
    if call.get("input_ids") is None or cached:
        return None
    digest = hashlib.blake2b(digest_size=16)
    for name in ("input_ids", "position_ids", "attention_mask"):
        value = call.get(name)
        digest.update(f"{name}{tuple(value.shape) if isinstance(value, Tensor) else value}".encode())
        if isinstance(value, Tensor):
            digest.update(value.contiguous().view(torch.uint8).numpy(force=True).data if value.dtype != torch.bool
                          else value.numpy(force=True).tobytes())
    return digest.digest()


def _outside_inference(kept: Any) -> Any:
    """What was kept, as autograd takes it: a tensor made in inference mode cannot be saved for a backward pass."""
    hidden = hidden_of(kept)
    if not hidden.is_inference() or torch.is_inference_mode_enabled():
        return kept
    return hidden.clone() if isinstance(kept, Tensor) else (hidden.clone(), *kept[1:])
