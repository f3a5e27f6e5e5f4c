"""Where training events go: a progress bar, JSON Lines, wandb. Nothing leaves the machine unless asked.

The order of calls is `start`, then `event` and `histogram` as often as wanted, `finish` when the run has ended well,
`artifact` when its folder is sealed, and always `close` (also after an exception).
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from torch import Tensor

from undertow.core.errors import SpecError
from undertow.core.storage import disk_errors

log = logging.getLogger(__name__)
WANDB_MODES = ("disabled", "offline", "online")
PLAIN_INTERVAL_S = 10.0
BINS = 40
SHOWN = ("fvu", "l0", "dead_share")  # figures beside the bar, where an event has them


@runtime_checkable
class Sink(Protocol):
    """Takes the events of one run."""

    def start(self, total: int, description: str, config: Mapping[str, Any], done: int = 0) -> None:
        """A run begins or goes on: `total` steps wanted, `done` already; `config` holds JSON values."""
        ...

    def event(self, step: int, values: Mapping[str, float]) -> None:
        """Figures after `step` steps; `tokens` among them is the number of activations seen so far."""
        ...

    def histogram(self, name: str, values: Float[Tensor, "n"]) -> None:
        """The distribution of one figure, e.g. log10 firing frequency; values that are not finite are counted apart."""
        ...

    def finish(self, summary: Mapping[str, Any]) -> None:
        """The run has ended well with these figures."""
        ...

    def artifact(self, folder: Path) -> None:
        """The run's product is complete in `folder`."""
        ...

    def close(self) -> None:
        """Let go of everything. Without `finish` before it, the run counts as broken off."""
        ...


