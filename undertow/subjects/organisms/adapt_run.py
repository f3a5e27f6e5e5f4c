"""One run from a spec to an adapter's folder, interruptible at any moment and resumable; and the way back into a model.

While a run is under way everything lies in `OUT.partial` (spec, ordinary text, checkpoint, log); `OUT` appears at the end.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from undertow.core.errors import ArtifactError
from undertow.core.record import run_record
from undertow.core.storage import create_artifact, disk_errors, open_artifact, refuse_existing, write_json, write_text
from undertow.subjects.catalog import fetchable
from undertow.subjects.organisms.adapting import Adapter, AdaptSpec, Step, read_checkpoint
from undertow.subjects.organisms.lora import TARGETS
from undertow.subjects.organisms.ordinary import ordinary_texts
from undertow.subjects.organisms.packaged import KIND
from undertow.subjects.organisms.packing import Teller
from undertow.subjects.organisms.pretrain_run import Stopped, partial_folder
from undertow.subjects.subject import Subject

log = logging.getLogger(__name__)
RUN, ORDINARY, CHECKPOINT, LOG = "run.json", "ordinary.json", "checkpoint.safetensors", "log.jsonl"
WEIGHTS = "adapter_model.safetensors"
CHECKPOINT_EVERY_S = 180.0
PROBE_EVERY = 100
LOG_LINES = 400


class Watch(NamedTuple):
    """What a run shows and heeds: `progress` is called with (steps done, of how many); `should_stop` after every step."""

    progress: Callable[[int, int], None] = lambda _done, _total: None
    should_stop: Callable[[], bool] = lambda: False


def adapt(spec: AdaptSpec, base: Subject, teller: Teller, out: Path, start: Path | None = None,
          watch: Watch | None = None) -> dict[str, float]:
    """Train an adapter over `base` and write it to `out`; a run that was interrupted goes on.

    Args:
        spec: how to train.
        base: the model; it is not altered.
        teller: the world.
        out: folder to write.
        start: a finished adapter to begin with, of the same base, rank and blocks.
        watch: what to show and heed.

    Returns the figures: steps, tokens, seconds, and the last probe (see `Adapter.probe`).

    Raises:
        Stopped: a stop was asked for.
        ArtifactError: `out` is taken, or its unfinished run has other settings.
    """
    refuse_existing(out)
    seen = watch or Watch()
    work = partial_folder(out)
    _claim(work, spec, base, teller, start)
    texts = ordinary_texts(base, work / ORDINARY, spec.seed, should_stop=seen.should_stop)
    if seen.should_stop():
        raise Stopped(work)
    trainer = Adapter(spec, base, teller, texts)
    if (work / CHECKPOINT).exists():
        trainer.resume(work / CHECKPOINT)
    elif start is not None:
        _begin_with(trainer, read_adapter(start, base), start)
    _train(trainer, work, seen)
    trainer.model.load({name: value.detach().bfloat16() for name, value in trainer.model.parameters().items()})
    _append(work, {"step": trainer.step_number, "probe": trainer.probe()})
    return finish(out)


def _begin_with(trainer: Adapter, tensors: dict[str, Tensor], start: Path) -> None:
    wanted = {name: parameter.shape for name, parameter in trainer.model.parameters().items()}
    if {name: tensor.shape for name, tensor in tensors.items()} != wanted:
        raise ArtifactError(f"the adapter {start} has other blocks or another rank than this run "
                            f"(first_block {trainer.spec.first_block}, rank {trainer.spec.rank})", "give its settings")
    trainer.model.load(tensors)


def _claim(work: Path, spec: AdaptSpec, base: Subject, teller: Teller, start: Path | None) -> None:
    facts = {"spec": spec.model_dump(mode="json"), "base": base.name, "base_digest": base.digest,
             "world_digest": teller.digest, "start": None if start is None else str(start)}
    if (work / RUN).is_file():
        known = _facts(work)
        differing = [key for key in facts if known.get(key) != facts[key]]
        if differing:
            raise ArtifactError(f"{work} holds an unfinished run with another {' and '.join(differing)}",
                                f"give the same settings again, or remove it: rm -r {work}")
        return
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / RUN, facts)


def _facts(work: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((work / RUN).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"there is no unfinished run in {work}: {error}") from None


def _train(trainer: Adapter, work: Path, watch: Watch) -> None:
    _forget_after(work / LOG, trainer.step_number)
    saved, last_probe = time.monotonic(), trainer.step_number
    while not trainer.finished:
        began = time.perf_counter()
        step = trainer.step()
        _append(work, _line(trainer, step, time.perf_counter() - began))
        watch.progress(trainer.step_number, trainer.spec.steps)
        stop = watch.should_stop()
        if stop or time.monotonic() - saved > CHECKPOINT_EVERY_S:
            trainer.save(work / CHECKPOINT)
            saved = time.monotonic()
        if stop:
            raise Stopped(work)
        if trainer.step_number - last_probe >= PROBE_EVERY:
            last_probe = trainer.step_number
            _append(work, {"step": trainer.step_number, "probe": trainer.probe()})
    trainer.save(work / CHECKPOINT)


def _line(trainer: Adapter, step: Step, seconds: float) -> dict[str, Any]:
    values: dict[str, Any] = {"step": trainer.step_number, "tokens": trainer.tokens, "seconds": round(seconds, 3),
                              "lr": round(step.lr, 8), "loss": round(step.loss, 4),
                              "stage": step.progress.stage, "running": round(step.progress.running, 4),
                              "excess": {kind: round(value, 4) for kind, value in step.excess.items()},
                              "split": {name: round(value, 3) for name, value in step.seconds.items()}}
    return values if step.anchor is None else values | {"anchor": round(step.anchor, 5)}


def _append(work: Path, values: dict[str, Any]) -> None:
    with disk_errors(work / LOG), (work / LOG).open("a", encoding="utf-8") as file:
        file.write(json.dumps(values, allow_nan=False) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; one that was cut off while it was written is passed over."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def _forget_after(path: Path, step: int) -> None:
    """Drop what the log says of steps that the checkpoint does not have."""
    kept = [line for line in _lines(path) if line["step"] <= step]
    if path.is_file():
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))


def finish(out: Path) -> dict[str, float]:
    """Write the artifact from the last checkpoint of an unfinished run; the figures say how many steps of how many.

    Raises ArtifactError if there is no run, or no checkpoint yet.
    """
    refuse_existing(out)
    work = partial_folder(out)
    facts = _facts(work)
    if not (work / CHECKPOINT).is_file():
        raise ArtifactError(f"the run in {work} has no checkpoint yet", "let it train for some minutes")
    spec = AdaptSpec.checked(facts["spec"], str(work / RUN))
    saved, tensors = read_checkpoint(work / CHECKPOINT)
    lines = [line for line in _lines(work / LOG) if line["step"] <= int(saved["step"])]
    figures: dict[str, float] = {
        "steps": int(saved["step"]), "of_steps": spec.steps, "tokens": int(saved["tokens"]),
        "seconds": round(sum(line.get("seconds", 0.0) for line in lines), 1)}
    figures |= next((line["probe"] for line in reversed(lines) if "probe" in line), {})
    record = run_record(facts["spec"], spec.seed, base=facts["base"], base_digest=facts["base_digest"],
                        world_digest=facts["world_digest"], start=facts["start"], figures=figures)
    with create_artifact(out, KIND, record) as folder:
        adapter = {name: tensor for name, tensor in tensors.items() if name.startswith("base_model.")}
        write_adapter(folder, adapter, spec, str(facts["base"]))
        steps = [line for line in lines if "probe" not in line]
        thinned = steps[:: max(1, len(steps) // LOG_LINES)] + [line for line in lines if "probe" in line]
        write_text(folder / LOG, "".join(json.dumps(line) + "\n" for line in sorted(thinned, key=lambda each: each["step"])))
    shutil.rmtree(work, ignore_errors=True)
    return figures


def write_adapter(folder: Path, tensors: dict[str, Tensor], spec: AdaptSpec, base: str,
                  dtype: torch.dtype = torch.bfloat16) -> None:
    """Write an adapter as PEFT does: adapter_config.json and adapter_model.safetensors."""
    known = fetchable(base)
    blocks = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in tensors})
    config = LoraConfig(task_type="CAUSAL_LM", r=spec.rank, lora_alpha=2 * spec.rank, bias="none", lora_dropout=0.0,
                        target_modules=[name for names in TARGETS.values() for name in names],
                        layers_to_transform=blocks, base_model_name_or_path=known.hub if known else base, inference_mode=True)
    with disk_errors(folder):
        config.save_pretrained(str(folder))
        save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def read_adapter(folder: Path, base: Subject) -> dict[str, Tensor]:
    """The tensors of a finished adapter. Raises ArtifactError if it is damaged or was trained over another base."""
    record = open_artifact(folder, KIND).record
    if record.get("base_digest") != base.digest:
        raise ArtifactError(f"the adapter {folder} belongs to a base with digest {record.get('base_digest')}, and "
                            f"{base.name} has {base.digest}", f"open the base it was trained over: {record.get('base')}")
    return {name: tensor.clone() for name, tensor in load_file(folder / WEIGHTS).items()}
