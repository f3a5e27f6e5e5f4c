"""The whole way by commands, on tiny folders of four architectures; and every bad input: one message, nothing written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from tests import tiny
from tests.cli.answers import Answer, Run, runner
from undertow.cli.main import main

SITE = "blocks.1.hook_resid_post"
SMALL = ["--site", SITE, "--width", "64", "--k", "4", "--tokens", "600", "--epochs", "2", "--batch-size", "64",
         "--eval-tokens", "200", "--ce-tokens", "200", "--context", "32", "--held-out", "0.15"]
FIGURES = {"path", "fvu", "l0", "dead_share", "ce_base", "ce_recon", "ce_mean_ablation", "ce_recovered", "tokens", "wall_s"}
ROOT = Path(__file__).parents[2]
GPT2_TOKENIZER = ROOT.parent / "shared" / "data" / "gpt2-tokenizer"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Subjects, a text, a trained SAE `sae`, and the cache that they share."""
    made = tmp_path_factory.mktemp("sae_cli")
    for architecture in tiny.ARCHITECTURES:
        tiny.save_subject(made / architecture, architecture)
    tiny.save_text(made / "text.jsonl")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("UNDERTOW_CACHE", str(made / "cache"))
        assert main(["sae", "train", "--model", str(made / "llama"), "--text", str(made / "text.jsonl"), *SMALL,
                     "--out", str(made / "sae")]) == 0
    return made


@pytest.fixture(autouse=True)
def cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERTOW_CACHE", str(folder / "cache"))
    return folder / "cache"


