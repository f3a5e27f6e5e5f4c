"""Sampling in batches: left-padded, with a key-value cache, one random stream a sequence.

A sequence draws from its own generator and sees only its own tokens, so its text does not depend on its neighbours.
(Kernels round differently for different shapes; in float64 the tokens agree to the last, see the tests.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from undertow.core.errors import NumericsError, SpecError
from undertow.core.seeds import generator
from undertow.core.spec import Spec
from undertow.subjects.padding import pad
from undertow.subjects.subject import Subject

_ROOM = 64  # tokens that a cache has room for before it is copied


class Sampling(Spec):
    """How to sample. Temperature 0 is greedy; `top_k` 0 and `top_p` 1 switch those filters off."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=1.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    stop_at_eos: bool = True


class Generated(NamedTuple):
    """One sampled sequence: the new tokens (without the ending EOS) and their text."""

    prompt_ids: list[int]
    token_ids: list[int]
    text: str


@runtime_checkable
class Choice(Protocol):
    """Says which token comes next in every row, drawing from the row's own stream.

    `ids` is all that has gone before, padding on the left included, as a logits processor of `transformers` sees it; a row
    that has ended goes on being asked for.
    """

    def __call__(self, ids: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch vocab"],
                 streams: Sequence[torch.Generator]) -> Int[Tensor, "batch"]: ...


def generate(subject: Subject, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int],
             choice: Choice | None = None) -> list[Generated]:
    """Sample a continuation of every prompt (token ids, as `Subject.encode` and `chat.render` give them).

    Args:
        subject: the model; an active splice acts on the prompt and on every new token.
        prompts: token ids, none empty.
        sampling: how to sample.
        seeds: one a prompt.
        choice: what takes the place of `sample`, e.g. the guard's (`interventions.guarding`).
    """
    if len(seeds) != len(prompts) or not prompts or not all(prompts):
        raise SpecError(f"{len(prompts)} prompts and {len(seeds)} seeds: need one seed a prompt and no empty prompt")
    tokens, attend = pad(prompts, subject, "left")
    seen = tokens
    streams = [generator(seed, "generate") for seed in seeds]
    stops = subject.eos_ids if sampling.stop_at_eos else frozenset()
    written: list[list[int]] = [[] for _ in prompts]
    running = [True] * len(prompts)
    cache = Cache(layer_class_to_replicate=_RoomyLayer)
    with torch.inference_mode():
        for _ in range(sampling.max_new_tokens):
            positions = (attend.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1]:]
            out = subject.hf_model(input_ids=tokens, attention_mask=attend, position_ids=positions,
                                   past_key_values=cache, use_cache=True, logits_to_keep=1)
            logits = out.logits[:, -1]
            chosen = sample(logits, sampling, streams) if choice is None else choice(seen, logits, streams)
            for row, token in enumerate(chosen.tolist()):
                running[row] = running[row] and token not in stops
                if running[row]:
                    written[row].append(token)
            if not any(running):
                break
            tokens = chosen[:, None].to(tokens.device)
            seen = torch.cat([seen, tokens], dim=1)
            attend = torch.cat([attend, torch.ones_like(tokens)], dim=1)
    return [Generated(list(prompt), new, str(subject.tokenizer.decode(new, skip_special_tokens=True)))
            for prompt, new in zip(prompts, written, strict=True)]


@final
class _RoomyLayer(DynamicLayer):
    """Keys and values of a text that only grows, with room for the next tokens, so that a token costs no copy of the whole."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As a DynamicLayer's, to the bit."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < stop:
            self._room = (_widened(self.keys, key_states, start, stop), _widened(self.values, value_states, start, stop))
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[..., start:stop, :] = states
        self.keys, self.values = (room[..., :stop, :] for room in self._room)
        return self.keys, self.values


def _widened(kept: Tensor | None, states: Tensor, start: int, stop: int) -> Tensor:
    room = states.new_empty((*states.shape[:-2], stop + _ROOM, states.shape[-1]))
    if start and kept is not None:
        room[..., :start, :] = kept
    return room


def empty_cache() -> DynamicCache:
    """A key-value cache for the first pass over a text. Without one a splice cannot follow what comes after that pass."""
    return DynamicCache()


def sample(logits: Float[Tensor, "batch vocab"], sampling: Sampling,
           streams: Sequence[torch.Generator]) -> Int[Tensor, "batch"]:
    """One token a row by inverting the cumulative distribution at a uniform number from the row's own stream.

    Raises NumericsError, naming the sequences, if logits are NaN (argmax would call that token 0).
    """
    if logits.isnan().any():
        rows = logits.isnan().any(dim=-1).nonzero()[:, 0].tolist()
        raise NumericsError(f"the logits of sequences {rows} are NaN",
                            "load the model in float32; if it stays, the model is broken")
    if sampling.temperature == 0:
        return logits.argmax(dim=-1).cpu()
    scores = logits.double().cpu() / sampling.temperature
    if 0 < sampling.top_k < scores.shape[-1]:
        floor = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < floor, -torch.inf)
    probs = scores.softmax(dim=-1)
    if sampling.top_p < 1:
        ranked, order = probs.sort(dim=-1, descending=True)
        ranked[ranked.cumsum(-1) - ranked >= sampling.top_p] = 0
        probs = torch.zeros_like(probs).scatter(-1, order, ranked)
    cumulative = probs.cumsum(-1)
    draws = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in streams]) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, draws, right=True).clamp(max=probs.shape[-1] - 1)[:, 0]
