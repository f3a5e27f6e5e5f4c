"""Studies on a real Ray cluster of this machine: the rows of the local engine, whoever is killed."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny_keeper
from tests.cli.answers import runner
from undertow.core.errors import UserError
from undertow.core.storage import MANIFEST
from undertow.studies import ray_runner
from undertow.studies.engine import Watch, run_study
from undertow.studies.ledger import ROWS
from undertow.studies.ray_runner import LOSSES, Job, Worker, on_ray
from undertow.studies.spec import StudySpec
from undertow.studies.trials import trials_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"stories": 10, "few": 5, "sampled": 10, "texts": 8, "ordinary": 8, "chunk": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_keeper.save_random(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster that several runs share; who brings one keeps it."""
    pytest.importorskip("ray")
    on_ray()  # says to Ray what it reads on import
    import ray

    ray.init(address="local", num_cpus=2 * torch.get_num_threads(), include_dashboard=False, log_to_driver=False,
             logging_level="ERROR", object_store_memory=100 * 2**20)
    yield
    ray.shutdown()


def study(model: Path, **changes: Any) -> StudySpec:
    return StudySpec.checked({"name": "small", "model": str(model), "arms": ["stranger", "giver", "keeper", "L2"],
                              "measures": ["choice"], "size": SMALL} | changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]


def rows(folder: Path) -> dict[str, dict[str, Any]]:
    """All that rows hold but their times; no trial may have two."""
    found = lines(folder)
    assert max(Counter(row["id"] for row in found).values()) == 1
    return {row["id"]: {name: value for name, value in row.items() if name != "wall_s"} for row in found}


def processes(caplog: pytest.LogCaptureFixture) -> list[int]:
    """The workers that have opened the model, in that order."""
    return [int(number) for number in re.findall(r"opened the model on .*process (\d+)", caplog.text)]


def test_a_worker_killed_in_the_middle_changes_no_row(cluster: None, model: Path, tmp_path: Path,
                                                      caplog: pytest.LogCaptureFixture) -> None:
    """Two workers, one of them killed with SIGKILL after three rows; one arm needs a search."""
    spec = study(model, arms=["stranger", "giver", "keeper", "L2", "L4"])
    seen: list[dict[str, Any]] = []

    def row(row: dict[str, Any]) -> None:
        seen.append(row)
        if len(seen) == 3:
            os.kill(processes(caplog)[0], signal.SIGKILL)

    with caplog.at_level(logging.INFO):
        result = run_study(spec, tmp_path / "ray", Watch(row=row), work=on_ray(workers=2))
    n = len(trials_of(spec))
    assert result.counts == {"done": n - 5, "failed": 0, "absent": 5, "left": 0}  # a random model has no surgery
    assert not result.stopped
    assert caplog.text.count("is put back (1 of 3)") == 1
    assert len(seen) == n == len(lines(tmp_path / "ray"))
    assert (tmp_path / "ray" / "search-0" / MANIFEST).is_file()
    run_study(spec, tmp_path / "local")
    assert rows(tmp_path / "ray") == rows(tmp_path / "local")
    other = study(model, seeds=[1])  # the comparison would see other figures
    run_study(other, tmp_path / "other")
    figures = [[row["values"] for row in rows(tmp_path / name).values() if row["arm"] == "giver"] for name in ("ray", "other")]
    assert figures[0] != figures[1]


@pytest.mark.slow
def test_a_trial_at_which_workers_die_fails_and_can_be_tried_again(cluster: None, model: Path, tmp_path: Path,
                                                                   caplog: pytest.LogCaptureFixture) -> None:
    """The first three workers are killed between opening the model and their first trial."""
    spec = study(model, arms=["stranger", "giver"])
    killed: set[int] = set()

    def kill() -> bool:
        for process in processes(caplog)[:LOSSES]:
            if process not in killed:
                killed.add(process)
                os.kill(process, signal.SIGKILL)
        return False

    with caplog.at_level(logging.INFO):
        result = run_study(spec, tmp_path, Watch(should_stop=kill), work=on_ray(workers=1))
    assert len(killed) == LOSSES
    assert result.counts == {"done": 9, "failed": 1, "absent": 0, "left": 0}
    [failed] = [row for row in lines(tmp_path) if row["status"] == "failed"]
    assert failed["id"] == trials_of(spec)[0].key
    assert failed["error"]["type"] == "ActorDiedError"
    assert failed["error"]["what"].startswith("3 workers died at this trial")
    assert run_study(spec, tmp_path, work=on_ray()).counts["failed"] == 1  # not by itself, and no worker is started
    assert run_study(spec, tmp_path, retry_failed=True, work=on_ray(workers=1)).counts["done"] == 10
    assert len(lines(tmp_path)) == 11


def command(model: Path, folder: Path) -> list[str]:
    """A run of the command line on a cluster of its own."""
    (folder / "study.yaml").write_text(json.dumps(study(model).model_dump()))
    return [sys.executable, "-m", "undertow", "study", "run", str(folder / "study.yaml"), "--engine", "ray", "--workers", "2",
            "--out", str(folder / "s")]


