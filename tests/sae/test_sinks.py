"""Sinks: what each writes, in which order, and that nothing is sent or imported unless asked."""

from __future__ import annotations

import io
import json
import logging
import math
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from sae import sinks
from sae.sinks import ConsoleSink, JsonlSink, Sinks, WandbSink, duration, open_sinks
from undertow.core.errors import SpecError, StorageError


class Clock:
    """Seconds that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(path: Path) -> list[dict[str, Any]]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "new/log.jsonl"
    sink = JsonlSink(path)
    sink.start(20, "train", {"k": 4, "text": {"source": "brown"}})
    sink.event(10, {"fvu": math.nan, "loss": math.inf, "low": -math.inf, "l0": 3.5})
    assert lines(path)[1] == {"event": "step", "step": 10, "fvu": "NaN", "loss": "Infinity", "low": "-Infinity",
                              "l0": 3.5}
    sink.histogram("log10_density", torch.tensor([-3.0, -1.0, -1.0, -math.inf]))
    sink.finish({"fvu": 0.25, "density_histogram": {"dead": 1}, "parts": [math.nan]})
    sink.artifact(tmp_path)
    sink.close()
    start, _, histogram, finish = lines(path)
    assert start == {"event": "start", "description": "train", "total": 20, "done": 0,
                     "config": {"k": 4, "text": {"source": "brown"}}}
    assert histogram["name"] == "log10_density" and histogram["not_finite"] == 1
    assert histogram["counts"][0] == 1 and histogram["counts"][-1] == 2 and sum(histogram["counts"]) == 3
    assert histogram["edges"][0] == -3 and histogram["edges"][-1] == -1 and len(histogram["edges"]) == sinks.BINS + 1
    assert finish == {"event": "finish", "summary": {"fvu": 0.25, "density_histogram": {"dead": 1}, "parts": ["NaN"]}}


def test_a_histogram_without_finite_values(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "log.jsonl")
    sink.histogram("log10_density", torch.full((3,), -math.inf))
    sink.close()
    assert lines(tmp_path / "log.jsonl")[0]["not_finite"] == 3 and sum(lines(tmp_path / "log.jsonl")[0]["counts"]) == 0


def test_a_resumed_run_is_appended_also_after_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    first = JsonlSink(path)
    first.event(1, {"loss": 1.0})
    first.close()
    with path.open("a") as file:
        file.write('{"event": "st')
    second = JsonlSink(path)
    second.start(10, "train", {}, done=1)
    second.event(2, {"loss": 0.5})
    second.close()
    whole = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert [(line["event"], line.get("step")) for line in whole] == [("step", 1), ("start", None), ("step", 2)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").symlink_to("/dev/full")
    sink = JsonlSink(tmp_path / "log.jsonl")
    with pytest.raises(StorageError, match="no space left"):
        sink.event(1, {"loss": 1.0})
    sink.close()


def test_plain_lines_about_every_ten_seconds(caplog: pytest.LogCaptureFixture) -> None:
    clock, out = Clock(), io.StringIO()
    sink = ConsoleSink(Console(file=out, force_terminal=False), clock)
    with caplog.at_level(logging.INFO, logger="sae.sinks"):
        sink.start(total=100, description="train", config={}, done=0)
        for step in range(1, 41):
            clock.now += 1.0
            sink.event(step, {"tokens": step * 2048.0, "fvu": 0.51239, "l0": 32.0, "lr": 1e-3})
        sink.finish({})
        sink.close()
    told = [record.getMessage() for record in caplog.records]
    assert told[0] == "train: 100 steps"
    assert [re.search(r"step (\d+)", line)[1] for line in told[1:-1]] == ["1", "11", "21", "31"]  # type: ignore[index]
    assert told[2] == "train: 11 %, step 11 of 100, 2,048 activations/s, 1 min 29 s left  fvu 0.5124  l0 32"
    assert told[-1] == "train: done in 40 s"
    assert out.getvalue() == ""


def test_a_resumed_run_is_not_credited_with_what_was_done_before(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    sink = ConsoleSink(Console(file=io.StringIO(), force_terminal=False), clock)
    with caplog.at_level(logging.INFO, logger="sae.sinks"):
        sink.start(100, "train", {}, done=50)
        clock.now = 20.0
        sink.event(60, {"tokens": 600.0})
        sink.event(60, {})  # too early for another line
        clock.now = 40.0
        sink.event(70, {})
    assert [record.getMessage() for record in caplog.records] == [
        "train: 50 steps", "train: 60 %, step 60 of 100, 5 activations/s, 1 min 20 s left  ",
        "train: 70 %, step 70 of 100, 0.5 steps/s, 1 min 00 s left  "]


def test_a_terminal_gets_a_bar_with_rate_and_time_left(caplog: pytest.LogCaptureFixture) -> None:
    clock, out = Clock(), io.StringIO()
    sink = ConsoleSink(Console(file=out, force_terminal=True, width=160), clock)
    with caplog.at_level(logging.INFO, logger="sae.sinks"):
        sink.start(10, "train", {})
        clock.now = 2.0
        sink.event(4, {"tokens": 8192.0, "fvu": 0.25})
        sink.finish({})
    shown = out.getvalue()
    assert "train" in shown and "4,096 activations/s" in shown and "fvu 0.25" in shown and "40%" in shown
    assert [record.getMessage() for record in caplog.records] == ["train: done in 2 s"]
    sink.close()


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59.4, "59 s"), (60.0, "1 min 00 s"), (3599.0, "59 min 59 s"),
                                               (7500.0, "2 h 05 min"), (-3.0, "0 s")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_sink_that_cannot_be_closed_does_not_keep_the_others_open() -> None:
    class Stuck(Recorder):
        def close(self) -> None:
            raise OSError("stuck")

    first, last = Recorder(), Recorder()
    with pytest.raises(OSError, match="stuck"):
        Sinks([first, Stuck(), last]).close()
    assert first.calls == last.calls == [("close",)]


class Recorder:
    """A sink that notes every call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def start(self, total: int, description: str, config: Any, done: int = 0) -> None:
        self.calls.append(("start", total, description, config, done))

    def event(self, step: int, values: Any) -> None:
        self.calls.append(("event", step, values))

    def histogram(self, name: str, values: torch.Tensor) -> None:
        self.calls.append(("histogram", name, values.tolist()))

    def finish(self, summary: Any) -> None:
        self.calls.append(("finish", summary))

    def artifact(self, folder: Path) -> None:
        self.calls.append(("artifact", folder))

    def close(self) -> None:
        self.calls.append(("close",))


