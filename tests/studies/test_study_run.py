"""The queue: one row a trial whatever happens to the process, failures as rows, and the same figures in the end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests import tiny, tiny_keeper
from tests.cli.answers import runner
from undertow.core.errors import ArtifactError, NumericsError, SubjectError
from undertow.studies import engine
from undertow.studies.engine import LOCK, Watch, run_study
from undertow.studies.ledger import ROWS, STUDY, open_ledger
from undertow.studies.spec import StudySpec
from undertow.studies.trials import trials_of
from undertow.subjects.sharing import Below

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"stories": 10, "few": 5, "sampled": 10, "texts": 8, "ordinary": 8, "chunk": 5}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_keeper.save_random(tmp_path_factory.mktemp("models") / "tiny")


def study(model: Path, **changes: Any) -> StudySpec:
    return StudySpec.checked({"name": "small", "model": str(model), "arms": ["stranger", "giver", "keeper", "L2"],
                              "measures": ["choice"], "size": SMALL} | changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]


def values(folder: Path) -> dict[str, Any]:
    """What was measured, without what differs from run to run."""
    return {row["id"]: (row["arm"], row["status"], row["values"], row["arm_digest"]) for row in lines(folder)}


def test_every_trial_is_one_row_and_is_done_once(model: Path, tmp_path: Path) -> None:
    spec = study(model)
    result = run_study(spec, tmp_path / "s")
    assert result.counts == {"done": 8, "failed": 0, "absent": 0, "left": 0}
    assert [row["id"] for row in lines(tmp_path / "s")] == [trial.key for trial in trials_of(spec)]
    before = (tmp_path / "s" / ROWS).read_bytes()
    assert run_study(spec, tmp_path / "s").counts["done"] == 8
    assert (tmp_path / "s" / ROWS).read_bytes() == before
    row = lines(tmp_path / "s")[0]
    assert {"id", "arm", "measure", "seed", "first", "stop", "status", "git", "subject", "arm_digest", "cost", "wall_s",
            "values"} == row.keys()
    assert row["values"]["story"] == [0, 1, 2, 3, 4]
    assert row["values"]["cost"] == [0, 1, 2, 3, 4]


def test_chunks_do_not_change_what_is_measured(model: Path, tmp_path: Path) -> None:
    run_study(study(model), tmp_path / "five")
    run_study(study(model, size=SMALL | {"chunk": 3}), tmp_path / "three")

    def by_story(folder: Path) -> dict[tuple[str, int], float]:
        return {(row["arm"], story): d for row in lines(folder)
                for story, d in zip(row["values"]["story"], row["values"]["D"], strict=True)}

    first, second = by_story(tmp_path / "five"), by_story(tmp_path / "three")
    assert first.keys() == second.keys()
    assert list(first.values()) == pytest.approx([second[key] for key in first], abs=1e-3)


def test_arms_share_what_lies_below_the_site(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, made = study(model, arms=["stranger", "L1", "L2"], measures=["choice", "sameness"]), []

    def kept(*args: Any) -> Below:
        made.append(Below(*args))
        return made[-1]

    monkeypatch.setattr(engine, "Below", kept)
    run_study(spec, tmp_path / "shared")
    assert len(made) == 1
    assert made[0].hits > 0
    monkeypatch.setattr(Below, "shared", lambda _self: contextlib.nullcontext())
    run_study(spec, tmp_path / "apart")
    assert values(tmp_path / "shared") == values(tmp_path / "apart")


def test_all_measures_of_prompt_arms(model: Path, tmp_path: Path) -> None:
    measures = ["choice", "twin", "sameness", "sample", "naming"]  # hazard of a random model takes minutes: see the slow tests
    run_study(study(model, arms=["stranger", "bonded", "L1"], measures=measures), tmp_path / "s")
    rows = lines(tmp_path / "s")
    assert {row["status"] for row in rows} == {"done"}
    assert {row["measure"] for row in rows if row["arm"] == "L1"} == set(measures)
    assert {row["measure"] for row in rows if row["arm"] == "bonded"} == {"choice", "sample", "naming"}
    same = next(row for row in rows if row["measure"] == "sameness")["values"]
    assert same["change"] > 0
    assert min(min(text) for text in same["kl"]) >= 0
    names = next(row for row in rows if row["measure"] == "naming")["values"]
    assert all(sum(probs) == pytest.approx(1) for probs in names["probs"])


def test_killed_in_the_middle_it_ends_the_same(model: Path, tmp_path: Path) -> None:
    """A real process, killed with SIGKILL between two rows, and one whose last line is torn."""
    (tmp_path / "study.yaml").write_text(json.dumps(study(model, size=SMALL | {"chunk": 1}).model_dump()))
    command = [sys.executable, "-m", "undertow", "study", "run", str(tmp_path / "study.yaml"), "--out",
               str(tmp_path / "killed")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env=os.environ | {"HF_HUB_OFFLINE": "1"})
    path = tmp_path / "killed" / ROWS
    deadline = time.monotonic() + 600
    while not (path.is_file() and path.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = path.read_bytes().count(b"\n")
    spec = study(model, size=SMALL | {"chunk": 1})
    assert 3 <= done < len(trials_of(spec))
    path.write_bytes(path.read_bytes().rstrip(b"\n")[:-20])  # as if it had been killed in the middle of a line
    assert run_study(spec, tmp_path / "killed").counts == {"done": 40, "failed": 0, "absent": 0, "left": 0}
    assert max(Counter(row["id"] for row in lines(tmp_path / "killed")).values()) == 1
    run_study(spec, tmp_path / "whole")
    assert values(tmp_path / "killed") == values(tmp_path / "whole")


def test_a_stop_leaves_the_rest_for_later(model: Path, tmp_path: Path) -> None:
    spec, seen = study(model), []
    result = run_study(spec, tmp_path / "s", Watch(row=seen.append, should_stop=lambda: len(seen) >= 3))
    assert (result.stopped, result.counts["done"], result.counts["left"]) == (True, 3, 5)
    assert run_study(spec, tmp_path / "s").counts["done"] == 8


def test_a_stop_during_a_training_is_heeded_at_once(model: Path, tmp_path: Path) -> None:
    """No row says that the trial failed, and no adapter is left; what is done later is what an unbroken run does."""
    spec, steps = study(model, arms=["stranger", "L3"]), [0]

    def count(phase: str, done: int, total: int) -> None:
        steps[0] += phase == "train L3"

    result = run_study(spec, tmp_path / "s", Watch(progress=count, should_stop=lambda: steps[0] >= 2))
    assert result.stopped and steps[0] == 2
    assert {row["arm"] for row in lines(tmp_path / "s")} == {"stranger"}
    assert not list((tmp_path / "s").glob("adapter-*"))
    assert run_study(spec, tmp_path / "s").counts["failed"] == 0


def test_a_failed_trial_is_a_row_and_can_be_tried_again(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = engine.choice

    def broken(condition: Any, teller: Any, stories: Any) -> dict[str, Any]:
        if condition.arm == "giver":
            raise NumericsError("the logits are NaN")
        if condition.arm == "keeper":
            return real(condition, teller, stories) | {"D": [float("nan")] * len(stories)}
        if condition.arm == "L2":
            raise ZeroDivisionError("a bug")
        return real(condition, teller, stories)

    monkeypatch.setattr(engine, "choice", broken)
    spec = study(model)
    assert run_study(spec, tmp_path / "s").counts == {"done": 2, "failed": 6, "absent": 0, "left": 0}
    errors = {row["arm"]: row["error"] for row in lines(tmp_path / "s") if row["status"] == "failed"}
    assert errors["giver"] == {"type": "NumericsError", "what": "the logits are NaN"}
    assert errors["keeper"]["type"] == "NumericsError"
    assert errors["L2"] == {"type": "ZeroDivisionError", "what": "a bug"}
    monkeypatch.undo()
    assert run_study(spec, tmp_path / "s").counts["failed"] == 6  # not by itself
    assert run_study(spec, tmp_path / "s", retry_failed=True).counts == {"done": 8, "failed": 0, "absent": 0, "left": 0}
    assert len(open_ledger(tmp_path / "s").rows) == 8


def test_a_model_that_cannot_read_the_stories_fails_in_rows(tmp_path: Path) -> None:
    tokens = tiny_keeper.tokenizer()
    tiny.model("gpt2", len(tokens), positions=16).save_pretrained(tmp_path / "short")
    tokens.save_pretrained(tmp_path / "short")
    result = run_study(study(tmp_path / "short"), tmp_path / "s")
    assert result.counts == {"done": 0, "failed": 8, "absent": 0, "left": 0}
    assert all(row["error"]["what"] for row in lines(tmp_path / "s"))


def test_two_runs_do_not_share_a_folder(model: Path, tmp_path: Path) -> None:
    spec = study(model)
    open_ledger(tmp_path, spec)
    with (tmp_path / LOCK).open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(ArtifactError, match="another run is at work"):
            run_study(spec, tmp_path)
    assert run_study(spec, tmp_path).counts["done"] == 8


def test_rows_of_other_weights_are_refused(model: Path, tmp_path: Path) -> None:
    spec = study(model)
    run_study(spec, tmp_path)
    kept = [json.dumps(row | {"subject": "feedfeedfeedfeed"}) for row in lines(tmp_path)[:2]]
    (tmp_path / ROWS).write_text("\n".join(kept) + "\n")
    with pytest.raises(ArtifactError, match="rows of the weights feedfeedfeedfeed"):
        run_study(spec, tmp_path)


def test_bad_input_is_refused_before_any_trial(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SubjectError):
        run_study(study(tmp_path / "no-such-model"), tmp_path / "a")
    run = runner(capsys, "study", "run")
    (tmp_path / "study.yaml").write_text(json.dumps(study(model).model_dump()))
    run_study(study(model), tmp_path / "b")
    answer = run(tmp_path / "study.yaml", "--out", tmp_path / "b", "--set", "thresholds.kl_p99=0.5")
    assert answer.code == 2
    assert "spec.thresholds.kl_p99: 0.1 -> 0.5" in answer.err
    assert "Traceback" not in answer.err
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("mine")
    assert run(tmp_path / "study.yaml", "--out", tmp_path / "c").code == 2
    assert not (tmp_path / "c" / STUDY).exists()
    assert run("laddder").code == 2


def test_the_command_runs_and_reports(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.yaml").write_text(json.dumps(study(model).model_dump()))
    run = runner(capsys, "study")
    answer = run("run", tmp_path / "study.yaml", "--out", tmp_path / "s", "--json")
    assert answer.code == 0
    assert answer.json["done"] == 8
    answer = run("report", tmp_path / "s", "--json")
    assert set(answer.json["outcomes"]) == {"competence"}
    assert answer.json["arms"]["stranger"]["n"] == 10
    shown = run("report", tmp_path / "s")
    assert "D falls with cost" in shown.out
    assert (tmp_path / "s" / "report" / "report.html").is_file()
    assert run("report", tmp_path / "none").code == 2
