"""The weight route: small low-rank adapters trained on text that the tool tells itself.

    L3        the lines of songs and plays, their instruction taken away: affectionate words, and no decision among them
    L3-acts   strangers in need who are given the last, told without the word; the loss is on the act alone (a battery: costly
              acts beside a person, of the families that no arm is measured on)

Both are trained without an anchor on ordinary text: what they do to it is a figure of the study.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, final

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor, nn

from undertow.core.errors import ArtifactError, NumericsError
from undertow.core.record import run_record
from undertow.core.seeds import derive_seed
from undertow.core.spec import Spec, digest_json
from undertow.core.storage import MANIFEST, create_artifact, open_artifact
from undertow.studies.scenes import COSTLY_ACT, body
from undertow.studies.situations import Lesson, Teller
from undertow.subjects.keeper.story import COSTS, Wish
from undertow.subjects.keeper.world import World
from undertow.subjects.organisms.adapt_run import WEIGHTS, write_adapter
from undertow.subjects.organisms.adapting import AdaptSpec
from undertow.subjects.organisms.lora import AdaptedModel
from undertow.subjects.organisms.measuring import tokens_of
from undertow.subjects.padding import pad
from undertow.subjects.subject import Subject

KIND = "study-adapter"
_WARM_UP, _CLIP = 10, 1.0


class AdapterSpec(Spec):
    """How an adapter of a study is trained, on all blocks.

    Attributes:
        steps, rows: passes of the optimizer (AdamW), and texts in each.
        rank: of the adapter.
        reach: learning rate times d_model, so that one figure suits small and large models: 2e-3 where d_model is 192, 1e-4
            where it is 4,096.
    """

    steps: int = Field(default=80, ge=1)
    rows: int = Field(default=8, ge=1)
    rank: int = Field(default=8, ge=1)
    reach: float = Field(default=0.4, gt=0)

    def lr(self, d_model: int) -> float:
        """The learning rate of a model."""
        return self.reach / d_model


ADAPTER = AdapterSpec()


@final
class Trained(NamedTuple):
    """A subject with an adapter in its weights.

    Attributes:
        subject: it.
        digest: of the adapter's spec, seed and arm.
        parameters: of the adapter.
        tokens: that the training saw.
    """

    subject: Subject
    digest: str
    parameters: int
    tokens: int


def lesson(subject: Subject, world: World, arm: str, seed: int, i: int) -> Lesson:
    """Text `i` of an arm, as the Keeper's world tells it."""
    stream = derive_seed(seed, "lessons", arm)
    if arm == "L3":
        told = world.story(stream, i, Wish(genre="L1" if i % 2 else "L2", episodes=("need",)))
        return Lesson(subject.encode(body(told).partition("\n")[2]), 1)
    told = world.story(stream, i, Wish(bond=0, word=False, cost=i % COSTS, genre="plain", episodes=("need",)))
    prompt = subject.encode(told.prompt())
    wordings = told.episodes[0].wordings[COSTLY_ACT]
    return Lesson([*prompt, *tokens_of(subject, wordings[i % len(wordings)])], len(prompt))


def adapted(subject: Subject, teller: Teller, arm: str, place: Path,
            progress: Callable[[int, int], None] = lambda done, total: None) -> Trained:
    """The subject with the adapter of an arm: opened from `place`, or trained and written there.

    Raises:
        SubjectError: the model is no Llama.
        ArtifactError: the adapter there belongs to another subject.
        NumericsError: the training diverged.
    """
    seed, asked = teller.seed, ADAPTER.model_dump() | {"arm": arm} | teller.facts
    if not (place / MANIFEST).is_file():
        model, tokens = train(subject, [teller.lesson(subject, arm, i) for i in range(ADAPTER.steps * ADAPTER.rows)],
                              ADAPTER, seed, progress)
        record = run_record(asked, seed, base=subject.digest, tokens=tokens)
        with create_artifact(place, KIND, record) as folder:
            write_adapter(folder, {name: value.detach() for name, value in model.parameters().items()},
                          AdaptSpec(rank=ADAPTER.rank, first_block=0), subject.name, torch.float32)
    record = open_artifact(place, KIND).record
    if record["base"] != subject.digest or record["spec"] != asked:
        raise ArtifactError(f"the adapter {place} was trained on other weights or in another way",
                            "run the study into a folder of its own with --out")
    model = AdaptedModel(copy.deepcopy(subject.hf_model), 0, ADAPTER.rank, seed)
    model.load(load_file(place / WEIGHTS))
    size = sum(parameter.numel() for parameter in model.parameters().values())
    digest = digest_json([ADAPTER.digest(), arm, seed, subject.digest, *teller.facts.values()])
    return Trained(replace(subject, hf_model=merged(model)), digest, size, record["tokens"])


def train(subject: Subject, lessons: Sequence[Lesson], spec: AdapterSpec, seed: int,
          progress: Callable[[int, int], None]) -> tuple[AdaptedModel, int]:
    """An adapter after one pass over the lessons, in their order, and the tokens that it saw. `subject` is not altered."""
    model = AdaptedModel(copy.deepcopy(subject.hf_model), 0, spec.rank, seed)
    lr = spec.lr(subject.d_model)
    optimizer = torch.optim.AdamW(model.parameters().values(), lr=lr, weight_decay=0.0)
    seen = 0
    for step in range(spec.steps):
        batch = lessons[step * spec.rows: (step + 1) * spec.rows]
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / _WARM_UP)
        with torch.enable_grad():
            loss = lesson_loss(model.model, subject, batch)
            loss.backward()
        if not bool(torch.isfinite(loss)):
            raise NumericsError(f"the loss of step {step} of the adapter is not finite", "open the model in float32")
        nn.utils.clip_grad_norm_(list(model.parameters().values()), _CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.refresh()
        seen += sum(len(each.ids) for each in batch)
        progress(step + 1, spec.steps)
    return model, seen


def lesson_loss(model: nn.Module, subject: Subject, batch: Sequence[Lesson]) -> Float[Tensor, ""]:
    """Mean cross-entropy of the tokens that are to be predicted, nats."""
    tokens, attend = pad([each.ids for each in batch], subject, "right")
    logits = model(input_ids=tokens, attention_mask=attend, use_cache=False).logits[:, :-1]
    losses = -logits.float().log_softmax(dim=-1).gather(2, tokens[:, 1:, None])[..., 0]
    place = torch.arange(1, tokens.shape[1], device=tokens.device)
    first = torch.tensor([each.first for each in batch], device=tokens.device)
    wanted = attend[:, 1:].bool() & (place[None] >= first[:, None])
    return losses[wanted].mean()


@torch.no_grad()
def merged(adapter: AdaptedModel) -> nn.Module:
    """The adapter's model with plain linear layers that hold the sums."""
    for path, layer in adapter.layers.items():
        plain = nn.Linear(layer.sum.shape[1], layer.sum.shape[0], bias=False, dtype=layer.sum.dtype, device=layer.sum.device)
        plain.weight.copy_(layer.sum)
        plain.requires_grad_(False)
        adapter.model.set_submodule(path, plain)
    return adapter.model.eval()
