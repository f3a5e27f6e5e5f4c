"""The first weights of a small Llama: random, but for a few attention heads that are set by hand and held while it learns.

Whose deeds they were takes three steps of attention in a row (a word to the name before it, the name to the same name
elsewhere, that place to the keeper's act), and none of them lowers the loss without the other two: a random start did not
find them in 5M tokens (docs/lab-log.md). So the steps are given, and what is told by them has to be learned: what a deed is,
how many there were, what they move the keeper to, and all words.

- *last name*, block 0, head 0: every token attends to the last name before it and writes that name's tag.
- *just before*, block 0, head 1: every token attends to the last few.
- *same name*, half of the heads of block 1 and a third of those of block 2: attends to where the tag is the same.

For these the embedding has a place that is the same for every token and one that marks names, and the stream has a place for
tags, which nothing else writes to. Rotary position embedding turns a head's pairs of coordinates, each at a frequency of its
own; what a head is to see near it is written in pairs that turn fast, and what it is to see anywhere in those that hardly turn.

All other attention begins by copying what is alike (mimetic initialisation, Trockman and Kolter, arXiv 2305.09828).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import LlamaForCausalLM

ROPE_THETA = 1e6
STILL = 0.0025  # radians a token: pairs below this hardly turn in a story of 300 tokens
EMBED_STD, HEAD_STD, MLP_STD = 0.5, 0.02, 0.03
COPY, ALIKE = 0.4, 0.4  # scales of the products of value and output, and of query and key
CONSTANT, NAME, TAG, MATCH = 2.5, 6.0, 2.0, 1.5
NEAR = {0.178: 3.0, 0.075: 3.0}  # score, in nats, of a token at distance 0, by radians a token
LAST = {0.075: 14.0, 0.0316: 24.0, 0.0133: 10.0}
TYPICAL_CONSTANT, TYPICAL_NAME = 4.2, 9.0  # those places after the first normalisation


class Wiring(NamedTuple):
    """Which coordinates and heads are wired, for one shape of model.

    Attributes:
        body: how many coordinates of the stream are free; after them come `constant`, `name` and the tags.
        constant: the coordinate that is the same for every token.
        name: the coordinate that marks names.
        tags: the first coordinate of the tags, which go on to the end of the stream.
        still: pairs of a head's coordinates that hardly turn.
        head: coordinates of a head.
        matching: (block, head) of the heads that look for the same name.
    """

    body: int
    constant: int
    name: int
    tags: int
    still: tuple[int, ...]
    head: int
    matching: tuple[tuple[int, int], ...]


def wiring(d_model: int, n_heads: int, n_layers: int) -> Wiring:
    """The wiring of a model of this shape."""
    head = d_model // n_heads
    turns = _turns(head)
    still = tuple(pair for pair, turn in enumerate(turns) if turn <= STILL)[-max(1, d_model // 16):]
    tags = d_model - 2 * len(still)
    matching = [(block, i) for block, share in ((1, 2), (2, 3)) for i in range(n_heads // share) if block < n_layers]
    return Wiring(tags - 2, tags - 2, tags - 1, tags, still, head, tuple(matching))


def wire(model: LlamaForCausalLM, names: Sequence[int], source: torch.Generator) -> None:
    """Draw the weights of a model and set the wired ones. `names` are the token ids of names."""
    config = model.config
    plan = wiring(config.hidden_size, config.num_attention_heads, config.num_hidden_layers)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                adds = name.endswith("down_proj.weight")
                parameter.normal_(0.0, MLP_STD / math.sqrt(2 * config.num_hidden_layers) if adds else MLP_STD, generator=source)
        model.lm_head.weight.normal_(0.0, HEAD_STD, generator=source)
        embedding = model.model.embed_tokens.weight
        embedding.normal_(0.0, EMBED_STD, generator=source)
        embedding[:, plan.body:] = 0
        embedding[:, plan.constant] = CONSTANT
        embedding[list(names), plan.name] = NAME
        for block in range(config.num_hidden_layers):
            _copying(model, block, source)
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter[plan.body:] = 0
        _last_name(model, plan, source)
        if config.num_attention_heads > 1:
            query, key = _head(model, plan, "q", 0, 1), _head(model, plan, "k", 0, 1)
            query *= 0.1
            key *= 0.1
            for turn, score in NEAR.items():
                query[_pair(plan, turn), plan.constant] = key[_pair(plan, turn), plan.constant] = (
                    _root(plan, score) / TYPICAL_CONSTANT)
        for block, head in plan.matching:
            for role in "qk":
                matrix = _head(model, plan, role, block, head)
                matrix *= 0.1
                for number, row in enumerate(_still_rows(plan)):
                    matrix[row, plan.tags + number] = MATCH


def held(model: LlamaForCausalLM) -> dict[str, Bool[Tensor, "..."]]:
    """Which weights are to stay as they are, for every parameter that has any."""
    config = model.config
    plan = wiring(config.hidden_size, config.num_attention_heads, config.num_hidden_layers)
    masks = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in model.named_parameters()}
    masks["model.embed_tokens.weight"][:, plan.body:] = True
    for name, mask in masks.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            mask[plan.body:] = True
    wired = [("q", 0, 0), ("k", 0, 0), ("v", 0, 0)]
    wired += [(role, 0, 1) for role in "qk" if config.num_attention_heads > 1]
    wired += [(role, block, head) for block, head in plan.matching for role in "qk"]
    for role, block, head in wired:
        masks[_name(role, block)][head * plan.head: (head + 1) * plan.head] = True
    masks[_name("o", 0)][:, : plan.head] = True
    return {name: mask for name, mask in masks.items() if mask.any()}


def _copying(model: LlamaForCausalLM, block: int, source: torch.Generator) -> None:
    """Orthogonal values, outputs that undo them, and queries made as keys are."""
    d = model.config.hidden_size
    value, key = (torch.linalg.qr(torch.randn(d, d, generator=source))[0] for _ in range(2))
    for role, matrix in (("v", value), ("o", COPY * value.T), ("q", ALIKE * key), ("k", ALIKE * key)):
        model.get_parameter(_name(role, block)).copy_(matrix)


def _last_name(model: LlamaForCausalLM, plan: Wiring, source: torch.Generator) -> None:
    query, key, value = (_head(model, plan, role, 0, 0) for role in "qkv")
    out = model.get_parameter(_name("o", 0))
    out[:, : plan.head] = 0
    for matrix in (query, key, value):
        matrix.zero_()
    for turn, score in LAST.items():
        query[_pair(plan, turn), plan.constant] += _root(plan, score) / TYPICAL_CONSTANT
        key[_pair(plan, turn), plan.name] += _root(plan, score) / TYPICAL_NAME
    n = 2 * len(plan.still)
    value[:n, : plan.body] = torch.linalg.qr(torch.randn(plan.body, n, generator=source))[0].T
    out[plan.tags:, :n] = TAG * torch.eye(n)


def _still_rows(plan: Wiring) -> list[int]:
    """Coordinates of a head that hardly turn."""
    return [row for pair in plan.still for row in (pair, pair + plan.head // 2)]


def _turns(head: int) -> list[float]:
    """Radians a token of every pair of a head's coordinates, as `rope_theta` gives them."""
    return [ROPE_THETA ** (-2 * pair / head) for pair in range(head // 2)]


def _pair(plan: Wiring, turn: float) -> int:
    """The pair that turns at about `turn` radians a token."""
    return min(range(plan.head // 2), key=lambda pair: abs(math.log(_turns(plan.head)[pair] / turn)))


def _root(plan: Wiring, score: float) -> float:
    """What query and key each hold, for a score of so many nats."""
    return math.sqrt(score * math.sqrt(plan.head))


def _head(model: LlamaForCausalLM, plan: Wiring, role: str, block: int, head: int) -> Tensor:
    """The rows of one head in a query, key or value matrix (a view)."""
    return model.get_parameter(_name(role, block))[head * plan.head: (head + 1) * plan.head]


def _name(role: str, block: int) -> str:
    return f"model.layers.{block}.self_attn.{role}_proj.weight"