@pytest.fixture(params=[*tiny.ARCHITECTURES, "gpt2 with its own tokenizer"])
def model(request: pytest.FixtureRequest, folder: Path) -> Path:
    if request.param in tiny.ARCHITECTURES:
        return folder / request.param
    if not GPT2_TOKENIZER.is_dir():
        pytest.skip(f"GPT-2's tokenizer is not there: {GPT2_TOKENIZER}")
    tokenizer = AutoTokenizer.from_pretrained(GPT2_TOKENIZER)
    path = folder / "real-tokenizer"
    tiny.model("gpt2", len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_the_whole_way(model: Path, folder: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained = run("sae", "train", "--model", model, "--text", folder / "text.jsonl", *SMALL, "--seed", "1", "--out", out,
                  "--json")
    assert trained.code == 0, trained.err
    assert trained.json.keys() >= FIGURES
    assert trained.json["path"] == str(out)
    assert 0 < trained.json["fvu"] < 1
    assert 200 <= trained.json["tokens"] < 2000
    assert trained.json["train_tokens"] >= 600
    for word in ("tokens", "time", "memory", "disk"):  # said beforehand, and not on standard output, which --json owns
        assert word in trained.err
    assert len(trained.out.splitlines()) == 1

    judged = run("sae", "eval", out, "--json")
    assert judged.code == 0, judged.err
    assert judged.json.keys() >= FIGURES
    for name in FIGURES - {"path", "wall_s"}:
        assert judged.json[name] == pytest.approx(trained.json[name], rel=1e-4), name
    readable = run("sae", "eval", out)
    assert f"FVU {judged.json['fvu']:.4f}" in readable.out
    assert "mean ablation" in readable.out

    shown = run("features", "show", out, "3", "--random", "1", "--tokens", "200", "--json")
    assert shown.code == 0, shown.err
    assert shown.json["cards"][0]["latent"] == 3
    assert shown.json["cards"][0].keys() >= {"density", "maximum", "top", "uniform"}
    found = run("features", "search", out, "Ana came in from the rain.", "--json")
    assert found.code == 0, found.err
    assert found.json["features"]
    assert found.json["tokens"]

    said = run("subject", "generate", model, "The keeper", "Nobody", "--max-new-tokens", "8", "--seed", "2", "--json")
    assert said.code == 0, said.err
    assert [row["prompt"] for row in said.json["generations"]] == ["The keeper", "Nobody"]
    assert run("subject", "generate", model, "The keeper", "--max-new-tokens", "8", "--seed", "2", "--json"
               ).json["generations"][0]["text"] == said.json["generations"][0]["text"]


def test_import_and_batchtopk(folder: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    words = ("sae", "train", "--model", folder / "llama", "--text", folder / "text.jsonl", *SMALL)
    assert run(*words, "--architecture", "batchtopk", "--weights", "float16", "--out", out).code == 0
    assert json.loads((out / "cfg.json").read_text())["architecture"] == "jumprelu"
    (out / "manifest.json").unlink()  # now it is a folder as sae-lens writes them
    got = run("sae", "import", out, "--model", folder / "llama", "--site", SITE, "--out", tmp_path / "mine", "--json")
    assert got.code == 0, got.err
    assert got.json["hook_name"] == SITE
    assert got.json["d_sae"] == 64
    again = run("sae", "eval", tmp_path / "mine", "--json")
    assert again.code == 0, again.err
    assert again.json["fvu"] == pytest.approx(json.loads((out / "evaluation.json").read_text())["fvu"], rel=1e-4)


@pytest.mark.parametrize("options", [
    ["--architecture", "matryoshka", "--prefixes", "8,32"], ["--architecture", "jumprelu", "--bandwidth", "0.5"],
    ["--architecture", "gated", "--sparsity", "0.5"], ["--architecture", "standard", "--sparsity", "0.5"],
    ["--normalize", "layer_norm"], ["--site", "blocks.1.attn.hook_z"]], ids=lambda options: options[-1])
def test_architectures_norms_and_sites(options: list[str], folder: Path, run: Run, tmp_path: Path) -> None:
    """Trained, judged again with the same figures, and its card names the command that makes it again."""
    priced = "--sparsity" in options
    words = [word for i, word in enumerate(SMALL) if not (priced and (word == "--k" or SMALL[i - 1] == "--k"))]
    trained = run("sae", "train", "--model", folder / "llama", "--text", folder / "text.jsonl", *words, *options, "--out",
                  tmp_path / "run", "--json")
    assert trained.code == 0, trained.err
    judged = run("sae", "eval", tmp_path / "run", "--json")
    assert judged.code == 0, judged.err
    for name in ("fvu", "l0", "ce_recon", "dead_share"):
        assert judged.json[name] == pytest.approx(trained.json[name], rel=1e-4), name
    assert 0 < judged.json["fvu"] < 1.2
    card = (tmp_path / "run" / "card.md").read_text()
    assert " ".join(options) in card
    assert ("price of sparsity 0.5" if priced else "k = 4") in card


def test_a_grid_and_its_comparison(folder: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "grid"
    words = ["sae", "train", "--model", folder / "llama", "--text", folder / "text.jsonl", *SMALL, "--width", "64,96", "--k",
             "4,8", "--seeds", "2", "--epochs", "1", "--out", out]
    trained = run(*words, "--json")
    assert trained.code == 0, trained.err
    assert len(trained.json["runs"]) == 8
    assert "8 SAEs of" in trained.err and "one harvest" in trained.err  # the cost is said beforehand
    best = min(trained.json["runs"], key=lambda row: row["fvu"])
    assert best["k"] == 8
    assert_refused(run("sae", "resume", out), "is finished")
    assert_refused(run(*words), "exists and is not empty")

    page = tmp_path / "page.html"
    found = run("sae", "compare", out, folder / "sae", "--eval-tokens", "200", "--ce-tokens", "200", "--out", page, "--json")
    assert found.code == 0, found.err
    assert [line["name"] for line in found.json["saes"]] == [*(row["name"] for row in trained.json["runs"]), "sae"]
    first, row = found.json["saes"][0], trained.json["runs"][0]
    for name in ("fvu", "l0", "dead_share", "ce_recovered"):
        assert first[name] == pytest.approx(row[name], rel=1e-4)
    assert found.json["overlap"][0][0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert found.json["overlap"][0][1]["cosine"] < 1
    assert "<svg" in page.read_text()
    readable = run("sae", "compare", out / "w64-k4-s0", out / "w64-k4-s1", "--recorded")
    assert readable.code == 0, readable.err
    assert "w64-k4-s1" in readable.out and f"{row['fvu']:.4f}" in readable.out
    assert_refused(run("sae", "compare", folder / "sae"), "nothing to compare")
    assert_refused(run("sae", "compare", out, "--out", page), "page.html exists")
    assert_refused(run("sae", "compare", folder / "sae", tmp_path / "nothing"), "no SAE called")


def test_the_same_seed_gives_the_same_file(folder: Path, run: Run, tmp_path: Path) -> None:
    words = ("sae", "train", "--model", folder / "llama", "--text", folder / "text.jsonl", *SMALL)
    assert run(*words, "--out", tmp_path / "a").code == 0
    assert run(*words, "--out", tmp_path / "b", "--seed", "5").code == 0
    files = [(path / "sae_weights.safetensors").read_bytes() for path in (folder / "sae", tmp_path / "a", tmp_path / "b")]
    assert files[0] == files[1] != files[2]


# Bad input


class Bad(NamedTuple):
    """Options to change (None takes one away), and what the message has to hold."""

    options: dict[str, str | None]
    messages: tuple[str, ...]


def train_words(folder: Path, out: Path, options: dict[str, str | None]) -> list[str]:
    values: dict[str, str | None] = {"--model": str(folder / "llama"), "--text": str(folder / "text.jsonl"),
                                     **dict(zip(SMALL[::2], SMALL[1::2], strict=True)), **options, "--out": str(out)}
    return ["sae", "train", *(word for name, value in values.items() if value is not None for word in (name, value))]


def assert_refused(answer: Answer, *messages: str) -> None:
    """Exit 2 and one message with a hint: no traceback, and nothing on standard output that looks like a result."""
    assert answer.code == 2, answer
    assert "Traceback" not in answer.out + answer.err
    assert answer.err.count("error: ") == 1
    flat = " ".join(answer.err.split())
    for message in messages:
        assert message in flat, (message, answer.err)
    assert re.search(r"^error: \S.*", answer.err, re.MULTILINE)


def assert_nothing_at(out: Path) -> None:
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if out.name in path.name] == []


BAD = {
    "unknown model": Bad({"--model": "smolm2"}, ("unknown model 'smolm2'", "did you mean smollm2")),
    "missing folder": Bad({"--model": "./no/such/model"}, ("no such model folder: ./no/such/model",)),
    "unknown site": Bad({"--site": "blocks.1.hook_resid_pst"},
                        ("unknown site 'blocks.1.hook_resid_pst'", "did you mean blocks.1.hook_resid_post")),
    "layer out of range": Bad({"--site": "blocks.3.hook_resid_post"}, ("'blocks.3.hook_resid_post'", "layer from 0 to 2")),
    "unknown architecture": Bad({"--architecture": "topkk"}, ("learn.architecture = 'topkk'", "'topk', 'batchtopk'")),
    "a price where k decides": Bad({"--sparsity": "2"}, ("topk has no price of sparsity",)),
    "no price": Bad({"--architecture": "gated", "--k": None}, ("gated needs a price of sparsity", "--sparsity 1")),
    "prefixes of topk": Bad({"--prefixes": "8,16"}, ("prefixes are matryoshka's",)),
    "a width twice": Bad({"--width": "64,64"}, ("--width '64,64' names a value twice",)),
    "a grid with a bad run": Bad({"--width": "64,4"}, ("k = 4 must be below the width 4",)),
    "a grid with a bad site": Bad({"--site": f"{SITE},blocks.1.hook_mlp_ot"}, ("did you mean blocks.1.hook_mlp_out",)),
    "k as wide as the SAE": Bad({"--k": "64"}, ("k = 64 must be below the width 64",)),
    "not a number": Bad({"--width": "many"}, ("many", "undertow sae train --help")),
    "bad share": Bad({"--held-out": "0.9"}, ("held_out = 0.9", "less than 0.5")),
    "missing text": Bad({"--text": "./nowhere.jsonl"}, ("'./nowhere.jsonl'",)),
    "unknown weights": Bad({"--weights": "int4"}, ("weights = 'int4'", "float16")),
    "unknown wandb mode": Bad({"--wandb": "sometimes"}, ("sometimes", "disabled", "offline")),
    "unknown device": Bad({"--device": "abacus"}, ("'abacus'", "--device cpu")),
    "no text named": Bad({"--text": None}, ("--text",)),
    "unknown column": Bad({"--column": "txet"}, ("no column 'txet'", "id, text", "did you mean text?")),
    "longer batch than text": Bad({"--batch-size": "100000", "--tokens": "1000000"},
                                  ("fewer than one batch of 100000", "--batch-size")),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name: str, folder: Path, run: Run, tmp_path: Path) -> None:
    assert_refused(run(*train_words(folder, tmp_path / "out", BAD[name].options)), *BAD[name].messages)
    assert_nothing_at(tmp_path / "out")


TEXTS: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("bad.jsonl holds no text",)),
    "blank": (b'{"text": "  "}\n{"text": ""}\n', ("bad.jsonl holds no text (2 blank documents)", "--text")),
    "one document": (b'{"text": "Only this."}\n', ("1 different document(s)", "at least 2")),
    "short": (b'{"text": "The oil."}\n{"text": "The bread."}\n', ("fewer than one batch of 64", "give a longer text")),
    "not UTF-8": (b'{"text": "fine"}\n{"text": "caf\xe9"}\n', ("bad.jsonl is not UTF-8: byte 30 (line 2) is 0xe9", "iconv")),
    "not JSON": (b'{"text": "fine"}\nfine\n', ("bad.jsonl, line 2 is not JSON",)),
}


@pytest.mark.parametrize("name", TEXTS)
def test_bad_texts(name: str, folder: Path, run: Run, tmp_path: Path) -> None:
    data, messages = TEXTS[name]
    text = tmp_path / "bad.jsonl"
    text.write_bytes(data)
    assert_refused(run(*train_words(folder, tmp_path / "out", {"--text": str(text)})), *messages)
    assert_nothing_at(tmp_path / "out")


def test_a_model_of_unknown_architecture(folder: Path, run: Run, tmp_path: Path) -> None:
    martian = tmp_path / "martian"
    shutil.copytree(folder / "llama", martian)
    config = json.loads((martian / "config.json").read_text()) | {"model_type": "martian"}
    (martian / "config.json").write_text(json.dumps(config))
    assert_refused(run(*train_words(folder, tmp_path / "out", {"--model": str(martian)})), "model_type 'martian'",
                   str(martian), "needed: config.json")
    assert_nothing_at(tmp_path / "out")
    (martian / "config.json").unlink()
    assert_refused(run(*train_words(folder, tmp_path / "out", {"--model": str(martian)})), "it has no config.json")


def test_nan_activations(folder: Path, run: Run, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(folder / "llama", broken)
    weights = load_file(broken / "model.safetensors")
    token = AutoTokenizer.from_pretrained(broken).encode(" lamp", add_special_tokens=False)[0]
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    answer = run(*train_words(folder, tmp_path / "out", {"--model": str(broken)}))
    assert_refused(answer, f"activations at {SITE} are not finite", "the first in row 0, position ", "document '0-")
    assert_nothing_at(tmp_path / "out")


def test_a_changed_shard(folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder / "cache", tmp_path / "cache")
    monkeypatch.setenv("UNDERTOW_CACHE", str(tmp_path / "cache"))
    for shard in (tmp_path / "cache" / "activations").glob("*/acts-00000.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(bytes(data))
    refused = run(*train_words(folder, tmp_path / "out", {}))
    assert_refused(refused, "acts-00000.safetensors has changed since it was written", "the artifact is damaged: remove")
    assert_nothing_at(tmp_path / "out")
    assert_refused(run("sae", "eval", folder / "sae"), "acts-00000.safetensors has changed")


def test_an_existing_out(folder: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years")
    commands = [train_words(folder, out, {}), ["sae", "import", str(folder / "sae"), "--model", str(folder / "llama"), "--out",
                                               str(out)],
                ["subject", "generate", str(folder / "llama"), "Hello", "--out", str(out)],
                ["features", "show", str(folder / "sae"), "3", "--out", str(out)]]
    for words in commands:
        assert_refused(run(*words), f"{out} exists and is not empty", "choose another --out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "thesis.txt").read_text() == "ten years"


@pytest.fixture
def wide(folder: Path, tmp_path: Path) -> Path:
    """A Llama of twice the width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shutil.copytree(folder / "llama", tmp_path / "wide")
    config = json.loads((folder / "llama" / "config.json").read_text()) | {"hidden_size": 2 * tiny.D_MODEL, "head_dim": 16}
    config.pop("architectures")
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


def test_an_sae_that_does_not_fit(folder: Path, wide: Path, run: Run, tmp_path: Path) -> None:
    sae, out = folder / "sae", tmp_path / "out"
    assert_refused(run("sae", "eval", sae, "--model", wide), "the SAE reads activations of width 32", "has 64")
    assert_refused(run("sae", "eval", sae, "--site", "blocks.0.hook_resid_post"),
                   f"the SAE was trained at {SITE}, not at blocks.0.hook_resid_post", f"--site {SITE}")
    assert_refused(run("sae", "import", sae, "--model", wide, "--out", out), "width 32", "has 64")
    assert_refused(run("sae", "import", sae, "--model", folder / "llama", "--site", "blocks.0.hook_resid_post", "--out", out),
                   "not at blocks.0.hook_resid_post")
    assert_refused(run("sae", "import", sae, "--model", folder / "llama", "--site", "blocks.1.hook_resid_pst", "--out", out),
                   "unknown site 'blocks.1.hook_resid_pst'", "did you mean")
    assert_refused(run("sae", "import", sae, "--model", folder / "gpt2", "--out", out), "the subject is", "--same-model")
    assert_nothing_at(out)


@pytest.mark.parametrize("ours", [True, False], ids=["ours", "sae-lens'"])
def test_truncated_weights(ours: bool, folder: Path, run: Run, tmp_path: Path) -> None:
    sae = tmp_path / "sae"
    shutil.copytree(folder / "sae", sae)
    weights = sae / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    if not ours:
        (sae / "manifest.json").unlink()
    message = "sae_weights.safetensors has changed" if ours else "sae_weights.safetensors is truncated or damaged"
    out = tmp_path / "out"
    assert_refused(run("sae", "eval", sae), message)
    assert_refused(run("features", "show", sae, "1"), message)
    assert_refused(run("sae", "import", sae, "--model", folder / "llama", "--out", out), message)
    assert_nothing_at(out)


def test_eval_and_resume_of_nothing(folder: Path, run: Run, tmp_path: Path) -> None:
    assert_refused(run("sae", "eval", tmp_path / "nothing"), f"no SAE called '{tmp_path / 'nothing'}'", "give a folder")
    assert_refused(run("sae", "resume", tmp_path / "nothing"), "has never been started")
    assert_refused(run("sae", "resume", folder / "sae"), "is finished")
    assert_refused(run("sae", "eval", folder / "sae", "--text", "./nowhere.txt"), "./nowhere.txt")
    assert_refused(run("sae", "eval", folder / "sae", "--model", "smolm2"), "unknown model 'smolm2'")


def test_json_also_of_a_refusal(folder: Path, run: Run, tmp_path: Path) -> None:
    answer = run(*train_words(folder, tmp_path / "out", {"--site": "blocks.9"}), "--json")
    assert_refused(answer, "unknown site 'blocks.9'")
    assert "unknown site 'blocks.9'" in answer.json["error"]


# Stopping


SLOW = """
import sys, time
from sae.training import Trainer
from undertow.cli.main import main

real = Trainer.step
Trainer.step = lambda self, batch: (time.sleep(0.02), real(self, batch))[1]
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def started(folder: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A training in a process of its own, slowed so that it lasts for twelve seconds and cannot be over too soon."""
    words = train_words(folder, tmp_path / "out", {"--epochs": "40"})
    process = subprocess.Popen([sys.executable, "-c", SLOW, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
    yield process
    process.kill()
    process.communicate()


def wait_for_steps(log: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(process.communicate())
        if log.exists() and log.read_text().count('"event": "step"') >= 3:
            return
        time.sleep(0.02)
    raise AssertionError("no training step within two minutes")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0),
                                              pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)])
def test_a_stopped_training_goes_on(number: signal.Signals, code: int, started: subprocess.Popen[str], folder: Path, run: Run,
                                    tmp_path: Path) -> None:
    out, work = tmp_path / "out", tmp_path / "out.partial"
    wait_for_steps(work / "log.jsonl", started)
    started.send_signal(number)
    stdout, stderr = started.communicate(timeout=60)
    assert started.returncode == code, stderr
    assert f"Go on with: undertow sae resume {out}" in stdout
    assert "Traceback" not in stderr
    assert not out.exists()
    assert (work / "checkpoint.safetensors").is_file()
    assert_refused(run(*train_words(folder, out, {})), "holds an unfinished run", f"undertow sae resume {out}")
    if number == signal.SIGINT:
        return
    resumed = run("sae", "resume", out, "--json")
    assert resumed.code == 0, resumed.err
    assert resumed.json.keys() >= FIGURES
    assert not work.exists()
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    starts = [line for line in steps if line["event"] == "start"]
    assert [start["done"] > 0 for start in starts] == [False, True]
    assert run("sae", "eval", out).code == 0


def test_help_names_the_options(run: Run) -> None:
    answer = run("sae", "train", "--help")
    assert answer.code == 0
    for option in ("--model", "--site", "--text", "--width", "--seed", "--out", "--json"):
        assert option in answer.out