@final
class ConsoleSink:
    """A progress bar on a terminal (activations/s, time left); elsewhere a log line about every ten seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._total, self._first, self._began, self._spoke = 0, 0, 0.0, -math.inf
        self._description = ""

    def start(self, total: int, description: str, config: Mapping[str, Any], done: int = 0) -> None:
        """Show the bar, or say that the run begins."""
        self._total, self._first, self._description = total, done, description
        self._began = self._clock()
        if self._console.is_terminal:
            self._progress = Progress(TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(),
                                      TextColumn("{task.fields[rate]}"), TimeRemainingColumn(),
                                      TextColumn("{task.fields[figures]}"), console=self._console)
            self._task = self._progress.add_task(description, total=total, completed=done, rate="", figures="")
            self._progress.start()
        else:
            log.info("%s: %s steps", description, f"{total - done:,}")

    def event(self, step: int, values: Mapping[str, float]) -> None:
        """Move the bar, or log a line if the last is ten seconds old."""
        now = self._clock()
        pace = (step - self._first) / max(now - self._began, 1e-9)
        rate = f"{pace:.1f} steps/s"
        if "tokens" in values:
            rate = f"{pace * values['tokens'] / max(step, 1):,.0f} activations/s"
        figures = "  ".join(f"{name} {values[name]:.4g}" for name in SHOWN if name in values)
        if self._progress is not None:
            self._progress.update(self._task, completed=step, rate=rate, figures=figures)
        elif now - self._spoke >= PLAIN_INTERVAL_S or step >= self._total:
            self._spoke = now
            left = duration((self._total - step) / pace) if pace > 0 else "unknown time"
            log.info("%s: %.0f %%, step %s of %s, %s, %s left  %s", self._description, 100 * step / max(self._total, 1),
                     f"{step:,}", f"{self._total:,}", rate, left, figures)

    def histogram(self, name: str, values: Float[Tensor, "n"]) -> None:
        """Not shown while training; the evaluation prints it."""

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Take the bar away and say how long it took."""
        self.close()
        log.info("%s: done in %s", self._description, duration(self._clock() - self._began))

    def artifact(self, folder: Path) -> None:
        """Say where the product is."""
        log.info("written to %s", folder)

    def close(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def duration(seconds: float) -> str:
    """A time as people say it: `8 s`, `3 min 20 s`, `2 h 05 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


@final
class JsonlSink:
    """One JSON object a line, flushed at once; a resumed run is appended. NaN and infinity are written as strings.

    Every line has `event` (start, step, histogram or finish); a step's figures stand beside its `step`. The file is
    closed by `finish`, so that the folder it lies in can be sealed.
    """

    def __init__(self, path: Path) -> None:
        """Open `path` for appending. A line that a crash cut short is ended first, so that it spoils no other."""
        self._path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            cut = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
            self._file = path.open("ab", buffering=0)  # nothing is left to write, and to fail, on closing
            if cut:
                self._file.write(b"\n")

    def start(self, total: int, description: str, config: Mapping[str, Any], done: int = 0) -> None:
        """Write what was asked."""
        self._write({"event": "start", "description": description, "total": total, "done": done,
                     "config": dict(config)})

    def event(self, step: int, values: Mapping[str, float]) -> None:
        """Write one step."""
        self._write({**values, "event": "step", "step": step})

    def histogram(self, name: str, values: Float[Tensor, "n"]) -> None:
        """Write counts and bin edges (BINS equal bins)."""
        finite = values[torch.isfinite(values)].double().cpu()
        counts, edges = torch.histogram(finite, BINS)
        self._write({"event": "histogram", "name": name, "counts": [int(n) for n in counts], "edges": edges.tolist(),
                     "not_finite": len(values) - len(finite)})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the final figures and close the file."""
        self._write({"event": "finish", "summary": dict(summary)})
        self.close()

    def artifact(self, folder: Path) -> None:
        """Nothing: the record of the run lies in that folder itself."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        with disk_errors(self._path):
            self._file.write(json.dumps(_finite(line), allow_nan=False).encode() + b"\n")


def _finite(value: Any) -> Any:
    """A JSON value with NaN and infinities as the strings `NaN`, `Infinity` and `-Infinity`."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


@final
class WandbSink:
    """Weights & Biases: config, curves, a histogram, and the SAE's folder as an artifact.

    `disabled` does nothing and imports nothing; `offline` writes under `folder` and sends nothing; `online` sends.
    """

    def __init__(self, mode: str, project: str, folder: Path) -> None:
        """Raises SpecError on an unknown mode."""
        if mode not in WANDB_MODES:
            raise SpecError(f"wandb mode {mode!r} is unknown", f"choose {', '.join(WANDB_MODES)}")
        self._mode, self._project, self._folder = mode, project, folder
        self._run: Any = None
        self._finished = False

    def start(self, total: int, description: str, config: Mapping[str, Any], done: int = 0) -> None:
        """Begin a wandb run. Raises SpecError if wandb refuses, for example online without a key."""
        if self._mode == "disabled":
            return
        import wandb  # takes seconds, and nobody needs it who did not ask for it

        with disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(silent=True, console="off", disable_git=True, save_code=False)
        try:
            self._run = wandb.init(mode="online" if self._mode == "online" else "offline", project=self._project,
                                   dir=str(self._folder), name=description, settings=settings,
                                   config={**config, "total": total, "done": done})
        except wandb.Error as error:
            raise SpecError(f"wandb {self._mode} cannot begin: {error}",
                            "run `wandb login` once, or choose the offline mode") from error

    def event(self, step: int, values: Mapping[str, float]) -> None:
        """Log one point of every curve."""
        if self._run is not None:
            self._run.log(dict(values), step=step)

    def histogram(self, name: str, values: Float[Tensor, "n"]) -> None:
        """Log a histogram of the finite values."""
        if self._run is not None:
            import wandb

            finite = values[torch.isfinite(values)].float().cpu()
            self._run.log({name: wandb.Histogram(finite.tolist(), num_bins=BINS)})

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Set the run's summary."""
        if self._run is not None:
            self._run.summary.update(dict(summary))
            self._finished = True

    def artifact(self, folder: Path) -> None:
        """Log the folder's files as an artifact of type `sae` (referred to where they lie, not copied)."""
        if self._run is not None:
            import wandb

            product = wandb.Artifact(re.sub(r"[^\w.-]+", "-", f"sae-{folder.name}"), type="sae")
            product.add_dir(str(folder), policy="immutable", skip_cache=True)
            self._run.log_artifact(product)

    def close(self) -> None:
        """End the run; broken off without `finish`."""
        if self._run is not None:
            self._run.finish(exit_code=0 if self._finished else 1)
            self._run = None


@final
class Sinks:
    """Several sinks as one; closes them all at the end of its `with` block."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self, total: int, description: str, config: Mapping[str, Any], done: int = 0) -> None:
        """To all."""
        for sink in self._sinks:
            sink.start(total, description, config, done)

    def event(self, step: int, values: Mapping[str, float]) -> None:
        """To all."""
        for sink in self._sinks:
            sink.event(step, values)

    def histogram(self, name: str, values: Float[Tensor, "n"]) -> None:
        """To all."""
        for sink in self._sinks:
            sink.histogram(name, values)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """To all."""
        for sink in self._sinks:
            sink.finish(summary)

    def artifact(self, folder: Path) -> None:
        """To all."""
        for sink in self._sinks:
            sink.artifact(folder)

    def close(self) -> None:
        """To all, last opened first."""
        with contextlib.ExitStack() as stack:  # the others are closed also if one cannot be
            for sink in self._sinks:
                stack.callback(sink.close)


def open_sinks(console: Console, jsonl: Path, wandb_mode: str = "disabled", wandb_project: str = "undertow",
               wandb_folder: Path | None = None) -> Sinks:
    """The sinks of a run: console and JSON Lines always, wandb if asked.

    `wandb_folder` is where wandb keeps its files; by default beside the JSON Lines. Raises SpecError on an unknown
    mode.
    """
    tracker = WandbSink(wandb_mode, wandb_project, wandb_folder or jsonl.parent)
    return Sinks([tracker, JsonlSink(jsonl), ConsoleSink(console)])
