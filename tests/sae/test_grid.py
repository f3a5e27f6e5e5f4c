"""A grid: every combination once, from one harvest, each as if it had been trained alone; interrupted, it goes on."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae import harvesting
from sae.formats import load
from sae.grid import GRID_FILE, INDEX, GridSpec, claim_grid, plan_grid, run_grid, unfinished_grid
from sae.plan import open_inputs
from sae.run import Interrupted, Watch, claim, partial_folder
from sae.sinks import Sinks
from tests.sae.test_run import StopAfter, carry_out, never, silent, spec_of
from undertow.core.errors import ArtifactError, SpecError
from undertow.subjects import Subject

RESID, MLP = "blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"


def grid_of(folder: Path, **axes: Any) -> GridSpec:
    base = axes.pop("base", spec_of(folder, learn={"epochs": 1.0}))
    return GridSpec.checked({"base": base, "sites": [RESID], "widths": [64], "sparsities": [4], **axes}, "test")


def carry_out_grid(spec: GridSpec, subject: Subject, out: Path, cache: Path,
                   stop: Callable[[], bool] = never) -> dict[str, Any]:
    return run_grid(spec, subject, out, cache, (Watch(silent, Sinks([]), stop), lambda folder: Sinks([])))


def test_names_and_order(folder: Path) -> None:
    runs = grid_of(folder, widths=[64, 128], sparsities=[4, 8], seeds=2).runs()
    assert list(runs) == ["w64-k4-s3", "w64-k4-s4", "w64-k8-s3", "w64-k8-s4", "w128-k4-s3", "w128-k4-s4", "w128-k8-s3",
                          "w128-k8-s4"]
    last = runs["w128-k8-s4"]
    assert (last.learn.width, last.learn.k, last.seed, last.site) == (128, 8, 4, RESID)
    assert list(grid_of(folder, sites=[RESID, MLP]).runs()) == ["blocks.1.resid_post-w64-k4-s3", "blocks.1.mlp_out-w64-k4-s3"]
    priced = spec_of(folder, learn={"k": None, "architecture": "gated", "penalty": {"coefficient": 1.0}})
    runs = grid_of(folder, base=priced, sparsities=[0.5, 2]).runs()
    assert list(runs) == ["w64-p0.5-s3", "w64-p2-s3"]
    assert [run.learn.penalty.coefficient for run in runs.values()] == [0.5, 2]


def test_one_harvest_and_every_run_as_if_alone(folder: Path, subject: Subject, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    real = harvesting.tap_sites

    def counted(*args: Any) -> Any:
        passes.append(len(args[2]))
        return real(*args)

    monkeypatch.setattr(harvesting, "tap_sites", counted)
    spec = grid_of(folder, sites=[RESID, MLP], widths=[64, 96], seeds=2)
    claim_grid(tmp_path / "grid", spec)
    index = carry_out_grid(spec, subject, tmp_path / "grid", tmp_path / "cache")
    assert set(passes) == {2}  # both sites from every pass
    assert len(passes) == sum(-(-len(store_rows(path)) // 32) for path in (tmp_path / "cache" / "activations").iterdir()) // 2
    assert json.loads((tmp_path / "grid" / INDEX).read_text()) == index
    assert [row["name"] for row in index["runs"]] == list(spec.runs())
    assert {path.name for path in (tmp_path / "grid").iterdir()} == {GRID_FILE, INDEX, *spec.runs()}
    row = index["runs"][-1]
    assert (row["site"], row["width"], row["k"], row["seed"]) == (MLP, 96, 4, 4)
    assert 0 < row["fvu"] < 1

    name = "blocks.1.mlp_out-w96-k4-s4"
    alone = spec.runs()[name]
    claim(tmp_path / "alone", alone)
    one = carry_out(alone, open_inputs(alone, subject), tmp_path / "alone", tmp_path / "cache")
    assert torch.equal(load(tmp_path / "grid" / name).W_dec, one.dictionary.W_dec)
    other = load(tmp_path / "grid" / "blocks.1.mlp_out-w96-k4-s3")  # negative control: the seed matters
    assert not torch.equal(other.W_dec, one.dictionary.W_dec)


def store_rows(path: Path) -> torch.Tensor:
    from sae.store import open_store

    return open_store(path).tokens


@pytest.mark.parametrize("stop_at", [1, 12, 30, 45])
def test_an_interrupted_grid_goes_on(stop_at: int, folder: Path, subject: Subject, tmp_path: Path) -> None:
    spec = grid_of(folder, sparsities=[3, 4])
    cache = folder / "grid-cache"
    if not (folder / "whole").exists():
        claim_grid(folder / "whole", spec)
        carry_out_grid(spec, subject, folder / "whole", cache)
    out = tmp_path / "grid"
    claim_grid(out, spec)
    with pytest.raises(Interrupted) as caught:
        carry_out_grid(spec, subject, out, cache, StopAfter(stop_at))
    assert caught.value.folder == out
    assert not (out / INDEX).exists()
    again = unfinished_grid(out)
    assert again == spec
    carry_out_grid(spec, subject, out, cache)
    for name in spec.runs():
        assert torch.equal(load(out / name).W_dec, load(folder / "whole" / name).W_dec)
        assert not partial_folder(out / name).exists()
    with pytest.raises(ArtifactError, match="is finished"):
        unfinished_grid(out)


def test_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"k = 64 must be below the width 64"):
        claim_grid(tmp_path / "grid", grid_of(folder, sparsities=[4, 64]))
    with pytest.raises(SpecError, match="widths"):
        grid_of(folder, widths=[])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("ten years")
    with pytest.raises(ArtifactError, match="exists and is not empty"):
        claim_grid(tmp_path / "taken", grid_of(folder))
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["thesis.txt"]
    assert unfinished_grid(tmp_path / "nothing") is None


def test_the_cost_of_a_grid(folder: Path, subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training and judging add up; the harvest and its disk are paid once. By a clock that ticks once a look."""
    ticks = itertools.count()
    monkeypatch.setattr("sae.plan.time.perf_counter", lambda: float(next(ticks)))
    one = plan_grid(grid_of(folder), subject, tmp_path)
    many = plan_grid(grid_of(folder, sparsities=[3, 4], seeds=2), subject, tmp_path)
    assert (one.runs, many.runs) == (1, 4)
    assert many.disk_bytes == one.disk_bytes and many.harvest_s == one.harvest_s > 0
    assert many.train_s == 4 * one.train_s > 0 and many.judge_s == 4 * one.judge_s > 0
    assert many.total_s == many.harvest_s + many.train_s + many.judge_s
    assert plan_grid(grid_of(folder, sites=[RESID, MLP]), subject, tmp_path).disk_bytes == 2 * one.disk_bytes
