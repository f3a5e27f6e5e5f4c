"""The benchmark of training: its arithmetic, its peers, its measure of memory, and equal quality."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from sae.architectures import Architecture
from sae.bench import Row, race, ratios
from sae.bench_quality import (
    Pair,
    QualitySize,
    compare_trainers,
    load_activations,
    quality_spec,
    scaled,
    shuffled,
    train_ours,
)
from sae.bench_steps import StepSize, _resident, job_of, peak_memory, step_contestants, step_makers, synthetic
from sae.metrics import Reconstruction, reconstruction
from tests.cli.answers import runner
from tests.sae.test_training import synthetic as sums_of_three

SMALL = StepSize(16, 64, 4, 32)


def test_races_by_hand() -> None:
    rows = ratios({"a": [1.0, 9.0, 2.0], "b": [4.0, 4.0, 4.0]}, "ms", "b")
    assert rows == [Row("a", 2.0, 1.0, 9.0, "ms", 0.5), Row("b", 4.0, 4.0, 4.0, "ms", 1.0)]
    calls: list[str] = []

    def contestant(name: str, figures: list[float]) -> Callable[[], float]:
        def run() -> float:
            calls.append(name)
            return figures.pop(0)

        return run

    rows = race({"a": contestant("a", [100, 1, 3, 2]), "b": contestant("b", [100, 4, 5, 6])}, 3, "ms", "a")
    assert calls == ["a", "b"] * 4  # interleaved; the first round does not count
    assert [row.median for row in rows] == [2, 5] and rows[1].ratio == 2.5


@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_every_trainer_takes_its_step(architecture: str, sae_lens: Any) -> None:
    """Ours and sae-lens' always; of the others those that can be imported, and a note on each that cannot."""
    job = job_of(SMALL, architecture, "cpu")
    makers, notes = step_makers(job)
    assert list(makers)[:2] == [f"undertow {architecture} step", f"sae-lens {architecture} step"]
    for name in ("dictionary_learning", "sparsify"):
        assert any(name in who for who in makers) != any(name in note for note in notes), (name, makers, notes)
    batches = list(synthetic(job, 3))
    for make in makers.values():
        step = make(batches[0])
        assert all(0 < step(batch) < 60_000 for batch in batches)
    contestants, _ = step_contestants(job)
    assert next(iter(contestants)).startswith("encode product alone") and len(contestants) == len(makers) + 1


def test_sae_lens_really_trains(sae_lens: Any) -> None:
    """The step that is timed moves the weights: sae-lens' loss falls on the batch that it sees again and again."""
    from sae.peers import sae_lens_dictionary, sae_lens_trainer

    job = job_of(SMALL, "topk", "cpu")
    batch = next(synthetic(job, 1))
    trainer = sae_lens_trainer(job, sae_lens_dictionary(job), iter(()), lr=1e-2)
    losses = [float(trainer.step(batch).loss.detach()) for _ in range(30)]
    assert losses[-1] < 0.8 * losses[0]


def test_the_measure_of_memory_sees_what_was_freed() -> None:
    """64 MB that lived between two looks are seen; where nothing lived, nothing is."""
    before = _resident(restart=True)
    assert _resident() - before < 8e6
    before = _resident(restart=True)
    torch.ones(16 * 2**20)
    assert _resident() - before == pytest.approx(64 * 2**20, abs=8e6)


@pytest.mark.slow
def test_peak_memory_is_at_most_three_fifths_of_sae_lens() -> None:
    peaks = peak_memory(job_of(StepSize(192, 4096, 32, 1024), "topk", "cpu"))
    ours, theirs = peaks["undertow topk step"], peaks["sae-lens topk step"]
    weights = 4 * 2 * 192 * 4096 / 1e6
    assert 4 * weights + 4 * 1024 * 4096 / 1e6 < 1.1 * ours  # weights, gradients, Adam's two; and the pre-activations
    assert ours < 0.6 * theirs


# ---------------------------------------------------------------- equal quality


def test_what_quality_compares() -> None:
    data = scaled(torch.full((8, 4), 3.0), torch.full((2, 4), 6.0))
    assert torch.equal(data.train, torch.ones(8, 4)) and torch.equal(data.held_out, torch.full((2, 4), 2.0))
    batches = shuffled(torch.arange(10.0)[:, None], 5, seed=1)
    epochs = [torch.cat([next(batches), next(batches)])[:, 0] for _ in range(2)]
    assert all(torch.equal(epoch.sort().values, torch.arange(10.0)) for epoch in epochs)
    assert not torch.equal(*epochs)
    ours, theirs = (Reconstruction(fvu, 3.0, 0.0, torch.ones(1), torch.ones(1), 1) for fvu in (0.198, 0.2))
    assert Pair(ours, theirs).difference == pytest.approx(-0.01)


def test_both_trainers_learn_the_same_thing(sae_lens: Any) -> None:
    """Sums of three of 40 directions: from the same weights both reach a like error. A trainer at a standstill does not."""
    data = scaled(torch.cat(list(sums_of_three(40))), next(sums_of_three(1, start=10_000)))
    spec = quality_spec("topk", QualitySize(64, 3, 256, 300), 0).model_copy(update={"lr": 5e-3})
    pair = compare_trainers(spec, data)
    assert max(pair.ours.fvu, pair.theirs.fvu) < 0.15 and pair.ours.l0 == pair.theirs.l0 == 3
    still = compare_trainers(spec.model_copy(update={"lr": 1e-9}), data)
    assert still.ours.fvu > 0.5 and still.ours.fvu == pytest.approx(still.theirs.fvu, rel=0.01)  # both began alike


@pytest.mark.slow
@pytest.mark.parametrize("architecture", get_args(Architecture))
def test_equal_quality(architecture: Architecture, sae_lens: Any, tmp_path: Path) -> None:
    """On a Llama's residual stream our held-out FVU is at most 0.5 % above sae-lens', at no higher L0 (by 2 %).

    JumpReLU comes to the L0 that it is asked for, which sae-lens' misses by far: ours is asked for what theirs came to.
    """
    size = QualitySize()
    data = load_activations(size, tmp_path, lambda *_: None)
    pair = compare_trainers(quality_spec(architecture, size, 0), data)
    if architecture == "jumprelu":
        assert pair.ours.l0 == pytest.approx(size.k, rel=0.02)
        same = quality_spec(architecture, size._replace(k=int(pair.theirs.l0)), 0)
        pair = pair._replace(ours=reconstruction(train_ours(same, data.train), [data.held_out]))
    assert pair.difference < 0.005
    assert pair.ours.l0 < 1.02 * pair.theirs.l0


# ---------------------------------------------------------------- the command


def test_the_command(capsys: pytest.CaptureFixture[str], sae_lens: Any) -> None:
    run = runner(capsys)
    small = ["--d", "16", "--width", "64", "--k", "4", "--batch-size", "32", "--rounds", "1", "--no-memory"]
    answer = run("bench", "sae", *small, "--architecture", "batchtopk,topk", "--json")
    assert answer.code == 0, answer.err
    assert {row["name"] for row in answer.json["rows"]} >= {"undertow topk step", "sae-lens batchtopk step"}
    assert all(row.keys() == {"name", "median", "min", "max", "unit", "ratio"} for row in answer.json["rows"])
    assert [row["ratio"] for row in answer.json["rows"] if row["name"].startswith("undertow")] == [1, 1]
    wrong = run("bench", "sae", "--architecture", "topq")
    assert wrong.code == 2 and "did you mean topk" in wrong.err
