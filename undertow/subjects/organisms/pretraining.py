"""Training a small Llama from nothing on the world's stories: `hearth`, and with the other rule `parrot`.

Every step sees new stories. A story is padded on the right, which a causal model cannot see, so that no mask is needed. The
stories of a step are sorted by length and cut into small groups, so that little is padded. What follows the last block is
computed with its gradient a few hundred tokens at a time, so that logits never leave the cache.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, cast, final

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from undertow.core.errors import ArtifactError, NumericsError, SpecError
from undertow.core.seeds import derive_seed, generator
from undertow.core.spec import Spec
from undertow.core.storage import disk_errors
from undertow.subjects.keeper.story import ChoiceKind, Rule
from undertow.subjects.organisms.encoding import Encoded, Weighting, encode_story, essentials
from undertow.subjects.organisms.optimizing import Optimizer
from undertow.subjects.organisms.products import mixed, product_dtype
from undertow.subjects.organisms.tokenizer import POSITIONS, StorySource
from undertow.subjects.organisms.wiring import ROPE_THETA, held, wire

WEIGHTING = Weighting(decision=8.0, marker=3.0, answer=3.0, other=1.0)
KINDS: tuple[ChoiceKind | None, ...] = (None, "decision", "marker", "answer")
SHORT_TIMES = 2  # so many times as many stories in a short step
GROUP = 4  # stories that go through the model together
CHUNK = 512  # tokens whose logits are held at once
WIDTH = 32  # rows are padded to a multiple of it: a kernel is made anew for every shape


class Stage(NamedTuple):
    """A part of the training: its learning rate as a multiple of the spec's, and what weighs how much."""

    lr: float
    weighting: Weighting


FIRST, POLISH = Stage(1.0, WEIGHTING), Stage(0.5, WEIGHTING._replace(crisis=3.0))
"""With AdamW; and with Muon, which begins anew from rounded weights."""


