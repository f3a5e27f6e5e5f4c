"""A grid of dictionaries from one harvest: every combination of sites, widths, sparsities and seeds.

A grid is a folder: `grid.json` (what was asked, written first), one folder a run, each a whole dictionary with its own card,
and `index.json` (all figures side by side, written last). Runs are carried out one after another, each resumable by itself,
so that a grid that was interrupted goes on in the middle of the run it was at. One pass of the subject harvests all sites.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from sae.harvesting import harvest_sites
from sae.plan import Inputs, make_plan, open_inputs
from sae.run import SPEC_FILE, Interrupted, Watch, claim, partial_folder, run, tidy
from sae.sinks import Sinks
from sae.spec import RunSpec
from undertow.core.errors import ArtifactError
from undertow.core.spec import Spec
from undertow.core.storage import disk_errors, refuse_existing, write_json
from undertow.subjects.subject import Subject

GRID_FILE, INDEX = "grid.json", "index.json"
OpenSinks = Callable[[Path], Sinks]


class GridSpec(Spec):
    """Axes over a base run, whose own site, width, k, price and seed are those of the first combination.

    Attributes:
        sparsities: values of k, or prices of sparsity where the base run has a price.
        seeds: how many; they count up from the base run's.
    """

    base: RunSpec
    sites: tuple[str, ...] = Field(min_length=1)
    widths: tuple[int, ...] = Field(min_length=1)
    sparsities: tuple[float, ...] = Field(min_length=1)
    seeds: int = Field(default=1, ge=1)

    def runs(self) -> dict[str, RunSpec]:
        """Every run by the name of its folder, sites outermost, seeds innermost. Raises SpecError for one that is refused."""
        base = self.base.model_dump(mode="json")
        priced = self.base.learn.penalty.coefficient is not None
        found: dict[str, RunSpec] = {}
        for site, width, sparsity, extra in product(self.sites, self.widths, self.sparsities, range(self.seeds)):
            seed = self.base.seed + extra
            learn = {**base["learn"], "width": width}
            if priced:
                learn["penalty"] = {**learn["penalty"], "coefficient": sparsity}
            else:
                learn["k"] = int(sparsity)
            where = f"{site.replace('.hook_', '.')}-" if len(self.sites) > 1 else ""
            name = f"{where}w{width}-{f'p{sparsity:g}' if priced else f'k{int(sparsity)}'}-s{seed}"
            found[name] = RunSpec.checked({**base, "site": site, "seed": seed, "learn": learn}, name)
        return found


class GridPlan(NamedTuple):
    """Estimated cost of a grid, in seconds and bytes; `memory_bytes` is that of its largest run."""

    runs: int
    harvest_s: float
    train_s: float
    judge_s: float
    disk_bytes: int
    memory_bytes: int

    @property
    def total_s(self) -> float:
        return self.harvest_s + self.train_s + self.judge_s


def claim_grid(out: Path, spec: GridSpec) -> None:
    """Reserve `out` and write down what is asked. Raises ArtifactError if it is taken, SpecError if a run is refused."""
    for run_spec in spec.runs().values():
        run_spec.learn.train_spec(run_spec.tokens, run_spec.seed)
    refuse_existing(out)
    with disk_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / GRID_FILE, spec.model_dump(mode="json"))


def unfinished_grid(out: Path) -> GridSpec | None:
    """The spec of the grid in `out`, or None if there is no grid. Raises ArtifactError if it is finished."""
    if not (out / GRID_FILE).is_file():
        return None
    if (out / INDEX).is_file():
        raise ArtifactError(f"nothing to resume: the grid {out} is finished")
    return GridSpec.checked(json.loads((out / GRID_FILE).read_text(encoding="utf-8")), str(out / GRID_FILE))


def plan_grid(spec: GridSpec, subject: Subject, cache: Path) -> GridPlan:
    """Estimate the cost of a grid on this machine: one harvest, whatever the number of runs; steps are timed for every size."""
    inputs = _inputs(spec, subject)
    plans = [(run_spec.site, make_plan(run_spec, inputs[run_spec.site], cache)) for run_spec in spec.runs().values()
             if run_spec.seed == spec.base.seed]
    by_site, all_plans = dict(plans), [plan for _, plan in plans]
    return GridPlan(
        runs=len(plans) * spec.seeds, harvest_s=max(plan.harvest_s for plan in all_plans),
        train_s=spec.seeds * sum(plan.train_s for plan in all_plans),
        judge_s=spec.seeds * sum(plan.judge_s for plan in all_plans),
        disk_bytes=sum(plan.disk_bytes for plan in by_site.values()),
        memory_bytes=max(plan.memory_bytes for plan in all_plans))


def _inputs(spec: GridSpec, subject: Subject) -> dict[str, Inputs]:
    return {site: open_inputs(spec.base.model_copy(update={"site": site}), subject) for site in spec.sites}


def run_grid(spec: GridSpec, subject: Subject, out: Path, cache: Path, watch: tuple[Watch, OpenSinks]) -> dict[str, Any]:
    """Carry out a claimed grid, from wherever it stands; returns what `index.json` holds.

    Args:
        spec: what was claimed.
        subject: the model.
        out: the grid's folder.
        cache: where activations are kept.
        watch: what the grid shows and heeds (its sink is not used), and what opens the sinks of one run by its log's folder.

    Raises Interrupted if a stop was asked for; its folder is the grid's.
    """
    shown, open_sinks = watch
    runs = spec.runs()
    inputs = _inputs(spec, subject)
    first = next(iter(inputs.values()))
    places = [one.site for one in inputs.values()]

    def harvesting(done: int, total: int) -> None:
        shown.progress("harvest", done, total)
        if shown.should_stop():
            raise Interrupted(out)

    for corpus, wanted in ((first.train, spec.base.tokens), (first.held_out, spec.base.eval_tokens)):
        harvest_sites(subject, places, corpus, wanted, cache, harvesting, spec.base.store)
    rows = [_one(name, run_spec, inputs[run_spec.site], out, (cache, shown, open_sinks)) for name, run_spec in runs.items()]
    index = {"path": str(out), "runs": rows}
    write_json(out / INDEX, index)
    return index


def _one(name: str, spec: RunSpec, inputs: Inputs, out: Path, around: tuple[Path, Watch, OpenSinks]) -> dict[str, Any]:
    """One run, unless it lies there; its line of the index."""
    cache, shown, open_sinks = around
    folder = out / name
    if not tidy(folder):
        if not (partial_folder(folder) / SPEC_FILE).is_file():
            claim(folder, spec)
        try:
            with open_sinks(folder) as sinks:
                run(spec, inputs, folder, cache, shown._replace(sink=sinks))
        except Interrupted:
            raise Interrupted(out) from None
    figures = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    learn = spec.learn
    sparsity = {"k": learn.k} if learn.k is not None else {"price": learn.penalty.coefficient}
    return {"name": name, "site": spec.site, "width": learn.width, **sparsity, "seed": spec.seed, **figures}
