"""One run from a text to a saved dictionary: harvest, train, judge, save. Interruptible at any moment and resumable.

While a run is under way everything lies in `OUT.partial` (the run's spec, a checkpoint, the log); `OUT` itself appears
at the end, whole. The activations lie in the cache and are shared by all runs on the same subject, site and text.
"""

from __future__ import annotations

import glob
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae.card import card_markdown
from sae.dictionary import LinearDictionary, Provenance, with_weights
from sae.evaluation import Evaluation, evaluate
from sae.formats import KIND, save_folder
from sae.harvesting import Progress, Source, harvest, harvest_together
from sae.normed import NormedDictionary
from sae.plan import Inputs
from sae.sinks import Sink
from sae.spec import RunSpec
from sae.store import ActivationStore
from sae.team import ALONE, Team
from sae.training import SAMPLE, Trainer
from undertow.core.errors import ArtifactError, UserError
from undertow.core.record import run_record
from undertow.core.storage import MANIFEST, create_artifact, disk_errors, refuse_existing, write_json, write_text
from undertow.subjects.load import variant

SPEC_FILE, CHECKPOINT, LOG = "run.json", "checkpoint.safetensors", "log.jsonl"
EVALUATION, CARD = "evaluation.json", "card.md"
CHECKPOINT_EVERY_S = 60.0
LOG_EVERY = 10


