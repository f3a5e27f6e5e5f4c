"""kill -9 at random moments, `undertow sae resume`, and the same bits in the end; whatever it was doing when it was killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cli.test_sae_cli import SMALL, train_words

ROOT = Path(__file__).parents[2]
KILLS = 14

# One process imports everything and forks a child an attempt, so that an attempt costs a fraction of a second. Checkpoints are
# written all the time and steps are slowed, so that kills fall on every part of a run.
DRIVER = """
import json, os, random, signal, sys, time
from pathlib import Path

import sae.plan, sae.grid, sae.comparing, transformers
from sae import run as running
from sae.training import Trainer
from undertow.cli.main import main

folder, kills, words = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
running.CHECKPOINT_EVERY_S = 0.01
real = Trainer.step
Trainer.step = lambda self, batch: (time.sleep(0.004), real(self, batch))[1]
draw = random.Random(7)


def attempt(out, after=None):
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        os.environ["UNDERTOW_CACHE"] = f"{out}-cache"
        started = (out / "grid.json").exists() or (out.with_name(out.name + ".partial") / "run.json").exists()
        log = os.open(f"{out}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1), os.dup2(log, 2)
        os._exit(main(["sae", "resume", str(out)] if started else [*words, "--out", str(out)]))
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    return os.WIFSIGNALED(status), os.waitstatus_to_exitcode(status), time.monotonic() - began


def finished(out):
    return (out / "manifest.json").exists() or (out / "index.json").exists()


_, code, whole = attempt(folder / "straight")
assert code == 0, code
killed, outs = 0, []
while killed < kills:
    out = folder / f"killed{len(outs)}"
    outs.append(out.name)
    while not finished(out):
        was_killed, code, _ = attempt(out, draw.uniform(0.1, 0.8) * whole if killed < kills else None)
        killed += was_killed
        assert was_killed or code == 0 or finished(out), (out, code)
    if out.with_name(out.name + ".partial").exists():  # killed when all was done but tidying up, which resuming does
        assert attempt(out)[1] == 2
print(json.dumps({"killed": killed, "outs": outs}))
"""


@pytest.mark.slow
@pytest.mark.parametrize("more", [{"--epochs": "20"}, {"--architecture": "jumprelu", "--epochs": "20"},
                                  {"--k": "3,4", "--epochs": "8"}],
                         ids=["topk", "jumprelu", "grid"])
def test_killed_at_random_moments(more: dict[str, str | None], folder: Path, tmp_path: Path) -> None:
    assert "--width" in SMALL
    words = train_words(folder, tmp_path / "unused", more)[:-2]
    done = subprocess.run([sys.executable, "-c", DRIVER, str(tmp_path), str(KILLS), json.dumps(words)], cwd=ROOT, text=True,
                          capture_output=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=500)
    logs = "\n".join(path.read_text()[-1500:] for path in sorted(tmp_path.glob("*.txt")))
    assert done.returncode == 0, done.stderr + logs
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["killed"] >= KILLS
    straight = {path.relative_to(tmp_path / "straight"): load_file(path)
                for path in (tmp_path / "straight").rglob("sae_weights.safetensors")}
    assert len(straight) == (2 if "--k" in more else 1)
    went_on = 0
    for name in result["outs"]:
        for path, expected in straight.items():
            found = load_file(tmp_path / name / path)
            assert found.keys() == expected.keys()
            assert all(found[key].equal(expected[key]) for key in expected), (name, path)
        went_on += sum('"event": "start"' in line and '"done": 0,' not in line
                       for log in (tmp_path / name).rglob("log.jsonl") for line in log.read_text().splitlines())
        assert not list(tmp_path.glob(f"{name}.partial")) and not list((tmp_path / name).rglob("*.partial"))
        assert not list(tmp_path.glob(f".{name}.*")) and not list((tmp_path / name).glob(".*"))
    assert went_on >= 3  # several attempts really began in the middle of a training
