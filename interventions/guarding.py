"""Sampling under the guard, and where the guard mattered.

    choice = GuardedChoice(LexiconProcessor(subject.tokenizer, "love"), sampling)
    generate(subject, prompts, sampling, seeds, choice)
    choice.refusals(0, n_tokens)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.guard import LexiconProcessor
from undertow.subjects.sampling import Generated, Sampling, generate, sample
from undertow.subjects.subject import Subject


@final
class Refusals(NamedTuple):
    """What the guard did to one sequence.

    Attributes:
        hits: tokens that were drawn and refused, so that another was drawn from what the guard leaves.
        mass: probability of refusable tokens, summed over the sequence, before top-k and top-p: the expected hits, ≥ 0.
    """

    hits: int
    mass: float


@final
class GuardedChoice:
    """A `Choice` for `generate`: draws as if there were no guard, and draws again what the guard refuses.

    So a text is the one of its seed without the guard, up to the first hit, and a token has the probability that sampling from
    the guarded logits gives it. The prompts of a batch must be of one length, since the guard would read padding as text. For
    one call of `generate`.

    Args:
        processor: the guard.
        sampling: how to sample.
    """

    def __init__(self, processor: LexiconProcessor, sampling: Sampling) -> None:
        self.processor, self.sampling = processor, sampling
        self._steps: list[list[Refusals]] = []

    def __call__(self, ids: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch vocab"],
                 streams: Sequence[torch.Generator]) -> Int[Tensor, "batch"]:
        guarded = self.processor(ids, logits)
        refused = guarded.isneginf() & ~logits.isneginf()
        chosen = sample(logits, self.sampling, streams)
        hits = refused.gather(1, chosen[:, None].to(refused.device))[:, 0].cpu()
        if bool(hits.any()):
            again = hits.nonzero()[:, 0].tolist()
            chosen[again] = sample(guarded[again], self.sampling, [streams[row] for row in again])
        scale = self.sampling.temperature or 1.0
        mass = ((logits.double() / scale).softmax(dim=-1) * refused).sum(dim=-1).tolist()
        self._steps.append([Refusals(int(hit), share) for hit, share in zip(hits.tolist(), mass, strict=True)])
        return chosen

    def refusals(self, row: int, n_tokens: int) -> Refusals:
        """What was refused in `row` up to and with the step after its first `n_tokens` new tokens, which ended it."""
        steps = [step[row] for step in self._steps[: n_tokens + 1]]
        return Refusals(sum(step.hits for step in steps), sum(step.mass for step in steps))

    def held_back(self, prompt: Sequence[int], tokens: Sequence[int]) -> int:
        """How many of the last `tokens` written after `prompt` must not be shown, as they may become a form; 0 in strict mode.

        A form within the prompt counts as said.
        """
        place, _ = self.processor.masks.read(prompt)
        shown = 0
        for n, token in enumerate(tokens, start=1):
            place = self.processor.masks.after(place, token)
            shown = n if self.processor.masks.table.clean(place) else shown
        return len(tokens) - shown


def under_guard(subject: Subject, document: Generated, sampling: Sampling, seed: int, processor: LexiconProcessor) -> Generated:
    """What `document`, sampled from `seed` with the guard off, would have been with it on: itself where nothing is refused.

    Args:
        subject: the model; an active splice acts.
        document: of `generate`.
        sampling, seed: with which it was sampled.
        processor: the guard, strict.
    """
    place, _ = processor.masks.read(document.prompt_ids)
    for token in document.token_ids:
        place = processor.masks.after(place, token)
        if not processor.masks.permits(place):
            return generate(subject, [document.prompt_ids], sampling, [seed], GuardedChoice(processor, sampling))[0]
    return document