class Interrupted(Exception):
    """The run was asked to stop; what it had is saved in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"stopped; what there is lies in {folder}")
        self.folder = folder


class Watch(NamedTuple):
    """What a run shows and heeds.

    Attributes:
        progress: called with (phase, done, total) while harvesting and judging.
        sink: takes the events of the training itself.
        should_stop: asked after every pass and every step.
    """

    progress: Callable[[str, int, int], None]
    sink: Sink
    should_stop: Callable[[], bool]


class Result(NamedTuple):
    """A finished run: the folder, the dictionary and its figures."""

    path: Path
    dictionary: LinearDictionary | NormedDictionary
    evaluation: Evaluation
    summary: dict[str, Any]


def partial_folder(out: Path) -> Path:
    """Where a run keeps what it has until it is finished."""
    return out.with_name(f"{out.name}.partial")


def tidy(out: Path) -> bool:
    """Whether the run is finished; then what a kill in its last moment left beside it is removed."""
    finished = (out / MANIFEST).is_file()
    if finished:
        shutil.rmtree(partial_folder(out), ignore_errors=True)
    return finished


def claim(out: Path, spec: RunSpec) -> Path:
    """Reserve `out` for a new run and write down its spec.

    Raises ArtifactError if `out` is taken, or holds an unfinished run.
    """
    refuse_existing(out)
    work = partial_folder(out)
    if (work / SPEC_FILE).exists():
        raise ArtifactError(f"{work} holds an unfinished run",
                            f"go on with it: undertow sae resume {out}; or remove it: rm -r {work}")
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / SPEC_FILE, spec.model_dump(mode="json"))
    return work


def unfinished(out: Path) -> RunSpec:
    """The spec of the run that was interrupted on its way to `out`. Raises ArtifactError if there is none."""
    file = partial_folder(out) / SPEC_FILE
    finished = tidy(out)
    if finished or not file.is_file():
        raise ArtifactError(f"nothing to resume: the run {out} {'is finished' if finished else 'has never been started'}")
    return RunSpec.checked(json.loads(file.read_text(encoding="utf-8")), str(file))


def assist(spec: RunSpec, inputs: Inputs, out: Path, cache: Path, watch: Watch, team: Team) -> None:
    """What the other members of a team do while the first one carries out `run`: harvest and train on their shares.

    Raises:
        Interrupted: a stop was asked for, here or on another member.
        UserError: bad input, or the first member failed.
    """
    store = _harvested(spec, inputs, cache, watch, (partial_folder(out), team))
    _train(spec, inputs, store, watch, (partial_folder(out), team))


def run(spec: RunSpec, inputs: Inputs, out: Path, cache: Path, watch: Watch, team: Team = ALONE) -> Result:
    """Carry out a claimed run, from wherever it stands. The first member of a team calls this, the others `assist`.

    Raises:
        Interrupted: a stop was asked for; `undertow sae resume` goes on.
        UserError: bad input. A run that had not yet trained leaves nothing behind then.
    """
    began = time.perf_counter()
    work = partial_folder(out)
    for unsealed in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):  # of a process killed while it was saving
        shutil.rmtree(unsealed, ignore_errors=True)
    try:
        store = _harvested(spec, inputs, cache, watch, (work, team))
        trainer = _train(spec, inputs, store, watch, (work, team))
        dictionary = _rounded(trainer.dictionary(_provenance(spec, inputs, store, trainer)), spec.weights)
        judged = evaluate(dictionary.to(inputs.subject.device), Source(inputs.subject, inputs.site, inputs.held_out),
                          (spec.eval_tokens, spec.ce_tokens), cache, _phase("judge", watch, work), spec.store)
    except UserError:
        if not (work / CHECKPOINT).exists():
            shutil.rmtree(work, ignore_errors=True)
        raise
    summary = {"path": str(out), **judged.summary(), "train_tokens": store.n, "steps": trainer.spec.steps,
               "wall_s": time.perf_counter() - began}
    watch.sink.histogram("log10 density", judged.reconstruction.density.log10())
    watch.sink.finish(summary)
    _save(spec, inputs, dictionary, judged, summary, out)
    watch.sink.artifact(out)
    shutil.rmtree(work, ignore_errors=True)
    return Result(out, dictionary, judged, summary)


def _phase(name: str, watch: Watch, work: Path) -> Progress:
    def progress(done: int, total: int) -> None:
        watch.progress(name, done, total)
        if watch.should_stop():
            raise Interrupted(work)

    return progress


def _harvested(spec: RunSpec, inputs: Inputs, cache: Path, watch: Watch, where: tuple[Path, Team]) -> ActivationStore:
    work, team = where
    subject, site, corpus, _ = inputs
    if team.size == 1:
        return harvest(subject, site, corpus, spec.tokens, cache, _phase("harvest", watch, work), spec.store)
    store = harvest_together(Source(subject, site, corpus), spec.tokens, cache, spec.store, team,
                             (lambda done, total: watch.progress("harvest", done, total), watch.should_stop))
    if store is None:
        raise Interrupted(work)
    return store


def _train(spec: RunSpec, inputs: Inputs, store: ActivationStore, watch: Watch, where: tuple[Path, Team]) -> Trainer:
    work, team = where
    training = spec.learn.train_spec(store.n, spec.seed)
    share = team.share_of(training.batch_size)
    checkpoint = work / CHECKPOINT
    if checkpoint.exists():
        trainer = Trainer.resume(checkpoint, str(inputs.subject.device), team)
        if trainer.spec != training:
            raise ArtifactError(f"{checkpoint} belongs to another run", f"remove it and start again: rm -r {work}")
    else:
        order = torch.randperm(store.n, generator=torch.Generator().manual_seed(spec.seed))
        trainer = Trainer.begin(training, store.take(order[:SAMPLE]), str(inputs.subject.device), team)
    watch.sink.start(training.steps, "training", spec.model_dump(mode="json"), trainer.step_number)
    saved = time.monotonic()
    batches = store.batches(training.batch_size, spec.seed, trainer.step_number, share)
    while not trainer.finished:
        report = trainer.step(next(batches))
        if trainer.step_number % LOG_EVERY == 0 or trainer.step_number == 1:
            seen = float(trainer.step_number * training.batch_size)
            watch.sink.event(trainer.step_number, {"tokens": seen, **report._asdict()})
        stop = team.any(watch.should_stop())
        if team.is_first and (stop or time.monotonic() - saved > CHECKPOINT_EVERY_S):
            trainer.save(checkpoint)
            saved = time.monotonic()
        if stop:
            raise Interrupted(work)
    if team.is_first:
        trainer.save(checkpoint)
    return trainer


Trained = LinearDictionary | NormedDictionary


def _rounded(dictionary: Trained, dtype: str) -> Trained:
    """The dictionary as it will be read back from a file of `dtype`, so that its figures are those of the file."""
    def rounded(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(getattr(torch, dtype)).float()

    if isinstance(dictionary, NormedDictionary):
        return replace(dictionary, inner=with_weights(dictionary.inner, rounded))
    return with_weights(dictionary, rounded)


def _provenance(spec: RunSpec, inputs: Inputs, store: ActivationStore, trainer: Trainer) -> Provenance:
    return Provenance(
        model_name=spec.model, hook_name=inputs.site.name, context_size=spec.text.context,
        prepend_bos=inputs.subject.bos_id is not None,
        extra={"subject_digest": inputs.subject.digest, "subject_variant": variant(spec.model), "text": spec.text.model_dump(),
               "text_digest": inputs.train.digest, "tokens": store.n, "steps": trainer.spec.steps, "seed": spec.seed,
               "norm_ceiling": store.record["norm_ceiling"], "run": spec.model_dump(mode="json")})


def _save(spec: RunSpec, inputs: Inputs, dictionary: Trained, judged: Evaluation, summary: dict[str, Any],
          out: Path) -> None:
    figures = {key: value for key, value in summary.items() if key != "path"}
    record = run_record(spec.model_dump(mode="json"), spec.seed, subject_digest=inputs.subject.digest, figures=figures)
    with create_artifact(out, KIND, record) as folder:
        save_folder(dictionary, folder, spec.weights, judged.reconstruction.density.clamp(min=1e-10).log10())
        write_json(folder / EVALUATION, figures)
        write_text(folder / CARD, card_markdown(spec, figures, dictionary.provenance))
        log = partial_folder(out) / LOG
        if log.is_file():
            shutil.copy(log, folder / LOG)