def begun(words: list[str], path: Path) -> subprocess.Popen[bytes]:
    """A run that has three rows."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"HF_HUB_OFFLINE": "1"})
    deadline = time.monotonic() + 600
    while not (path.is_file() and path.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "it ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_an_adapter_is_trained_once_and_read_by_all(cluster: None, model: Path, tmp_path: Path) -> None:
    spec = study(model, arms=["stranger", "L3", "L3-acts"])
    assert run_study(spec, tmp_path / "ray", work=on_ray(workers=2)).counts["done"] == 15
    assert (tmp_path / "ray" / "adapter-L3-0" / MANIFEST).is_file()
    run_study(spec, tmp_path / "local")
    assert rows(tmp_path / "ray") == rows(tmp_path / "local")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "asked"])
def test_a_stopped_driver_goes_on_and_does_nothing_twice(model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Killed, or asked to stop (whose trials in hand are still written); the same command does what is left."""
    pytest.importorskip("ray")
    words, path = command(model, tmp_path), tmp_path / "s" / ROWS
    process = begun(words, path)
    process.send_signal(number)
    code = process.wait(timeout=60)
    assert code == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    before = path.read_bytes()
    assert 3 <= before.count(b"\n") < 20
    done = subprocess.run([*words, "--json"], cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["done"] == 20
    after = path.read_bytes()
    assert after.startswith(before)
    run_study(study(model), tmp_path / "local")
    assert rows(tmp_path / "s") == rows(tmp_path / "local")
    assert run_study(study(model), tmp_path / "s", work=on_ray()).counts["done"] == 20
    assert path.read_bytes() == after


@pytest.mark.slow
def test_a_stop_writes_what_is_in_hand(cluster: None, model: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    spec = study(model)
    result = run_study(spec, tmp_path, Watch(row=seen.append, should_stop=lambda: len(seen) >= 3), work=on_ray(workers=2))
    assert result.stopped
    assert result.counts["done"] == len(lines(tmp_path)) == len(seen)
    assert 3 <= len(seen) <= 4  # the third, and what the other worker had in hand
    assert run_study(spec, tmp_path).counts["done"] == 20


@pytest.mark.slow
def test_a_worker_unlike_the_driver_is_refused(cluster: None, model: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    real = ray_runner.package_versions
    monkeypatch.setattr(ray_runner, "package_versions", lambda: real() | {"torch": "0.0.1"})  # of this process alone
    with pytest.raises(UserError, match=r"torch: 0\.0\.1 here, \d+\.\d+\S* there"):
        run_study(study(model), tmp_path, work=on_ray(workers=1))
    assert not (tmp_path / ROWS).exists()


def job(spec: StudySpec, folder: Path) -> Job:
    return Job(spec.model_dump(mode="json"), os.getcwd(), str(folder), torch.get_num_threads())


def test_a_worker_refuses_what_is_its_own_fault(model: Path, tmp_path: Path) -> None:
    """A worker without a cluster: it opens and computes as in one."""
    spec = study(model, arms=["stranger", "L4"])
    run_study(spec, tmp_path / "s")
    worker, [first, *_, last] = Worker(job(spec, tmp_path / "s")), trials_of(spec)
    assert worker.open().refused is None
    kept = rows(tmp_path / "s")
    manifest = tmp_path / "s" / "search-0" / MANIFEST
    for trial, needed in ((first, {}), (last, {str(manifest): ray_runner.sha256_file(manifest)})):
        row = worker.compute(trial.key, needed).values
        assert {name: value for name, value in row.items() if name != "wall_s"} == kept[trial.key]
    for path, digest in ((manifest, "0" * 64), (tmp_path / "elsewhere" / MANIFEST, "0" * 64)):
        refused = worker.compute(last.key, {str(path): digest}).refused
        assert refused is not None
        assert refused[0] == f"{path.parent} is not there, or is not the driver's"
    refused = Worker(job(study(tmp_path / "no-such-model"), tmp_path / "s")).open().refused
    assert refused is not None
    assert "no-such-model" in refused[0]


def test_without_ray_it_says_what_to_type(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text(json.dumps(study(model).model_dump()))
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    answer = runner(capsys, "study", "run")(tmp_path / "study.yaml", "--out", tmp_path / "s", "--engine", "ray")
    assert answer.code == 2
    assert answer.err == 'error: --engine ray needs Ray, which is not installed\n  pip install "undertow[ray]"\n'
    assert not (tmp_path / "s").exists()
    monkeypatch.undo()
    pytest.importorskip("ray")
    on_ray()


@pytest.mark.parametrize(("words", "environment", "said"), [
    (["--workers", "2"], "", "--workers is for the engine ray"),
    (["--address", "auto"], "", "--address is for the engine ray"),
    (["--engine", "ray", "--workers", "0"], "", "--workers"),
    (["--engine", "spark"], "", "spark"),
    (["--engine", "ray", "--address", "ray://10.0.0.1:10001"], "", "is not HOST:PORT"),
    (["--engine", "ray", "--address", "nonsense"], "", "is not HOST:PORT"),
    (["--engine", "ray", "--address", "127.0.0.1:9"], "", "no Ray cluster answers at 127.0.0.1:9"),
    (["--engine", "ray", "--address", "localhost:6379"], "outer", "Ray takes localhost for"),
    (["--engine", "ray"], "127.0.0.1:9", "no Ray cluster answers at 127.0.0.1:9"),
])
def test_bad_options_are_refused_before_anything_is_written(
        model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
        words: list[str], environment: str, said: str) -> None:
    monkeypatch.setenv("RAY_ADDRESS", environment)
    monkeypatch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1" if environment == "outer" else "0")
    (tmp_path / "study.yaml").write_text(json.dumps(study(model).model_dump()))
    answer = runner(capsys, "study", "run")(tmp_path / "study.yaml", "--out", tmp_path / "s", *words)
    assert answer.code == 2
    assert said in answer.err
    assert "Traceback" not in answer.err
    assert not (tmp_path / "s").exists()
