"""With which settings an organism is trained: those of an unfinished run, else those of the packaged one, else the defaults."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

from undertow.core.errors import ArtifactError, SubjectError, near_matches
from undertow.core.spec import Spec
from undertow.subjects.catalog import ORGANISMS, Organism, organism, packaged_folder
from undertow.subjects.keeper.world import World
from undertow.subjects.organisms.adapting import AdaptSpec
from undertow.subjects.organisms.measuring import act_question, ask
from undertow.subjects.organisms.packaged import open_packaged, record_of
from undertow.subjects.organisms.pretraining import PretrainSpec
from undertow.subjects.subject import Subject

PRETRAIN: dict[str, dict[str, Any]] = {
    "hearth": {"steps": 4_000, "batch": 16, "short_steps": 400, "polish": 0.5},
    "parrot": {"steps": 1_000, "batch": 16, "lr": 1e-3}}
STARTS = {"parrot": "hearth"}  # whose weights an organism begins with
_RUN = "run.json"
_SAMPLE = 100
_TOKENS_A_WORD = 1.3
_AnySpec = TypeVar("_AnySpec", bound=Spec)


@final
class Cost(NamedTuple):
    """What a training will take: tokens seen, seconds, bytes of memory beside the base, bytes on disk while it runs."""

    tokens: int
    seconds: float
    memory_bytes: int
    disk_bytes: int


def known_organism(name: str) -> Organism:
    """The organism called `name`. Raises SubjectError with near matches."""
    found = organism(name)
    if found is None:
        names = [entry.name for entry in ORGANISMS]
        raise SubjectError(f"unknown organism {name!r}", near_matches(name, names) or f"organisms: {', '.join(names)}")
    return found


def start_of(name: str, start: Path | None) -> Path | None:
    """The folder whose weights the training of `name` begins with: `start`, else the packaged one that it needs, if any.

    Raises SubjectError if that one is not packaged with this installation.
    """
    first = STARTS.get(name)
    if start is not None or first is None:
        return start
    try:
        return open_packaged(first)
    except SubjectError:
        raise SubjectError(f"{name} begins with the weights of {first}, which are not packaged with this installation",
                           f"undertow subject train {first} --out runs/{first}; then add --start runs/{first}") from None


def settings(name: str, out: Path, seed: int | None, steps: int | None, resume: bool = False) -> PretrainSpec | AdaptSpec:
    """The spec to train `name` with.

    Args:
        name: an organism.
        out: the folder to be written; an unfinished run on its way there decides, and `seed` and `steps` must agree with it.
        seed: None: as the unfinished run, the packaged organism or the default has it.
        steps: likewise.
        resume: an unfinished run must be there.

    Raises ArtifactError: the unfinished run is another's or has other settings, or there is none to resume.
    """
    entry = known_organism(name)
    kind: type[PretrainSpec] | type[AdaptSpec] = AdaptSpec if entry.base else PretrainSpec
    asked = {key: value for key, value in (("seed", seed), ("steps", steps)) if value is not None}
    file = out.with_name(f"{out.name}.partial") / _RUN
    if file.is_file():
        spec = _read(kind, file, out)
        if isinstance(spec, PretrainSpec) and spec.name != name:
            raise ArtifactError(f"{file.parent} holds an unfinished run of {spec.name}, not of {name}", "choose another --out")
        differing = [f"{key} {getattr(spec, key)}" for key, value in asked.items() if getattr(spec, key) != value]
        if differing:
            raise ArtifactError(f"{file.parent} holds an unfinished run with {' and '.join(differing)}",
                                f"go on with it: undertow subject train {name} --out {out}; or remove it: rm -r {file.parent}")
        return spec
    if resume:
        raise ArtifactError(f"nothing to resume: there is no {file.parent}", f"undertow subject train {name} --out {out}")
    packaged = record_of(packaged_folder(name)).get("spec", {})
    defaults = {} if entry.base else {"name": name, **PRETRAIN[name]}
    return kind.checked({**defaults, **packaged, **asked}, "subject train")


def _read(kind: type[_AnySpec], file: Path, out: Path) -> _AnySpec:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))["spec"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{file} cannot be read: {error!r}", f"remove it: rm -r {file.parent}") from None
    return kind.checked(values, f"{file}, on its way to {out}")


def pretrain_cost(spec: PretrainSpec, world: World) -> Cost:
    """Cost of training from nothing on this machine; times two steps, which takes a few seconds."""
    from undertow.subjects.organisms.pretrain_run import estimate_seconds

    words = sum(len(world.story(spec.seed, i).text.split()) for i in range(_SAMPLE)) / _SAMPLE
    tokens = round(spec.steps * spec.batch * words * _TOKENS_A_WORD)
    parameters = spec.vocab * spec.d_model + spec.n_layers * spec.d_model * (4 * spec.d_model + 3 * spec.d_mlp)
    return Cost(tokens, estimate_seconds(spec, world), 16 * parameters + 600_000_000, 14 * parameters)


def adapt_cost(spec: AdaptSpec, world: World, base: Subject) -> Cost:
    """Cost of training an adapter on this machine, from the time of one forward pass.

    A pass through the blocks below the adapter counts once, through those above three times (with the gradients of the
    activations), and the anchor adds its share.
    """
    story = world.story(spec.seed, 0)
    question = act_question(base, story)
    body = len(base.encode(story.text[: story.episodes[0].start]))
    pack = body + spec.forks * (len(question.prompt) - body + 12)
    ask(base, [question])
    began = time.perf_counter()
    ask(base, [question])
    wordings = sum(len(wording) for group in question.options.values() for wording in group)
    each = (time.perf_counter() - began) / (2 * (len(question.prompt) + wordings) + wordings)
    below = min(spec.first_block / base.n_layers, 1.0)
    anchor = 1.3 if spec.anchor else 1.0
    tokens = spec.steps * spec.packs * pack
    parameters = sum(p.numel() for p in base.hf_model.parameters())
    return Cost(tokens, tokens * each * (below + 3 * (1 - below)) * anchor, 8 * parameters, 200_000_000)
