"""Logits after many short continuations of places within one text, in few forward passes.

The continuations stand behind the text as one row: a token sees the text up to its own place, and its own ancestors. So the
text is computed once for all of them. Where a model heeds more than the mask and the positions, each is computed by itself.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from undertow.lexicon.hazard import Continuation
from undertow.subjects.padding import pad
from undertow.subjects.subject import Subject

log = logging.getLogger(__name__)
_TOLERANCE = 1e-2  # nats


@final
class NextLogits:
    """Logits after continuations, as `hazard_exact` asks for them.

    Args:
        subject: the model; an active splice acts on the continuations too.
        sample: a text of two tokens or more, by which it is found out whether the packed row is exact for this model.
        batch_tokens: tokens of continuations in one forward pass.
    """

    def __init__(self, subject: Subject, sample: Sequence[int], batch_tokens: int) -> None:
        self.subject, self.sample, self.batch_tokens = subject, sample, batch_tokens

    @cached_property
    def packs(self) -> bool:
        """Whether a packed row gives what single rows give, tried once on the sample."""
        sample = self.sample
        if "position_ids" not in inspect.signature(self.subject.hf_model.forward).parameters:
            return False
        trial = [Continuation(0, tuple(sample[1:3])), Continuation(len(sample) - 2, tuple(sample[:2]))]
        packed, plain = (compute(sample, 2, trial).log_softmax(dim=-1) for compute in (self._packed, self._plain))
        gap = float((packed - plain).abs().max())
        if not gap < _TOLERANCE:
            log.warning("%s does not compute a packed row exactly (off by %.3g nats); hazard takes longer",
                        self.subject.name, gap)
        return gap < _TOLERANCE

    def after(self, ids: Sequence[int], offset: int) -> Callable[[list[Continuation]], Tensor]:
        """For a text: a function that gives the logits after continuations of ids[:offset + continuation.row]."""
        compute = self._packed if self.packs else self._plain

        def next_logits(continuations: list[Continuation]) -> Float[Tensor, "n vocab"]:
            width = max(1, self.batch_tokens // max(len(c.tokens) + (0 if self.packs else len(ids)) for c in continuations))
            return torch.cat([compute(ids, offset, continuations[at:at + width]) for at in range(0, len(continuations), width)])

        return next_logits

    def _packed(self, ids: Sequence[int], offset: int, continuations: Sequence[Continuation]) -> Float[Tensor, "n vocab"]:
        ends = [offset + c.row for c in continuations]
        text, extra = max(ends), sum(len(c.tokens) for c in continuations)
        sees = torch.eye(text + extra, dtype=torch.bool)
        sees[:text, :text] = torch.ones(text, text, dtype=torch.bool).tril()
        tokens, positions, last = list(ids[:text]), list(range(text)), []
        for end, continuation in zip(ends, continuations, strict=True):
            at, n = len(tokens), len(continuation.tokens)
            sees[at:at + n, :end] = True
            sees[at:at + n, at:at + n] = torch.ones(n, n, dtype=torch.bool).tril()
            tokens += continuation.tokens
            positions += range(end, end + n)
            last.append(at + n - 1 - text)
        model, device = self.subject.hf_model, self.subject.device
        mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([tokens], device=device), attention_mask=mask[None, None].to(device),
                           position_ids=torch.tensor([positions], device=device), use_cache=False,
                           logits_to_keep=extra).logits
        return logits[0, last].float()

    def _plain(self, ids: Sequence[int], offset: int, continuations: Sequence[Continuation]) -> Float[Tensor, "n vocab"]:
        rows = [[*ids[:offset + c.row], *c.tokens] for c in continuations]
        tokens, attend = pad(rows, self.subject, "right")
        with torch.inference_mode():
            logits = self.subject.hf_model(input_ids=tokens, use_cache=False, attention_mask=attend).logits
        return logits[torch.arange(len(rows)), attend.sum(1) - 1].float()
