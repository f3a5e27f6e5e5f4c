"""`undertow subject train` and `card` by commands on tiny organisms; and every bad input: one message, nothing written."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from tests import tiny_keeper
from tests.cli.answers import Run, runner
from undertow.core.storage import open_artifact
from undertow.subjects import catalog
from undertow.subjects.organisms import packaged, pretrain_run, recipes
from undertow.subjects.organisms.pretraining import PretrainSpec
from undertow.subjects.organisms.tokenizer import train_tokenizer

TINY = {"d_model": 8, "n_layers": 1, "n_heads": 2, "d_mlp": 8, "vocab": 300, "batch": 2}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "subject")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder in place of the installed one, with nothing in it."""
    folder = tmp_path / "data"
    folder.mkdir()
    for module in (catalog, packaged, recipes):
        monkeypatch.setattr(module, "packaged_folder", lambda name: folder / name)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Organisms are trained tiny, and judged on a handful of stories."""
    monkeypatch.setattr(recipes, "PRETRAIN", {name: {**values, **TINY, "steps": 3}
                                              for name, values in recipes.PRETRAIN.items()})
    monkeypatch.setattr(pretrain_run, "HELD_OUT_STORIES", 4)
    monkeypatch.setattr(pretrain_run, "train_tokenizer",
                        lambda world, seed, vocab, stories=0: train_tokenizer(world, seed, vocab, 40))


def test_list_shows_what_is_packaged(run: Run, package: Path, undertow_cache: Path) -> None:
    tiny_keeper.save_organism(package / "hearth")
    rows = {row["name"]: row for row in run("list", "--json").json["subjects"]}
    assert set(rows) == {"smollm2", "hearth", "parrot", "hearth-smollm2"}
    assert (rows["hearth"]["fetched"], rows["hearth"]["licence"], rows["hearth"]["kind"]) == (True, "MIT", "packaged")
    assert rows["hearth"]["megabytes"] > 0 and not rows["parrot"]["fetched"]
    assert (rows["hearth-smollm2"]["kind"], rows["hearth-smollm2"]["base"]) == ("adapter", "smollm2")
    text = run("list").out
    assert "subject train parrot" in text and "subject fetch smollm2" in text


def test_train_then_card(run: Run, package: Path, small: None, tmp_path: Path) -> None:
    assert run("train", "hearth", "--out", package / "hearth").code == 0
    out = tmp_path / "runs" / "mine"
    reply = run("train", "parrot", "--out", out, "--seed", "3", "--json")
    assert reply.code == 0 and "3 steps" in reply.err and "about" in reply.err
    assert (reply.json["steps"], reply.json["seed"]) == (3, 3) and reply.json["excess"] > 0
    record = open_artifact(out, "organism").record
    assert record["spec"]["name"] == "parrot" and record["start"] != ""  # a parrot begins with hearth's weights

    card = tmp_path / "card"
    reply = run("card", out, "--stories", "20", "--out", card)
    assert reply.code == 0 and "not met" in reply.out and "word_effect" in reply.out
    gates = json.loads((card / "gates.json").read_text())["gates"]
    assert {"bond_effect", "word_effect", "parse", "held_out_loss"} <= set(gates)
    assert all({"value", "low", "high", "target", "met"} <= set(gate) for gate in gates.values())
    assert gates["word_effect"]["met"] is False
    assert f"undertow subject card {out} --stories 20 --seed 0 --out {card}" in (card / "card.md").read_text()


def test_a_parrot_without_hearth_says_what_to_type(run: Run, package: Path, tmp_path: Path) -> None:
    reply = run("train", "parrot", "--out", tmp_path / "mine")
    assert reply.code == 2 and "begins with the weights of hearth" in reply.err and "--start runs/hearth" in reply.err
    assert not (tmp_path / "mine.partial").exists()


def test_a_plain_model_gets_the_competence_gate(run: Run, tmp_path: Path) -> None:
    folder = tiny_keeper.save_random(tmp_path / "model")
    reply = run("card", folder, "--stories", "24")
    assert reply.code == 0 and "competent: no" in reply.out
    told = run("card", folder, "--minutes", "0.004", "--json").json
    assert told["stories"] >= 20 and told["figures"]["competent"] is False
    assert set(told["gates"]["giver_raises_D"]) >= {"value", "low", "high", "target", "met"}


def test_an_interrupted_training_goes_on(run: Run, package: Path, small: None, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "mine"

    def interrupt() -> None:
        deadline = time.monotonic() + 120
        while not (out.with_name("mine.partial") / "log.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    stopped = run("train", "hearth", "--out", out, "--steps", "4000", "--json")
    thread.join()
    assert stopped.code == 0 and stopped.json["resume"] == f"undertow subject train hearth --out {out}"
    assert not out.exists()

    for words, value in ((("--steps", "5"), "4000"), (("--seed", "9"), "seed 0")):
        reply = run("train", "hearth", "--out", out, *words)
        assert reply.code == 2 and value in reply.err and "go on with it" in reply.err
    assert "unfinished run of hearth" in run("train", "parrot", "--out", out).err
    file = out.with_name("mine.partial") / "run.json"
    spec = recipes.settings("hearth", out, None, None, resume=True)
    assert isinstance(spec, PretrainSpec) and (spec.steps, spec.d_model) == (4000, 8)
    file.write_text("{")
    reply = run("train", "hearth", "--out", out)
    assert reply.code == 2 and "run.json cannot be read" in reply.err


def test_training_repeats_the_packaged_organism(package: Path, tmp_path: Path) -> None:
    folder = tiny_keeper.save_organism(package / "hearth")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["record"]["spec"] = {"name": "hearth", "seed": 5, "steps": 77, "lr": 0.001}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    spec = recipes.settings("hearth", tmp_path / "x", None, None)
    assert isinstance(spec, PretrainSpec) and (spec.seed, spec.steps, spec.lr) == (5, 77, 0.001)
    other = recipes.settings("hearth", tmp_path / "x", 6, None)
    assert (other.seed, other.steps) == (6, 77)


@pytest.mark.parametrize(("words", "told"), [
    (("train", "heart"), ("unknown organism 'heart'", "did you mean hearth")),
    (("train", "smollm2"), ("unknown organism 'smollm2'", "hearth-smollm2")),
    (("train", "hearth", "--resume", "--out", "OUT"), ("nothing to resume", "undertow subject train hearth --out")),
    (("train", "hearth", "--steps", "5", "--minutes", "1", "--out", "OUT"), ("exclude each other",)),
    (("train", "hearth", "--minutes", "-1", "--out", "OUT"), ("leaves no time",)),
    (("train", "hearth", "--steps", "0", "--out", "OUT"), ("steps = 0",)),
    (("train", "hearth-smollm2", "--out", "OUT"), ("undertow subject fetch smollm2",)),
    (("card", "parot"), ("did you mean parrot",)),
    (("card", "hearth"), ("undertow subject train hearth",)),
    (("card", "MODEL", "--stories", "3"), ("stories = 3",)),
    (("card", "MODEL", "--stories", "30", "--minutes", "1"), ("exclude each other",)),
])
def test_bad_input(run: Run, package: Path, undertow_cache: Path, tmp_path: Path, words: tuple[str, ...],
                   told: tuple[str, ...]) -> None:
    if "MODEL" in words:
        tiny_keeper.save_random(tmp_path / "model")
    places = {"OUT": str(tmp_path / "runs" / "x"), "MODEL": str(tmp_path / "model")}
    reply = run(*(places.get(word, word) for word in words))
    assert reply.code == 2 and "Traceback" not in reply.err
    assert all(part in reply.err for part in told), reply.err
    assert not (tmp_path / "runs").exists()
