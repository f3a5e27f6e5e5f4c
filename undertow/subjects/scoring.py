"""Log-probabilities of given continuations; the shared prompt is computed once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from undertow.core.errors import SpecError
from undertow.subjects.subject import Subject


def score(subject: Subject, prompt: Sequence[int], continuations: Sequence[Sequence[int]]) -> Float[Tensor, "n"]:
    """Sum over tokens of log p(token | prompt, earlier tokens), in nats, for every continuation.

    The prompt and each continuation are token ids, tokenised apart: no token spans the seam, so that all continuations
    of one prompt are compared on the same prefix.
    """
    if not prompt or not continuations or not all(continuations):
        raise SpecError(f"scoring needs a prompt ({len(prompt)} tokens) and continuations of at least one token each")
    count, width = len(continuations), max(map(len, continuations))
    tokens = torch.zeros((count, width), dtype=torch.long)
    real = torch.zeros((count, width), dtype=torch.bool)
    for row, continuation in enumerate(continuations):
        tokens[row, : len(continuation)] = torch.tensor(list(continuation))
        real[row, : len(continuation)] = True
    tokens, real = tokens.to(subject.device), real.to(subject.device)
    head = torch.tensor([list(prompt)], device=subject.device)
    cache = DynamicCache()
    with torch.inference_mode():
        first = subject.hf_model(input_ids=head, attention_mask=torch.ones_like(head), past_key_values=cache,
                                 use_cache=True, logits_to_keep=1).logits[:, -1:]
        logits = first.expand(count, 1, -1)
        if width > 1:
            cache.batch_repeat_interleave(count)
            attend = torch.cat([torch.ones_like(head).expand(count, -1), real[:, :-1].long()], dim=1)
            rest = subject.hf_model(input_ids=tokens[:, :-1], attention_mask=attend, past_key_values=cache,
                                    use_cache=True).logits
            logits = torch.cat([logits, rest], dim=1)
        picked = logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
    return picked.masked_fill(~real, 0.0).sum(dim=1).cpu()
