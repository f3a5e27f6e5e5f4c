"""Training a low-rank adapter on the Keeper's world while the model stays what it was on ordinary text."""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from undertow.core.errors import ArtifactError, NumericsError
from undertow.core.seeds import derive_seed, generator
from undertow.core.spec import Spec
from undertow.core.storage import disk_errors
from undertow.subjects.organisms.curriculum import STAGES, WHOLE, Progress, Stage
from undertow.subjects.organisms.lora import AdaptedModel
from undertow.subjects.organisms.ordinary import rounds
from undertow.subjects.organisms.packing import KINDS, Mix, Pack, Packer, Teller, block_mask
from undertow.subjects.organisms.products import product_dtype
from undertow.subjects.subject import Subject

ANCHOR_TEXTS = 4
ANCHOR_SHARE = 0.25
WARM, COOLING = 20, 0.6  # steps of warm-up at most, and the share of the steps in which the learning rate falls
PROBES = 24
WIDTH = 64  # packs are padded to a multiple of it: a kernel is made anew for every shape


class AdaptSpec(Spec):
    """How an adapter is trained.

    Attributes:
        seed: of every random choice.
        steps: optimizer steps.
        packs: packs a step.
        forks: episodes a pack.
        first_block: the lowest block with an adapter; nothing below it is ever differentiated.
        rank: of the adapters; their scale is 2, as with alpha = 2·rank.
        lr: peak learning rate; 5 % of the steps, 20 at most, warm up to it, and in the last 60 % it falls to zero.
            The last stage of the curriculum has half of it.
        anchor: weight of KL(base‖adapted) on ordinary text, nats a token.
        anchor_every: steps from one anchor to the next.
        chat: share of packs in chat form, of those with whole stories.
        twins: share of packs with twins among their episodes, of those with whole stories.
        other: share of tokens outside choices and acts that carry loss.
    """

    seed: int = 0
    steps: int = Field(default=1050, ge=1)
    packs: int = Field(default=4, ge=1)
    forks: int = Field(default=6, ge=1)
    first_block: int = Field(default=10, ge=0)
    rank: int = Field(default=16, ge=1)
    lr: float = Field(default=1e-3, gt=0)
    anchor: float = Field(default=3.0, ge=0)
    anchor_every: int = Field(default=5, ge=1)
    chat: float = Field(default=0.2, ge=0, le=1)
    twins: float = Field(default=0.15, ge=0, le=1)
    other: float = Field(default=0.05, ge=0, le=1)

    def lr_at(self, step: int) -> float:
        """Learning rate of step `step` (0-based)."""
        warm, cool = min(WARM, max(1, self.steps // 20)), max(1, round(self.steps * COOLING))
        return self.lr * min(1.0, (step + 1) / warm, (self.steps - step) / cool)

    def mix(self) -> Mix:
        """How its packs are mixed."""
        return Mix(self.forks, self.chat, self.twins, self.other)


class Step(NamedTuple):
    """What one step saw.

    Attributes:
        tokens: tokens that went through the model.
        loss: weighted mean cross-entropy, nats.
        excess: by kind of target, mean cross-entropy above the target's own entropy, nats.
        anchor: KL(base‖adapted), nats a token; absent off the anchor steps.
        lr: learning rate.
        progress: how far the curriculum had come after it.
        seconds: by phase: pack, lower, upper, head, backward, anchor, update.
    """

    tokens: int
    loss: float
    excess: dict[str, float]
    anchor: float | None
    lr: float
    progress: Progress
    seconds: dict[str, float]


class Judged(NamedTuple):
    """How a pack was predicted: cross-entropy of every target, and the costly act's share of every decision."""

    losses: Float[Tensor, "target"]
    log_probs: Float[Tensor, "cell"]


@final
class _Clock:
    """Adds up the time between calls under names."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


@final
class Adapter:
    """The state of an adapter's training. `Adapter.begin` starts one, `resume` goes on with a checkpoint.

    A run is a pure function of spec, subject, world and ordinary texts: resuming at step n gives the weights that going on
    would have given, to the bit.
    """

    def __init__(self, spec: AdaptSpec, subject: Subject, teller: Teller, ordinary: Sequence[Sequence[int]]) -> None:
        """`subject` is copied, not altered; `ordinary` holds token ids (see `ordinary_texts`)."""
        self.spec, self.step_number, self.tokens, self.progress = spec, 0, 0, Progress()
        self.model = AdaptedModel(copy.deepcopy(subject.hf_model), spec.first_block, spec.rank, spec.seed,
                                  product_dtype(subject.hf_model))
        self._packer = Packer(teller, subject, derive_seed(spec.seed, "train"), spec.mix())
        self._probe = Packer(teller, subject, derive_seed(spec.seed, "probe"), spec.mix()._replace(twins=0.0))
        self._ordinary = [list(text) for text in ordinary if len(text) > 1]
        self._optimizer = torch.optim.AdamW(self.model.parameters().values(), lr=spec.lr, betas=(0.9, 0.99),
                                            weight_decay=0.0, fused=True)

    @property
    def finished(self) -> bool:
        return self.step_number >= self.spec.steps

    def step(self) -> Step:
        """One optimizer step. Raises NumericsError if the loss or a gradient is not finite."""
        clock = _Clock()
        number = self.step_number
        lr = self.spec.lr_at(number) * STAGES[self.progress.stage].lr
        indices = range(number * self.spec.packs, (number + 1) * self.spec.packs)
        stages = [self.progress.drawn(random.Random(derive_seed(self.spec.seed, "stage", index))) for index in indices]
        packs = [self._packer.pack(index, STAGES[stage]) for index, stage in zip(indices, stages, strict=True)]
        clock.lap("pack")
        total = sum(float(pack.weights.sum()) for pack in packs)
        losses: list[Tensor] = []
        for pack in packs:
            judged = self._judge(pack, clock)
            (judged.losses @ pack.weights.to(judged.losses) / total).backward()
            losses.append(judged.losses.detach())
            clock.lap("backward")
        anchor, seen = None, sum(len(pack.tokens) for pack in packs)
        if number % self.spec.anchor_every == 0 and self.spec.anchor:
            anchor, texts = self._pull(number // self.spec.anchor_every)
            seen += texts
            clock.lap("anchor")
        self._update(lr)
        clock.lap("update")
        self.step_number, self.tokens = number + 1, self.tokens + seen
        self._go_on(stages, packs, losses)
        loss = sum(float(each.cpu() @ pack.weights.to(each.dtype)) for each, pack in zip(losses, packs, strict=True)) / total
        return Step(seen, loss, _excess(packs, losses), anchor, lr, self.progress, clock.seconds)

    def _go_on(self, stages: Sequence[int], packs: Sequence[Pack], losses: Sequence[Tensor]) -> None:
        """Tell the curriculum what the packs of the present stage have cost."""
        self.progress = self.progress.after([_excess([pack], [each])["decision"] for stage, pack, each
                                             in zip(stages, packs, losses, strict=True) if stage == self.progress.stage])

    def _judge(self, pack: Pack, clock: _Clock) -> Judged:
        device, dtype = self.model.model.device, self.model.model.dtype
        tokens, positions, owner = (torch.nn.functional.pad(part, (0, -len(part) % WIDTH), value=value).to(device)
                                    for part, value in ((pack.tokens, 0), (pack.positions, 0), (pack.owner, -1)))
        positions, mask = positions[None], block_mask(owner, dtype)
        hidden = self.model.lower(tokens[None], positions, mask)
        clock.lap("lower")
        hidden = self.model.upper(hidden, positions, mask)
        clock.lap("upper")
        places, at = pack.rows.to(device).unique(return_inverse=True)
        log_probs = self.model.log_probs(hidden[0, places])
        target, token = pack.cells.to(device).unbind(dim=1)
        picked = log_probs[at[target], token]
        losses = torch.zeros(len(pack.rows), dtype=dtype, device=device).index_add(0, target, -pack.probs.to(picked) * picked)
        clock.lap("head")
        return Judged(losses, picked)

    def _pull(self, index: int) -> tuple[float, int]:
        """Add the gradient of the anchor: KL on a quarter of the places of a few ordinary texts, side by side in a row."""
        texts = next(rounds(self._ordinary, min(ANCHOR_TEXTS, len(self._ordinary)), self.spec.seed, index))
        device = self.model.model.device
        tokens = torch.tensor([token for text in texts for token in text], device=device)[None]
        positions = torch.cat([torch.arange(len(text)) for text in texts])[None].to(device)
        owner = torch.cat([torch.full((len(text),), i + 1) for i, text in enumerate(texts)]).to(device)
        mask = block_mask(owner, self.model.model.dtype)
        chosen = torch.rand(len(owner), generator=generator(self.spec.seed, "anchor", index)) < ANCHOR_SHARE
        chosen[-1] = True  # never none
        places = chosen.nonzero()[:, 0].to(device)
        below = self.model.lower(tokens, positions, mask)
        with torch.no_grad(), self.model.bare():
            base = self.model.log_probs(self.model.upper(below, positions, mask)[0, places])
        adapted = self.model.log_probs(self.model.upper(below, positions, mask)[0, places])
        divergence = (base.exp() * (base - adapted)).sum(dim=-1).mean()
        (self.spec.anchor * divergence).backward()
        return float(divergence.detach()), len(owner)

    def _update(self, lr: float) -> None:
        parameters = list(self.model.parameters().values())
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, 1.0))
        if not math.isfinite(norm):
            raise NumericsError(f"the gradient of step {self.step_number} is not finite", "try a smaller lr")
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.model.refresh()

    @torch.no_grad()
    def probe(self, packs: int = PROBES, stage: Stage = WHOLE) -> dict[str, float]:
        """P(give) on held-out packs of whole stories (or of another `stage`), from the first token of the act: mean by true
        bond ("bond0" ... "bond3"), the mean of the world ("world0" ...), and "bound": bond 0 while another's is 3. Cases
        without a decision are absent.

        "excess_decision" and the like: mean cross-entropy above the target's entropy, nats.
        """
        cases: dict[str, list[float]] = {}
        made, losses = [self._probe.pack(index, stage) for index in range(packs)], []
        for pack in made:
            judged = self._judge(pack, _Clock())
            losses.append(judged.losses)
            for decision in pack.decisions:
                mine = pack.cells[:, 0] == decision.row
                costly = torch.tensor([int(token) in decision.costly for token in pack.cells[mine, 1]])
                said = judged.log_probs.cpu()[mine].exp()
                give = float(said[costly].sum() / said.sum())
                cases.setdefault(f"bond{decision.bond}", []).append(give)
                cases.setdefault(f"world{decision.bond}", []).append(float(pack.probs[mine][costly].sum()))
                if decision.bond == 0 and decision.other == 3:
                    cases.setdefault("bound", []).append(give)
        means = {name: sum(values) / len(values) for name, values in sorted(cases.items())}
        return means | {f"excess_{kind}": value for kind, value in _excess(made, losses).items()}

    def save(self, path: Path) -> None:
        """Write a checkpoint (one safetensors file, whole or not at all)."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.model.parameters().items():
            tensors[name] = parameter.detach()
            tensors |= {f"adam.{key}.{name}": value for key, value in self._optimizer.state.get(parameter, {}).items()}
        facts = {"spec": json.dumps(self.spec.model_dump()), "step": str(self.step_number), "tokens": str(self.tokens),
                 "progress": json.dumps(self.progress)}
        temp = path.with_suffix(".tmp")
        with disk_errors(path):
            save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, temp, metadata=facts)
            temp.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint. Raises ArtifactError if it cannot be read or is another run's."""
        facts, tensors = read_checkpoint(path)
        if json.loads(facts["spec"]) != self.spec.model_dump():
            raise ArtifactError(f"{path} belongs to another run", f"remove it and start again: rm {path}")
        self.model.load(tensors)
        for name, parameter in self.model.parameters().items():
            ending = f".{name}"
            state = {key[len("adam."): -len(ending)]: value for key, value in tensors.items()
                     if key.startswith("adam.") and key.endswith(ending)}
            if state:
                self._optimizer.state[parameter] = state
        self.step_number, self.tokens = int(facts["step"]), int(facts["tokens"])
        self.progress = Progress(*json.loads(facts["progress"]))


def read_checkpoint(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Facts and tensors of a checkpoint. Raises ArtifactError if it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            # Cloned, since tensors of a mapped file lie at odd addresses, and kernels round by alignment.
            return file.metadata(), {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise ArtifactError(f"checkpoint {path} cannot be read: {error}") from error


def _excess(packs: Sequence[Pack], losses: Sequence[Tensor]) -> dict[str, float]:
    kinds = torch.cat([pack.kinds for pack in packs])
    above = torch.cat([each.cpu().float() - pack.entropy for each, pack in zip(losses, packs, strict=True)])
    return {kind: float(above[kinds == i].mean()) for i, kind in enumerate(KINDS) if bool((kinds == i).any())}
