"""How much of the word there is, by one pass: what a search asks of every candidate, and what a text was likely to say.

    M = Σ over the tokens of a text but its first of Σ_{v ∈ tokens} P(v comes next)

with `tokens` those that say a whole form of the word (`features.naming.word_tokens`). It is hazard (`undertow.lexicon.hazard`)
but for forms that are spelt in several tokens and for tokens that a letter follows, and it costs no further passes. A search
takes it in the situations in which an operation acts, since on ordinary text a gate is seldom open.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from undertow.subjects.padding import batches, pad
from undertow.subjects.sampling import Sampling, sample
from undertow.subjects.subject import Subject

_BATCH = 1_024
_SURE, _RESAMPLES = 0.975, 200
_FLOOR = 1e-12  # probability mass; both sums of a ratio have it added, so that 0/0 is 1


@final
class Watched(NamedTuple):
    """Texts in which the word is watched.

    Attributes:
        rows: token ids.
        tokens: that say it.
        untouched: M of every text, of the untouched subject.
    """

    rows: list[list[int]]
    tokens: Int64[Tensor, "token"]
    untouched: Float[np.ndarray, "row"]


def watched(subject: Subject, rows: list[list[int]], tokens: Int64[Tensor, "token"]) -> Watched:
    """Watch these texts from now on."""
    return Watched(rows, tokens, masses(subject, rows, tokens))


def masses(subject: Subject, rows: Sequence[Sequence[int]], tokens: Int64[Tensor, "token"]) -> Float[np.ndarray, "row"]:
    """M of every text, of the subject as it is now."""
    found = np.zeros(len(rows))
    for batch in batches(rows, _BATCH):
        ids, attend = pad([rows[i] for i in batch], subject, "right")
        with torch.inference_mode():
            logits = subject.hf_model(input_ids=ids, attention_mask=attend, use_cache=False).logits.float()
        said = (logits[:, :, tokens.to(logits.device)].logsumexp(dim=-1) - logits.logsumexp(dim=-1)).exp()
        found[batch] = (said * attend)[:, 1:].sum(dim=1).double().numpy(force=True)
    return found


@final
class Listening:
    """A `Choice` for `generate` that draws as `sample` does and adds up how likely the word was before every token.

    The sum is the number of times that the word is to be expected in what is written, without the luck of the draw that a count
    of words has. For one call of `generate`.

    Args:
        tokens: that say it.
        sampling: how to sample.
    """

    def __init__(self, tokens: Int64[Tensor, "token"], sampling: Sampling) -> None:
        self.tokens, self.sampling = tokens, sampling
        self._steps: list[Float[Tensor, "batch"]] = []

    def __call__(self, ids: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch vocab"],
                 streams: Sequence[torch.Generator]) -> Int[Tensor, "batch"]:
        probs = (logits.double() / (self.sampling.temperature or 1.0)).softmax(dim=-1)
        self._steps.append(probs[:, self.tokens.to(probs.device)].sum(dim=-1).cpu())
        return sample(logits, self.sampling, streams)

    def expected(self, row: int, n_tokens: int) -> float:
        """In `row`, up to and with the step after its first `n_tokens` new tokens, which ended it."""
        return float(sum(step[row] for step in self._steps[: n_tokens + 1]))


def ratio(arm: Float[np.ndarray, "row"], untouched: Float[np.ndarray, "row"]) -> tuple[float, float]:
    """Σ M of the arm over Σ M of the untouched, and its upper bound, one-sided, _SURE, by a bootstrap over texts."""
    rng = np.random.default_rng(0)  # the same draws for every recipe, so that recipes are compared on the same resamples
    drawn = rng.integers(0, len(arm), (_RESAMPLES, len(arm)))
    whole = (arm.sum() + _FLOOR) / (untouched.sum() + _FLOOR)
    return float(whole), float(np.quantile((arm[drawn].sum(axis=1) + _FLOOR) / (untouched[drawn].sum(axis=1) + _FLOOR), _SURE))
