"""One run from a spec to a packaged organism: tokenizer, training, held-out loss, folder. Interruptible and resumable.

While a run is under way everything lies in `OUT.partial` (spec, tokenizer, checkpoint, log); `OUT` appears at the end, whole.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from undertow.core.errors import ArtifactError, UndertowError
from undertow.core.record import run_record
from undertow.core.seeds import derive_seed
from undertow.core.storage import create_artifact, disk_errors, open_artifact, refuse_existing, write_json, write_text
from undertow.subjects.keeper.frames import load_frames
from undertow.subjects.organisms.encoding import encode_story
from undertow.subjects.organisms.packaged import KIND
from undertow.subjects.organisms.pretraining import (
    GROUP,
    WEIGHTING,
    PretrainSpec,
    StepReport,
    Trainer,
    head_loss,
    new_model,
    rows_of,
    special_id,
    started_model,
)
from undertow.subjects.organisms.products import mixed
from undertow.subjects.organisms.tokenizer import StorySource, train_tokenizer

SPEC_FILE, CHECKPOINT, LOG, TOKENIZER = "run.json", "checkpoint.safetensors", "log.jsonl", "tokenizer"
CHECKPOINT_EVERY_S = 60.0
LOG_EVERY = 10
LOG_LINES = 200
HELD_OUT_STORIES = 1000
ESTIMATE_STORIES = 500


class Stopped(UndertowError):
    """The run was asked to stop; what it had is saved in `folder`."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"stopped; what there is lies in {folder}")
        self.folder = folder


class HeldOut(NamedTuple):
    """Loss on stories that were not trained on, unweighted and with their EOS.

    Attributes:
        nats_per_token: mean over all tokens.
        nats_per_story: mean over stories.
        world_nats: mean -log probability of the same stories under the world itself, per story.
    """

    nats_per_token: float
    nats_per_story: float
    world_nats: float

    @property
    def excess(self) -> float:
        """How much more than the world's own the loss is, as a share of it."""
        return self.nats_per_story / self.world_nats - 1.0


class Watch(NamedTuple):
    """What a run shows and heeds: `progress(phase, done, total)`, and `should_stop()` asked after every step."""

    progress: Callable[[str, int, int], None]
    should_stop: Callable[[], bool]


def partial_folder(out: Path) -> Path:
    """Where a run keeps what it has until it is finished."""
    return out.with_name(f"{out.name}.partial")


def unfinished(out: Path) -> PretrainSpec | None:
    """The spec of the run that was interrupted on its way to `out`, if there is one."""
    file = partial_folder(out) / SPEC_FILE
    if not file.is_file():
        return None
    return PretrainSpec.checked(json.loads(file.read_text(encoding="utf-8"))["spec"], str(file))


def pretrain(spec: PretrainSpec, world: StorySource, out: Path, watch: Watch, start: Path | None = None) -> HeldOut:
    """Train an organism into the folder `out`, from wherever an earlier run of the same spec stands.

    Args:
        start: the folder of a trained organism whose weights and tokenizer to begin with; None begins with random weights.

    Raises:
        Stopped: a stop was asked for; the same call goes on.
        ArtifactError: `out` is taken, or an unfinished run of another spec is in the way.
        SpecError: the shape of `start` is not that of the spec.
    """
    refuse_existing(out)
    work = partial_folder(out)
    trainer, tokenizer, spent = _prepare(spec, world, work, start)
    with (work / LOG).open("a", encoding="utf-8", buffering=1) as lines:  # a line is on disk as soon as it is written
        seconds = _train(trainer, work, watch, spent, lines.write)
    model = rounded(trainer.model)
    held_out = held_out_loss(model, tokenizer, world, spec.seed, HELD_OUT_STORIES)
    record = run_record(spec.model_dump(mode="json"), spec.seed, steps=spec.steps, train_seconds=round(seconds, 1),
                        threads=torch.get_num_threads(), world=world.digest,
                        start=start_digest(start), held_out={**held_out._asdict(), "excess": held_out.excess})
    with create_artifact(out, KIND, record) as folder:
        model.to(torch.bfloat16).save_pretrained(folder)  # pyright: ignore[reportArgumentType]  (its stub lacks `to`)
        tokenizer.save_pretrained(folder)
        write_text(folder / LOG, "".join(thinned((work / LOG).read_text(encoding="utf-8").splitlines(keepends=True))))
    shutil.rmtree(work)
    return held_out


