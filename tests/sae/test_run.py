"""A whole run on a tiny subject: what it leaves, what a stop leaves, and that going on gives the same bits."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, final

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae import run as running
from sae.card import command_of
from sae.evaluation import evaluate
from sae.formats import load
from sae.harvesting import Source
from sae.plan import Inputs, make_plan, open_inputs
from sae.run import CHECKPOINT, LOG, SPEC_FILE, Interrupted, Result, Watch, claim, partial_folder, run, tidy, unfinished
from sae.sinks import JsonlSink
from sae.spec import RunSpec
from tests import tiny
from undertow.core.errors import ArtifactError, NumericsError, SpecError, TextError
from undertow.core.storage import MANIFEST, open_artifact
from undertow.subjects import Subject, load_subject

SITE = "blocks.1.hook_resid_post"
FIGURES = {"fvu", "l0", "dead_share", "ce_base", "ce_recon", "ce_mean_ablation", "ce_recovered", "tokens", "wall_s"}


@final
class Quiet:
    """A sink that takes everything and counts the steps."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.calls: list[str] = []

    def start(self, total: int, description: str, config: Mapping[str, Any], done: int = 0) -> None:
        self.calls.append(f"start {done} of {total}")

    def event(self, step: int, values: Mapping[str, float]) -> None:
        self.steps.append(step)

    def histogram(self, name: str, values: Tensor) -> None:
        self.calls.append("histogram")

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.calls.append("finish")

    def artifact(self, folder: Path) -> None:
        self.calls.append(f"artifact {folder.name}")

    def close(self) -> None:
        self.calls.append("close")


def spec_of(folder: Path, **changes: Any) -> RunSpec:
    values: dict[str, Any] = {
        "model": str(folder / "llama"), "site": SITE, "tokens": 1500, "eval_tokens": 300, "ce_tokens": 128, "seed": 3,
        "text": {"source": str(folder / "text.jsonl"), "context": 32, "held_out": 0.1},
        "learn": {"width": 64, "k": 4, "epochs": 2.0, "batch_size": 64}}
    learn = changes.pop("learn", {})
    return RunSpec.checked({**values, **changes, "learn": {**values["learn"], **learn}}, "test")


def never() -> bool:
    return False


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody reads."""


def carry_out(spec: RunSpec, inputs: Inputs, out: Path, cache: Path, stop: Callable[[], bool] = never) -> Result:
    return run(spec, inputs, out, cache, Watch(silent, Quiet(), stop))


@pytest.fixture(scope="module")
def finished(folder: Path, subject: Subject) -> Result:
    spec = spec_of(folder)
    out = folder / "out"
    work = claim(out, spec)
    sink = JsonlSink(work / LOG)
    result = run(spec, open_inputs(spec, subject), out, folder / "cache", Watch(silent, sink, never))
    sink.close()
    return result


class StopAfter:
    """Asks for a stop at the n-th time of asking."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self) -> bool:
        self.left -= 1
        return self.left <= 0