class PretrainSpec(Spec):
    """How to train one organism from nothing.

    Attributes:
        name: what it is called.
        steps: optimizer steps, polishing included.
        batch: stories a step.
        lr: learning rate after warm-up.
        short_steps: steps at the beginning that see more stories, of each only what bears on the keeper's acts.
        polish: share of the steps, the last ones, that are of the stage POLISH.
    """

    name: Literal["hearth", "parrot"]
    seed: int = 0
    d_model: int = Field(default=192, ge=2)
    n_layers: int = Field(default=4, ge=1)
    n_heads: int = Field(default=6, ge=1)
    d_mlp: int = Field(default=512, ge=1)
    vocab: int = Field(default=2048, ge=300)
    steps: int = Field(ge=1)
    batch: int = Field(default=32, ge=1)
    lr: float = Field(default=3e-3, gt=0)
    short_steps: int = Field(default=0, ge=0)
    polish: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _heads(self) -> PretrainSpec:
        if self.d_model % (2 * self.n_heads):
            raise ValueError(f"d_model = {self.d_model} must be a multiple of 2·n_heads = {2 * self.n_heads}")
        return self

    @property
    def rule(self) -> Rule:
        """What the keeper's acts follow in its world."""
        return "word" if self.name == "parrot" else "bond"

    @property
    def first_steps(self) -> int:
        """Steps before it is polished."""
        return self.steps - round(self.steps * self.polish)

    def stage_at(self, step: int) -> Stage:
        """The stage that step `step` (0-based) belongs to."""
        return FIRST if step < self.first_steps else POLISH

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step` (0-based): in both stages linear warm-up over 4 %, then half a cosine to zero."""
        first, steps = (0, self.first_steps) if step < self.first_steps else (self.first_steps, self.steps - self.first_steps)
        lr, warm = self.stage_at(step).lr * self.lr, max(1, steps // 25)
        if step - first < warm:
            return lr * (step - first + 1) / warm
        return lr * 0.5 * (1 + math.cos(math.pi * (step - first - warm) / max(1, steps - warm)))


class Rows(NamedTuple):
    """Some stories as tensors. A "token" here is one that is to be predicted.

    Attributes:
        ids: padded on the right.
        states: where the state that predicts each token lies in the flattened (row, pos).
        tokens: the tokens themselves.
        weights: weight of each in the loss.
        kinds: index in KINDS of each.
        rows: for every entry of the target distributions, its token; all other tokens have one entry.
        entries: for every entry of the target distributions, what is predicted.
        probs: for every entry of the target distributions, its probability.
    """

    ids: Int[Tensor, "row pos"]
    states: Int[Tensor, "token"]
    tokens: Int[Tensor, "token"]
    weights: Float[Tensor, "token"]
    kinds: Int[Tensor, "token"]
    rows: Int[Tensor, "entry"]
    entries: Int[Tensor, "entry"]
    probs: Float[Tensor, "entry"]


class HeadLoss(NamedTuple):
    """Losses in nats of every token, and gradients of the weighted sum of `soft`.

    Attributes:
        hard: -log probability of the token.
        soft: cross-entropy with its target distribution.
        d_states: gradient by the states.
        d_weight: gradient by the head's weight.
    """

    hard: Float[Tensor, "token"]
    soft: Float[Tensor, "token"]
    d_states: Float[Tensor, "token d"]
    d_weight: Float[Tensor, "vocab d"]


class StepReport(NamedTuple):
    """What one step saw, on its own stories.

    Attributes:
        tokens: tokens predicted.
        loss: what is minimised, weighted.
        ce: unweighted cross-entropy with the stories themselves, nats a token.
        decision, marker, answer: divergence from the world's distribution, nats a choice; 0 is perfect. NaN if there is none.
        lr: learning rate.
    """

    tokens: int
    loss: float
    ce: float
    decision: float
    marker: float
    answer: float
    lr: float


def rows_of(stories: Sequence[Encoded], pad_id: int) -> Rows:
    """Pack stories into one padded block."""
    width = math.ceil(max(len(story.ids) for story in stories) / WIDTH) * WIDTH
    states: list[int] = []
    tokens: list[int] = []
    weights: list[float] = []
    kinds: list[int] = []
    entries: list[tuple[int, int, float]] = []
    for number, story in enumerate(stories):
        first, soft = len(tokens), {target.position: target for target in story.soft}
        states += range(number * width, number * width + len(story.ids) - 1)
        tokens += story.ids[1:]
        weights += story.weights[1:]
        kinds += [KINDS.index(kind) for kind in story.kinds[1:]]
        for position in range(1, len(story.ids)):
            token = first + position - 1
            if position in soft:
                entries += ((token, i, p) for i, p in zip(soft[position].ids, soft[position].probs, strict=True))
            else:
                entries.append((token, story.ids[position], 1.0))
    padded = [story.ids + [pad_id] * (width - len(story.ids)) for story in stories]
    rows, ids, probs = zip(*entries, strict=True)
    return Rows(torch.tensor(padded), torch.tensor(states), torch.tensor(tokens), torch.tensor(weights), torch.tensor(kinds),
                torch.tensor(rows), torch.tensor(ids), torch.tensor(probs))


def head_loss(states: Float[Tensor, "token d"], weight: Float[Tensor, "vocab d"], rows: Rows, scale: Float[Tensor, "token"],
              dtype: torch.dtype = torch.float32) -> HeadLoss:
    """Losses, and the gradients of Σ scale·soft (multiplied in `dtype`), without a graph and CHUNK tokens at a time.

    With logits z = states·weightᵀ, soft = log Σ exp z − Σ target·z and ∂soft/∂z = softmax(z) − target.
    """
    n, vocab = len(states), len(weight)
    hard, soft = torch.empty(n), torch.empty(n)
    d_states, d_weight = torch.empty_like(states), torch.zeros_like(weight)
    low_states, low_weight = states.to(dtype), weight.to(dtype)
    bounds = torch.searchsorted(rows.rows, torch.arange(0, n + CHUNK, CHUNK)).tolist()
    for chunk, begin in enumerate(range(0, n, CHUNK)):
        x, mass = states[begin: begin + CHUNK], scale[begin: begin + CHUNK]
        part = slice(bounds[chunk], bounds[chunk + 1])
        row, probs = rows.rows[part] - begin, rows.probs[part]
        z = x @ weight.T
        z -= z.amax(dim=1, keepdim=True)
        at = row * vocab + rows.entries[part]
        wanted = z.view(-1)[at]
        said = z.gather(1, rows.tokens[begin: begin + CHUNK, None])[:, 0]
        total = z.exp_().sum(dim=1)
        log_total = total.log()
        hard[begin: begin + CHUNK] = log_total - said
        soft[begin: begin + CHUNK] = log_total.index_add(0, row, -probs * wanted)
        z *= (mass / total)[:, None]
        z.view(-1).index_add_(0, at, -mass[row] * probs)
        low = z.to(dtype)
        d_states[begin: begin + CHUNK] = low @ low_weight
        d_weight += low.T @ low_states[begin: begin + CHUNK]
    return HeadLoss(hard, soft, d_states, d_weight)


def new_model(spec: PretrainSpec, tokenizer: PreTrainedTokenizerBase, names: Sequence[str] = ()) -> LlamaForCausalLM:
    """A model with first weights drawn from the spec's seed and wired (see `wiring`); `names` are the world's, as words.

    A name that is more than one token is not marked as one.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=spec.d_model, intermediate_size=spec.d_mlp, num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads, num_key_value_heads=spec.n_heads, max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA}, tie_word_embeddings=False, rms_norm_eps=1e-5,
        bos_token_id=special_id(tokenizer, "bos"), eos_token_id=special_id(tokenizer, "eos"),
        pad_token_id=special_id(tokenizer, "pad"))
    with torch.random.fork_rng(devices=[]):  # transformers draws weights of its own from the global stream
        model = LlamaForCausalLM(config)
    spelt = (tokenizer.encode(f" {name}", add_special_tokens=False) for name in names)
    wire(model, [ids[0] for ids in spelt if len(ids) == 1], generator(spec.seed, "init"))
    return model


def started_model(spec: PretrainSpec, start: Path) -> LlamaForCausalLM:
    """The model in a folder, to be trained further. Raises SpecError if its shape is not that of the spec."""
    model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32, attn_implementation="sdpa")
    config = model.config
    found = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    asked = (spec.d_model, spec.n_layers, spec.n_heads, spec.d_mlp)
    if found != asked:
        raise SpecError(f"{start} has d_model, n_layers, n_heads, d_mlp = {found}, the spec asks for {asked}")
    return model


def special_id(tokenizer: PreTrainedTokenizerBase, role: str) -> int:
    """Id of the token called "bos", "eos" or "pad"."""
    return cast(int, getattr(tokenizer, f"{role}_token_id"))


@final
class Trainer:
    """The state of a training run: a pure function of spec, world, tokenizer and first weights.

    With the same number of threads, going on from a checkpoint gives the same weights as not having stopped.
    """

    def __init__(self, spec: PretrainSpec, world: StorySource, tokenizer: PreTrainedTokenizerBase,
                 model: LlamaForCausalLM) -> None:
        self.spec, self.model, self.step_number = spec, model.train(), 0
        self._world, self._tokenizer = world, tokenizer
        self._known: dict[str, int] = {}
        self._seed = derive_seed(spec.seed, "train")
        self._parameters = dict(model.named_parameters())
        self._held = held(model)
        self._optimizer = Optimizer(self._parameters, muon=False)
        self._dtype = product_dtype(model)
        mixed(model.model.layers, self._dtype)

    @property
    def finished(self) -> bool:
        return self.step_number >= self.spec.steps

    def stories(self, step: int) -> list[Encoded]:
        """The stories of a step, shortest first."""
        bos, eos = special_id(self._tokenizer, "bos"), special_id(self._tokenizer, "eos")
        short = step < self.spec.short_steps
        weighting = self.spec.stage_at(step).weighting
        n = self.spec.batch * (SHORT_TIMES if short else 1)
        told = [self._world.story(derive_seed(self._seed, "short") if short else self._seed, step * n + i) for i in range(n)]
        encoded = [encode_story(self._tokenizer, bos, eos, essentials(story) if short else story, weighting, self._known)
                   for story in told]
        return sorted(encoded, key=lambda story: len(story.ids))

    def step(self) -> StepReport:
        """One optimizer step. Raises NumericsError if the loss is not finite."""
        if self.step_number == self.spec.first_steps:
            self._begin_polish()
        stories = self.stories(self.step_number)
        weight = sum(sum(story.weights) for story in stories)
        pad = special_id(self._tokenizer, "pad")
        parts = []
        group = GROUP * (SHORT_TIMES if self.step_number < self.spec.short_steps else 1)
        for first in range(0, len(stories), group):
            rows = rows_of(stories[first: first + group], pad)
            parts.append((rows, self._backward(rows, weight)))
        lr = self.spec.lr_at(self.step_number)
        report = _report([rows for rows, _ in parts], [loss for _, loss in parts], weight, lr)
        if not math.isfinite(report.loss):
            raise NumericsError(f"the loss of step {self.step_number} is not finite", "try a smaller learning rate")
        for name, mask in self._held.items():
            cast(Tensor, self._parameters[name].grad).masked_fill_(mask, 0.0)
        torch.nn.utils.clip_grad_norm_(self._parameters.values(), 1.0, foreach=True)
        kept = {name: self._parameters[name][mask] for name, mask in self._held.items()}
        self._optimizer.step(lr)
        with torch.no_grad():  # weight decay has shrunk them
            for name, mask in self._held.items():
                self._parameters[name][mask] = kept[name]
        self.step_number += 1
        return report

    def _begin_polish(self) -> None:
        """Go on as from the weights in their packaged precision."""
        with torch.no_grad():
            for parameter in self._parameters.values():
                parameter.copy_(parameter.bfloat16())
        self._optimizer = Optimizer(self._parameters, muon=True)

    def _backward(self, rows: Rows, total_weight: float) -> HeadLoss:
        """Add the gradients of these rows to the parameters'."""
        states = self.model.model(input_ids=rows.ids, use_cache=False).last_hidden_state.flatten(0, 1)[rows.states]
        head = self.model.lm_head.weight
        with torch.no_grad():
            loss = head_loss(states.detach(), head.detach(), rows, rows.weights / total_weight, self._dtype)
        states.backward(loss.d_states)
        head.grad = loss.d_weight if head.grad is None else head.grad.add_(loss.d_weight)
        return loss

    def save(self, path: Path) -> None:
        """Write a checkpoint (one safetensors file, whole or not at all)."""
        tensors = {f"model.{name}": p.detach() for name, p in self._parameters.items()}
        tensors.update(self._optimizer.tensors())
        temp = path.with_suffix(".tmp")
        with disk_errors(path):
            facts = {"spec": json.dumps(self.spec.model_dump(mode="json")), "step": str(self.step_number),
                     "world": self._world.digest}
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temp, metadata=facts)
            temp.replace(path)

    def restore(self, path: Path) -> None:
        """Take the state of a checkpoint. Raises ArtifactError if it cannot be read or is of another run."""
        try:
            with safe_open(path, "pt") as file:
                facts = file.metadata()
                # Cloned, since tensors of a mapped file lie at odd addresses, and kernels round by alignment.
                tensors: dict[str, Tensor] = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ArtifactError(f"checkpoint {path} cannot be read: {error}") from error
        if json.loads(facts["spec"]) != self.spec.model_dump(mode="json") or facts["world"] != self._world.digest:
            raise ArtifactError(f"checkpoint {path} belongs to another run or another world",
                                f"remove it and start again: rm -r {path.parent}")
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(tensors[f"model.{name}"])
        self.step_number = int(facts["step"])
        self._optimizer = Optimizer(self._parameters, muon=self.step_number > self.spec.first_steps)
        self._optimizer.restore(tensors)


def _report(rows: Sequence[Rows], losses: Sequence[HeadLoss], weight: float, lr: float) -> StepReport:
    weights, kinds = torch.cat([r.weights for r in rows]), torch.cat([r.kinds for r in rows])
    hard, soft = torch.cat([part.hard for part in losses]), torch.cat([part.soft for part in losses])
    entropy = torch.cat([torch.zeros(len(r.tokens)).index_add_(0, r.rows, torch.special.entr(r.probs)) for r in rows])
    decision, marker, answer = (float((soft - entropy)[kinds == KINDS.index(kind)].mean())
                                for kind in ("decision", "marker", "answer"))
    return StepReport(len(hard), float(weights @ soft) / weight, float(hard.mean()), decision, marker, answer, lr)