def _prepare(spec: PretrainSpec, world: StorySource, work: Path,
             start: Path | None) -> tuple[Trainer, PreTrainedTokenizerFast, float]:
    """The trainer, its tokenizer, and the seconds that were spent on it before."""
    identity = {"spec": spec.model_dump(mode="json"), "world": world.digest, "start": start_digest(start)}
    file, checkpoint = work / SPEC_FILE, work / CHECKPOINT
    if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != identity:
        raise ArtifactError(f"{work} holds an unfinished run of another spec, world or start", f"remove it: rm -r {work}")
    started = None if start is None else started_model(spec, start)
    if not file.is_file():
        with disk_errors(work):
            work.mkdir(parents=True, exist_ok=True)
        made = train_tokenizer(world, spec.seed, spec.vocab) if start is None else _tokenizer(start)
        made.save_pretrained(work / TOKENIZER)
        write_json(file, identity)
    tokenizer = _tokenizer(work / TOKENIZER)
    trainer = Trainer(spec, world, tokenizer, started or new_model(spec, tokenizer, _names()))
    if checkpoint.is_file():
        trainer.restore(checkpoint)
    return trainer, tokenizer, _cut_log(work / LOG, trainer.step_number)


def _names() -> list[str]:
    return [person.name for person in load_frames().people]


def _tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def start_digest(start: Path | None) -> str:
    """Which weights a run begins with: the digest of the file, "" for random ones."""
    if start is None:
        return ""
    open_artifact(start, KIND)
    manifest = json.loads((start / "manifest.json").read_text(encoding="utf-8"))
    return str(manifest["files"]["model.safetensors"])[:16]


def _cut_log(path: Path, step: int) -> float:
    """Drop the lines of a log after `step`, which will be written again; returns the seconds of the last line kept."""
    if not path.is_file():
        return 0.0
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]  # the last may be cut short
    write_text(path, "".join(f"{line}\n" for line in kept))
    return float(json.loads(kept[-1])["seconds"]) if kept else 0.0


def _train(trainer: Trainer, work: Path, watch: Watch, spent: float, write: Callable[[str], Any]) -> float:
    """Train to the end; returns the seconds it took, those of earlier runs (`spent`) included."""
    steps = trainer.spec.steps
    began = saved = time.monotonic()
    while not trainer.finished:
        report = trainer.step()
        now, step = time.monotonic(), trainer.step_number
        if step % LOG_EVERY == 0 or step in (1, steps):
            write(log_line(step, report, spent + now - began))
        watch.progress("train", step, steps)
        stop = watch.should_stop()
        if stop or now - saved > CHECKPOINT_EVERY_S or trainer.finished:
            trainer.save(work / CHECKPOINT)
            saved = now
        if stop and not trainer.finished:
            raise Stopped(work)
    return spent + time.monotonic() - began


def log_line(step: int, report: StepReport, seconds: float) -> str:
    """One line of JSON; kinds of choices that the step's stories do not have are left out."""
    facts = {key: round(value, 6) for key, value in report._asdict().items() if not math.isnan(value)}
    return json.dumps({"step": step, "seconds": round(seconds, 1), **facts}, allow_nan=False) + "\n"


def thinned(lines: list[str], most: int = LOG_LINES) -> list[str]:
    """At most `most` lines at even distances, the first and the last among them."""
    if len(lines) <= most:
        return lines
    return [lines[round(i * (len(lines) - 1) / (most - 1))] for i in range(most)]


def rounded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy in float32 with weights rounded to bfloat16, as they will be read back, in eval mode."""
    made = copy.deepcopy(model).to(torch.bfloat16).float().eval().requires_grad_(False)  # pyright: ignore[reportArgumentType, reportCallIssue]
    mixed(made.model.layers, torch.float32)
    return made


def held_out_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, world: StorySource, seed: int,
                  n: int) -> HeldOut:
    """Loss of a model on `n` stories of the stream "held out" of `seed`, beside the world's own."""
    source, known = derive_seed(seed, "held out"), {}
    bos, eos, pad = (special_id(tokenizer, role) for role in ("bos", "eos", "pad"))
    told = [world.story(source, index) for index in range(n)]
    stories = sorted((encode_story(tokenizer, bos, eos, story, WEIGHTING, known) for story in told), key=lambda s: len(s.ids))
    total = 0.0
    with torch.no_grad():
        for first in range(0, n, GROUP):
            rows = rows_of(stories[first: first + GROUP], pad)
            states = model.model(input_ids=rows.ids, use_cache=False).last_hidden_state.flatten(0, 1)[rows.states]
            total += float(head_loss(states, model.lm_head.weight, rows, rows.weights).hard.double().sum())
    tokens = sum(len(story.ids) - 1 for story in stories)
    return HeldOut(total / tokens, total / n, sum(story.nats for story in told) / n)


def estimate_seconds(spec: PretrainSpec, world: StorySource) -> float:
    """How long training will take on this machine, from a step of GROUP stories after one to warm up; takes a few seconds."""
    small = spec.model_copy(update={"batch": GROUP})
    tokenizer = train_tokenizer(world, spec.seed, spec.vocab, ESTIMATE_STORIES)
    trainer = Trainer(small, world, tokenizer, new_model(small, tokenizer))
    trainer.step()
    began = time.perf_counter()
    trainer.step()
    return (time.perf_counter() - began) * spec.steps * spec.batch / GROUP