def test_the_folder(finished: Result, folder: Path) -> None:
    assert {path.name for path in finished.path.iterdir()} == {
        "card.md", "cfg.json", "evaluation.json", "log.jsonl", "manifest.json", "sae_weights.safetensors",
        "sparsity.safetensors"}
    assert not partial_folder(finished.path).exists()
    figures = json.loads((finished.path / "evaluation.json").read_text())
    assert figures.keys() >= FIGURES - {"path"}
    assert figures == {k: v for k, v in finished.summary.items() if k != "path"}
    assert finished.summary["path"] == str(finished.path)
    assert 0 < figures["fvu"] < 1
    assert 0 < figures["l0"] <= 4
    assert figures["steps"] == int(figures["train_tokens"] * 2) // 64
    record = open_artifact(finished.path, "sae").record
    assert record["spec"] == spec_of(folder).model_dump(mode="json")
    assert record["seed"] == 3
    assert record["figures"] == figures
    assert record["versions"]["torch"]
    events = [json.loads(line) for line in (finished.path / "log.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events[:2]] == ["start", "step"]
    assert [event["event"] for event in events[-2:]] == ["histogram", "finish"]
    assert events[-1]["summary"]["fvu"] == figures["fvu"]


def test_it_opens_in_ours_and_in_sae_lens(finished: Result, subject: Subject) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    ours, theirs = load(finished.path), sae_lens.SAE.load_from_disk(finished.path)
    x = torch.randn(50, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)) * 3
    with torch.no_grad():
        f = theirs.encode(x)
        assert torch.equal(ours.encode(x), f)
        assert torch.equal(ours.decode(f), theirs.decode(f))
        assert torch.equal(finished.dictionary.encode(x), f)
    assert (f > 0).any()
    assert theirs.cfg.metadata.hook_name == SITE
    assert theirs.cfg.metadata.model_name == subject.name
    assert ours.provenance.extra["subject_digest"] == subject.digest
    sparsity = load_file(finished.path / "sparsity.safetensors")["sparsity"]
    torch.testing.assert_close(10**sparsity, finished.evaluation.reconstruction.density.clamp(min=1e-10))


def test_figures_are_those_of_the_file(finished: Result, folder: Path, subject: Subject) -> None:
    spec = spec_of(folder)
    inputs = open_inputs(spec, subject)
    again = evaluate(load(finished.path), Source(subject, inputs.site, inputs.held_out), (300, 128), folder / "cache")
    assert again.summary() | {"wall_s": 0} == finished.evaluation.summary() | {"wall_s": 0}


def test_the_card(finished: Result, folder: Path) -> None:
    card = (finished.path / "card.md").read_text()
    command = command_of(spec_of(folder), "DIR")
    assert command == (
        f"undertow sae train --model {folder / 'llama'} --site {SITE} --width 64 --k 4 --text {folder / 'text.jsonl'} "
        "--tokens 1500 --context 32 --held-out 0.1 --epochs 2 --batch-size 64 --eval-tokens 300 --ce-tokens 128 --seed 3 "
        "--out DIR")
    assert f"    {command}\n" in card
    assert f"| FVU (mean-centred) | {finished.summary['fvu']:.4f} |" in card
    assert "Seed 3." in card


def test_a_command_that_a_shell_reads_back(folder: Path) -> None:
    spec = spec_of(folder, model="my models/llama", learn={"lr": 0.000123456789, "aux_coefficient": 0.0, "width": 64})
    words = shlex.split(command_of(spec, "my runs/out"))
    options = dict(zip(words[3::2], words[4::2], strict=True))
    assert options["--model"] == "my models/llama"
    assert float(options["--lr"]) == 0.000123456789
    assert options["--aux-coefficient"] == "0"
    assert options["--out"] == "my runs/out"


def test_half_precision_is_judged_as_saved(folder: Path, subject: Subject) -> None:
    spec = spec_of(folder, weights="float16", learn={"architecture": "batchtopk"})
    claim(folder / "half", spec)
    result = carry_out(spec, open_inputs(spec, subject), folder / "half", folder / "cache")
    stored = load_file(folder / "half" / "sae_weights.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    opened = load(folder / "half")
    assert opened.architecture == "jumprelu"
    assert torch.equal(result.dictionary.W_dec, opened.W_dec)
    x = torch.randn(20, tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    assert torch.equal(result.dictionary.encode(x), opened.encode(x))


@pytest.mark.parametrize("steps", [1, 17])
@pytest.mark.parametrize("architecture", ["topk", "batchtopk"])
def test_stop_and_resume_give_the_same_bits(steps: int, architecture: str, folder: Path, subject: Subject,
                                            tmp_path: Path) -> None:
    spec = spec_of(folder, learn={"architecture": architecture})
    inputs = open_inputs(spec, subject)
    cache = folder / "cache"
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    claim(straight, spec)
    carry_out(spec, inputs, straight, cache)  # from here on the activations are cached, so that only steps ask for a stop

    claim(stopped, spec)
    with pytest.raises(Interrupted) as caught:
        carry_out(spec, inputs, stopped, cache, StopAfter(steps))
    assert caught.value.folder == partial_folder(stopped)
    assert not stopped.exists()
    assert {path.name for path in partial_folder(stopped).iterdir()} == {SPEC_FILE, CHECKPOINT}
    with pytest.raises(ArtifactError, match="holds an unfinished run") as refused:
        claim(stopped, spec)
    assert f"undertow sae resume {stopped}" in refused.value.hint

    again = unfinished(stopped)
    assert again == spec
    sink = Quiet()
    run(again, open_inputs(again, subject), stopped, cache, Watch(silent, sink, never))
    total = json.loads((stopped / "evaluation.json").read_text())["steps"]
    assert sink.calls[0] == f"start {steps} of {total}"
    assert sink.calls[-1] == "artifact stopped"
    assert not partial_folder(stopped).exists()
    one, two = (load_file(out / "sae_weights.safetensors") for out in (straight, stopped))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = spec_of(folder, seed=4, learn={"architecture": architecture})  # negative control: the seed does matter
    claim(tmp_path / "other", other)
    carry_out(other, inputs, tmp_path / "other", cache)
    assert not torch.equal(load_file(tmp_path / "other" / "sae_weights.safetensors")["W_dec"], one["W_dec"])


def test_a_stop_while_harvesting(folder: Path, subject: Subject, tmp_path: Path) -> None:
    spec = spec_of(folder)
    inputs = open_inputs(spec, subject)
    claim(tmp_path / "out", spec)
    with pytest.raises(Interrupted):
        carry_out(spec, inputs, tmp_path / "out", tmp_path / "cache", StopAfter(1))
    assert [path.name for path in partial_folder(tmp_path / "out").iterdir()] == [SPEC_FILE]
    assert carry_out(unfinished(tmp_path / "out"), inputs, tmp_path / "out", tmp_path / "cache").path.is_dir()


def test_a_stop_while_judging(folder: Path, subject: Subject, tmp_path: Path) -> None:
    spec = spec_of(folder, eval_tokens=310)  # a held-out store that no other test has made
    inputs = open_inputs(spec, subject)
    claim(tmp_path / "out", spec)
    asked: list[str] = []

    def watch(phase: str, done: int, total: int) -> None:
        asked.append(phase)

    with pytest.raises(Interrupted):
        run(spec, inputs, tmp_path / "out", folder / "cache", Watch(watch, Quiet(), lambda: "judge" in asked))
    assert (partial_folder(tmp_path / "out") / CHECKPOINT).is_file()
    sink = Quiet()
    run(spec, inputs, tmp_path / "out", folder / "cache", Watch(silent, sink, never))
    assert sink.steps == []  # it was trained already


def test_checkpoints_by_the_clock(folder: Path, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed goes on from its last checkpoint, with the same result."""
    monkeypatch.setattr(running, "CHECKPOINT_EVERY_S", 0.0)
    spec = spec_of(folder)
    inputs = open_inputs(spec, subject)
    claim(tmp_path / "out", spec)
    left = iter(range(8))

    def killed() -> bool:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        carry_out(spec, inputs, tmp_path / "out", folder / "cache", killed)
    result = carry_out(spec, inputs, tmp_path / "out", folder / "cache")
    assert torch.equal(result.dictionary.W_dec, load(folder / "out").W_dec)


def test_nan_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    broken = load_subject(str(folder / "llama"), device="cpu")
    token = broken.encode(" lamp")[1]
    broken.hf_model.get_input_embeddings().weight.data[token] = float("nan")
    spec = spec_of(folder)
    claim(tmp_path / "out", spec)
    with pytest.raises(NumericsError, match="are not finite, the first in row 0"):
        carry_out(spec, open_inputs(spec, broken), tmp_path / "out", tmp_path / "cache")
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_an_existing_folder_is_refused_and_untouched(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years")
    with pytest.raises(ArtifactError, match="exists and is not empty") as caught:
        claim(out, spec_of(folder))
    assert "choose another --out" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "thesis.txt").read_text() == "ten years"
    (out / "thesis.txt").unlink()
    claim(out, spec_of(folder))  # an empty one is taken


def test_what_a_kill_at_the_very_end_leaves_is_removed(folder: Path, subject: Subject, tmp_path: Path) -> None:
    """The SAE is there and so is the folder of the run under way: a run that is not finished keeps its own."""
    out = tmp_path / "done"
    (out.with_name("done.partial")).mkdir()
    assert not tidy(out) and out.with_name("done.partial").exists()
    out.mkdir()
    (out / MANIFEST).write_text("{}")
    with pytest.raises(ArtifactError, match="is finished"):
        unfinished(out)
    assert not out.with_name("done.partial").exists() and (out / MANIFEST).exists()


def test_nothing_to_resume(finished: Result, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="has never been started"):
        unfinished(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="is finished"):
        unfinished(finished.path)


def test_a_checkpoint_of_another_run(folder: Path, subject: Subject, tmp_path: Path) -> None:
    spec = spec_of(folder)
    claim(tmp_path / "out", spec)
    with pytest.raises(Interrupted):
        carry_out(spec, open_inputs(spec, subject), tmp_path / "out", folder / "cache", StopAfter(40))
    other = spec_of(folder, learn={"k": 5})
    with pytest.raises(ArtifactError, match="belongs to another run"):
        carry_out(other, open_inputs(other, subject), tmp_path / "out", folder / "cache")
    assert (partial_folder(tmp_path / "out") / CHECKPOINT).is_file()  # what was trained is not thrown away


def test_too_short_a_text(folder: Path, subject: Subject, tmp_path: Path) -> None:
    text = tiny.save_text(tmp_path / "short.jsonl")
    text.write_text("".join(text.read_text().splitlines(keepends=True)[:3]))
    spec = spec_of(folder, text={"source": str(text), "context": 32}, learn={"batch_size": 4096})
    inputs = open_inputs(spec, subject)
    with pytest.raises(TextError, match=r"the text gives \d+ activations, fewer than one batch of 4096") as caught:
        make_plan(spec, inputs, tmp_path)
    assert "--batch-size" in caught.value.hint
    claim(tmp_path / "out", spec)
    with pytest.raises(TextError, match="fewer than one batch"):
        carry_out(spec, inputs, tmp_path / "out", tmp_path / "cache")
    assert {path.name for path in tmp_path.iterdir()} == {"short.jsonl", "cache"}


def test_plan(folder: Path, subject: Subject, finished: Result) -> None:
    spec = spec_of(folder)
    plan = make_plan(spec, open_inputs(spec, subject), folder / "cold")
    assert plan.tokens == 1500
    assert plan.steps == 1500 * 2 // 64
    assert plan.harvest_s > 0
    assert plan.total_s == plan.harvest_s + plan.train_s + plan.judge_s
    assert plan.disk_bytes == pytest.approx((1500 + 300) * tiny.D_MODEL * 2)
    cached = make_plan(spec, open_inputs(spec, subject), folder / "cache")
    assert cached.harvest_s == 0
    with pytest.raises(SpecError, match="k = 64 must be below the width 64"):
        make_plan(spec_of(folder, learn={"k": 64}), open_inputs(spec, subject), folder / "cold")