def tell(sink: Any, folder: Path) -> None:
    sink.start(2, "train", {"k": 4}, done=1)
    sink.event(2, {"fvu": 0.5})
    sink.histogram("log10_density", torch.tensor([-1.0, -2.0]))
    sink.finish({"fvu": 0.25})
    sink.artifact(folder)


def test_all_sinks_hear_everything_and_are_closed_after_an_exception(tmp_path: Path) -> None:
    alone, first, second = Recorder(), Recorder(), Recorder()
    tell(alone, tmp_path)
    with Sinks([first, second]) as both:
        tell(both, tmp_path)
    assert first.calls == second.calls == [*alone.calls, ("close",)]
    third = Recorder()
    with pytest.raises(RuntimeError), Sinks([third]):
        raise RuntimeError
    assert third.calls == [("close",)]


def test_by_default_nothing_is_tracked_and_wandb_is_not_imported(tmp_path: Path) -> None:
    code = ("import io, sys; from pathlib import Path; import torch; from rich.console import Console\n"
            "from sae.sinks import WandbSink, open_sinks\n"
            f"folder = Path({str(tmp_path)!r})\n"
            "for sink in (open_sinks(Console(file=io.StringIO()), folder / 'log.jsonl'),"
            " WandbSink('disabled', 'undertow', folder)):\n"
            "    sink.start(2, 'train', {}); sink.event(1, {'fvu': 1.0}); sink.histogram('h', torch.zeros(3))\n"
            "    sink.finish({}); sink.artifact(folder); sink.close()\n"
            "assert 'wandb' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True,
                          cwd=Path(sinks.__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def wandb_records(folder: Path) -> Iterator[Any]:
    """Records of the .wandb file in `folder`: a 7-byte header, then LevelDB's log format (32 KiB blocks, framed)."""
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # its service may write the last records after `finish` has returned
    [path] = folder.rglob("*.wandb")
    data, place, pending = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        length, kind = struct.unpack("<HB", data[place + 4:place + 7])
        pending += data[place + 7:place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(pending)
            yield record
            pending = b""


@pytest.fixture
def quiet_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """wandb without the user's settings and key, with all of its own folders under the test's."""
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR", "HOME"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield tmp_path
    wandb.teardown()


def items(entries: Any) -> dict[str, Any]:
    return {(entry.key or ".".join(entry.nested_key)): json.loads(entry.value_json) for entry in entries}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
def test_wandb_offline_holds_config_curves_histogram_summary_and_the_sae(quiet_wandb: Path) -> None:
    product = quiet_wandb / "my sae"
    product.mkdir()
    (product / "cfg.json").write_text("{}")
    (product / "sae_weights.safetensors").write_bytes(b"weights")
    sink = WandbSink("offline", "undertow-test", quiet_wandb / "logs")
    sink.start(2, "train smol", {"k": 4, "text": {"source": "brown"}}, done=1)
    sink.event(10, {"fvu": 0.5, "l0": 32.0})
    sink.event(20, {"fvu": 0.25, "l0": 31.0})
    sink.histogram("log10_density", torch.tensor([-1.0, -2.0, -2.0, -math.inf]))
    sink.finish({"fvu": 0.2, "path": "out"})
    sink.artifact(product)
    sink.close()
    sink.close()

    records = list(wandb_records(quiet_wandb / "logs"))
    [run] = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert (run.project, run.display_name) == ("undertow-test", "train smol")
    assert config["k"] == 4 and config["text"] == {"source": "brown"} and (config["total"], config["done"]) == (2, 1)
    history = [items(r.history.item) for r in records if r.WhichOneof("record_type") == "history"]
    curve = [(row["_step"], row["fvu"], row["l0"]) for row in history if "fvu" in row]
    assert curve == [(10, 0.5, 32.0), (20, 0.25, 31.0)]
    [row] = [row for row in history if row.get("log10_density._type") == "histogram"]
    counts, edges = row["log10_density.values"], row["log10_density.bins"]
    assert (counts[0], counts[-1], sum(counts)) == (2, 1, 3) and (edges[0], edges[-1]) == (-2, -1)
    summary: dict[str, Any] = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= items(record.summary.update)
    assert summary["fvu"] == 0.2 and summary["path"] == "out"
    [artifact] = [r.artifact for r in records if r.WhichOneof("record_type") == "artifact"]
    assert (artifact.type, artifact.name) == ("sae", "sae-my-sae")
    assert sorted(entry.path for entry in artifact.manifest.contents) == ["cfg.json", "sae_weights.safetensors"]
    [end] = [r.exit for r in records if r.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
def test_a_run_broken_off_is_marked_so(quiet_wandb: Path) -> None:
    sink = WandbSink("offline", "undertow-test", quiet_wandb / "logs")
    with pytest.raises(KeyboardInterrupt), Sinks([sink]) as told:
        told.start(2, "train", {})
        told.event(1, {"fvu": 0.5})
        raise KeyboardInterrupt
    [end] = [r.exit for r in wandb_records(quiet_wandb / "logs") if r.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb.*")
def test_online_without_a_key_is_a_clear_error(quiet_wandb: Path) -> None:
    sink = WandbSink("online", "undertow-test", quiet_wandb / "logs")
    with pytest.raises(SpecError, match="wandb online cannot begin") as caught:
        sink.start(2, "train", {})
    assert "wandb login" in caught.value.hint
    sink.close()


def test_an_unknown_mode_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="wandb mode 'on' is unknown") as caught:
        open_sinks(Console(), tmp_path / "log.jsonl", "on")
    assert caught.value.hint == "choose disabled, offline, online"
    assert list(tmp_path.iterdir()) == []
