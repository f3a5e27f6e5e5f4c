"""Decisions under deltas: what a change of the activation at the decision site does to D, exactly and in first order.

The prompt is computed once up to its last token; that token and the wordings of the acts then run as one batch for every
delta. Deltas enter by the splice, at the decision site alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor

from features.concepts import Situation
from undertow.core.errors import TextError
from undertow.subjects.organisms.measuring import tokens_of
from undertow.subjects.padding import batches, pad
from undertow.subjects.sites import Site
from undertow.subjects.splicing import EditResult, splice
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import tap

Progress = Callable[[int, int], None]
_CACHED_TOKENS = 8_192  # of all rows of one pass together, prompts included


@final
class Decision(NamedTuple):
    """A situation as token ids; `prompt` with BOS, wordings without."""

    prompt: list[int]
    costly: tuple[tuple[int, ...], ...]
    keep: tuple[tuple[int, ...], ...]


def silent(done: int, total: int) -> None:
    """Progress that is shown nowhere."""


def tokenised(subject: Subject, situation: Situation) -> Decision:
    """A situation as tokens. Raises TextError for a prompt of fewer than two tokens, which has no editable position."""
    prompt = subject.encode(situation.prompt)
    if len(prompt) < 2:
        raise TextError(f"the prompt {situation.prompt!r} has {len(prompt)} tokens; the first is never read or edited",
                        "give a prompt of at least two tokens")
    costly, keep = (tuple(tokens_of(subject, wording) for wording in situation.options[act])
                    for act in (situation.costly, situation.keep))
    return Decision(prompt, costly, keep)


def read_last(subject: Subject, site: Site, prompts: Sequence[Sequence[int]], progress: Progress = silent,
              batch_tokens: int = 4_096) -> Float[Tensor, "n d_model"]:
    """Activations at `site` on the last token of every prompt (token ids), in float32 on the CPU."""
    read: dict[int, Tensor] = {}
    for chosen in batches(prompts, batch_tokens):
        tokens, attend = pad([prompts[i] for i in chosen], subject, "right")
        acts = tap(subject, tokens, site, attend.bool()).float().cpu()
        read |= {i: acts[row, len(prompts[i]) - 1] for row, i in enumerate(chosen)}
        progress(len(read), len(prompts))
    return torch.stack([read[i] for i in range(len(prompts))])


@final
class Primed:
    """A prompt whose last token is run again and again, each time with another delta added there.

    Args:
        subject: the model.
        prompt: token ids, at least two.
    """

    def __init__(self, subject: Subject, prompt: Sequence[int]) -> None:
        self.subject = subject
        self._last, self._past_length = prompt[-1], len(prompt) - 1
        with torch.no_grad():  # not inference mode: gradients pass by these tensors
            self._past = subject.hf_model(input_ids=torch.tensor([list(prompt[:-1])], device=subject.device), use_cache=True,
                                          logits_to_keep=1).past_key_values

    def next_logits(self, site: Site, deltas: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocab"]:
        """Logits of the token after the prompt, for every delta at `site`."""
        rows = max(1, _CACHED_TOKENS // (self._past_length + 1))
        with torch.no_grad():
            return torch.cat([self._run(site, [()], part)[:, 0] for part in deltas.split(rows)])

    def log_probs(self, site: Site, wordings: Sequence[Sequence[int]], deltas: Float[Tensor, "n d_model"]
                  ) -> Float64[Tensor, "n wording"]:
        """log p(wording | prompt) in nats for every delta at `site`; differentiable in `deltas`."""
        width = max(map(len, wordings))
        rows = max(1, _CACHED_TOKENS // ((self._past_length + width) * len(wordings)))
        return torch.cat([self._scored(site, wordings, part) for part in deltas.split(rows)])

    def _scored(self, site: Site, wordings: Sequence[Sequence[int]], deltas: Float[Tensor, "n d_model"]
                ) -> Float64[Tensor, "n wording"]:
        width = max(map(len, wordings))
        logits = self._run(site, [wording[:-1] for wording in wordings], deltas)
        targets = torch.zeros(len(wordings), width, dtype=torch.long)
        real = torch.zeros(targets.shape, dtype=torch.bool)
        for row, wording in enumerate(wordings):
            targets[row, : len(wording)] = torch.tensor(list(wording))
            real[row, : len(wording)] = True
        targets, real = targets.to(logits.device).repeat(len(deltas), 1), real.to(logits.device).repeat(len(deltas), 1)
        picked = logits.log_softmax(dim=-1).gather(-1, targets[..., None])[..., 0]
        return picked.masked_fill(~real, 0.0).double().sum(dim=1).reshape(len(deltas), len(wordings))

    def _run(self, site: Site, tails: Sequence[Sequence[int]], deltas: Float[Tensor, "n d_model"]
             ) -> Float[Tensor, "row pos vocab"]:
        """Logits on the last token and every tail, for each delta in turn; in float32 at least."""
        width, device = max(map(len, tails)), self.subject.device
        tokens = torch.zeros(len(tails), 1 + width, dtype=torch.long)
        attend = torch.zeros(len(tails), self._past_length + 1 + width, dtype=torch.long)
        for row, tail in enumerate(tails):
            tokens[row, : 1 + len(tail)] = torch.tensor([self._last, *tail])
            attend[row, : self._past_length + 1 + len(tail)] = 1
        tokens, attend = tokens.repeat(len(deltas), 1).to(device), attend.repeat(len(deltas), 1).to(device)
        past = copy.deepcopy(self._past)
        past.batch_repeat_interleave(len(tokens))
        added = deltas.to(device).repeat_interleave(len(tails), dim=0)
        with splice(self.subject, site, _AtFirst(added)):
            logits = self.subject.hf_model(input_ids=tokens, attention_mask=attend, past_key_values=past, use_cache=True).logits
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@final
class _AtFirst:
    """The edit that adds a delta of its own to the first position of every row."""

    def __init__(self, deltas: Float[Tensor, "row d_model"]) -> None:
        self.deltas = deltas

    def __call__(self, x: Float[Tensor, "row pos d_model"], editable: Bool[Tensor, "row pos"]) -> EditResult:
        delta = torch.cat([self.deltas.to(x)[:, None], torch.zeros_like(x[:, 1:])], dim=1)
        fired = torch.zeros_like(editable)
        fired[:, 0] = True
        return EditResult(delta, fired)


def d_under(primed: Primed, decision: Decision, site: Site, deltas: Float[Tensor, "n d_model"]) -> Float64[Tensor, "n"]:
    """D = log p(costly) − log p(keep) in nats, exact over all wordings, under every delta; differentiable in `deltas`."""
    scores = primed.log_probs(site, [*decision.costly, *decision.keep], deltas)
    costly, keep = scores.split([len(decision.costly), len(decision.keep)], dim=1)
    return costly.logsumexp(dim=1) - keep.logsumexp(dim=1)


def d_gradient(primed: Primed, decision: Decision, site: Site, delta: Float[Tensor, "d_model"]) -> Float[Tensor, "d_model"]:
    """∂D/∂x at the decision site, where `delta` has been added: nats per unit of the activation, in float32 on the CPU."""
    with torch.enable_grad():
        at = delta.detach().to(primed.subject.device)[None].requires_grad_()
        (gradient,) = torch.autograd.grad(d_under(primed, decision, site, at).sum(), at)
    return gradient[0].float().cpu()
