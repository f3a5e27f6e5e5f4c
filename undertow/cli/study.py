"""`undertow study`: scripted ablations: a YAML file, one command, a table with its controls."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml

from undertow.cli.common import JsonOption, OptionalModelOption, console, emit
from undertow.core.errors import SpecError, UserError

if TYPE_CHECKING:
    from undertow.studies.engine import Work
    from undertow.studies.planning import Plan
    from undertow.studies.result import Report
    from undertow.studies.spec import StudySpec

app = typer.Typer(help="Scripted studies: list, check, plan, run, report.", no_args_is_help=False)

StudyArgument = Annotated[str, typer.Argument(metavar="STUDY", help="A packaged study (undertow study list) or a YAML file.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE",
                                                     help="Replace a setting: --set size.stories=20. May be repeated.")]
WandbOption = Annotated[Literal["disabled", "offline", "online"], typer.Option("--wandb", help="Log to Weights & Biases.")]
EngineOption = Annotated[Literal["local", "ray"], typer.Option("--engine", help="Where trials run: in this process, or on the "
                                                               "workers of a Ray cluster; the rows are the same.")]
AddressOption = Annotated[str | None, typer.Option("--address", help="Ray cluster: HOST:PORT or auto; absent: RAY_ADDRESS, or "
                                                                     "one of this machine's own.")]
WorkersOption = Annotated[int | None, typer.Option("--workers", min=1, help="Ray workers at most; absent: as many as there are "
                                                                            "cores for.")]
SeedsOption = Annotated[list[int] | None, typer.Option("--seed", help="Seed in place of the study's; may be repeated.")]


@app.command("list")
def list_(json_: JsonOption = False) -> None:
    """The packaged studies."""
    from undertow.studies.spec import load_study, packaged_studies

    studies = {name: load_study(name) for name in packaged_studies()}
    if json_:
        emit({"studies": {name: spec.model_dump(mode="json") for name, spec in studies.items()}}, as_json=True)
        return
    for name, spec in studies.items():
        console().print(f"{name:<12}{spec.about}\n{'':<12}model {spec.model}, {len(spec.arms)} arms, primary {spec.primary}",
                        markup=False)


@app.command()
def check(file: StudyArgument, model: OptionalModelOption = None, set_: SetOption = None, json_: JsonOption = False) -> None:
    """Read a study file and say what it asks for; exit code 2 with the field and the value if it is wrong."""
    from undertow.studies.spec import ARMS, MEASURES, in_words, what_is

    spec = open_study(file, model, None, set_)
    if json_:
        emit({"name": spec.name, "digest": spec.digest(), "spec": spec.model_dump(mode="json")}, as_json=True)
        return
    lines = [f"{spec.name} ({spec.digest()}): {spec.about}",
             f"  model {spec.model}, concept {spec.concept}{', forced' if spec.force else ''}, seeds {_joined(spec.seeds)}",
             f"  SAE: {spec.sae or 'trained within the run'}",
             f"  primary: {spec.primary}" + (" (a claim: a verdict is drawn)" if spec.primary == "recovery" else
                                             " (a comparison of arms; no verdict is drawn)"),
             *(f"  {arm:<16}{what_is(arm, spec)}" for arm in spec.arms),
             *(f"  {name:<16}{MEASURES[name]}" for name in spec.measures),
             f"  thresholds: {in_words(spec.thresholds.model_dump())}", f"  size: {in_words(spec.size.model_dump())}"]
    missing = [arm for arm in ARMS if arm not in spec.arms]
    lines.append(f"  not asked for: {_joined(missing)}" if missing else "")
    console().print("\n".join(line for line in lines if line), markup=False)


@app.command()
def plan(
    study: StudyArgument,
    model: OptionalModelOption = None,
    seed: SeedsOption = None,
    set_: SetOption = None,
    params: Annotated[float | None, typer.Option("--params", help="Parameters of the model, if its name does not tell: 1.5e9.")
                      ] = None,
    json_: JsonOption = False,
) -> None:
    """Trials, cost, time and power of a study before it runs. Opens no model."""
    from undertow.studies.planning import plan_of, power_of

    spec = open_study(study, model, seed, set_)
    planned, power = plan_of(spec, params), power_of(spec)
    if json_:
        emit({"name": spec.name, "digest": spec.digest(), "model": spec.model, "trials": len(planned.trials),
              "keys": [trial.key for trial in planned.trials], "searches": planned.searches, "tokens": planned.tokens,
              **({} if planned.seconds is None else {"seconds": round(planned.seconds)}), "megabytes": planned.megabytes,
              "power": power._asdict() | {name: {str(d): value for d, value in getattr(power, name).items()}
                                          for name in ("power", "needed")}}, as_json=True)
        return
    _show_plan(spec, planned)
    console().print(f"power of paired comparisons over {power.n} stories (one-sided, alpha 0.025): {power.detectable:.2f} "
                    f"standard deviations are seen with power 0.8\n"
                    + "\n".join(f"  effect {d:.1f} SD: power {power.power[d]:.2f}; 0.8 needs {power.needed[d]} stories"
                                for d in power.power)
                    + f"\n  an act rate over {spec.size.sampled * len(spec.seeds)} sampled stories is known to ± "
                      f"{power.rate_margin:.2f} at most", markup=False)


@app.command()
def run(
    study: StudyArgument,
    model: OptionalModelOption = None,
    seed: SeedsOption = None,
    set_: SetOption = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Do trials again that failed.")] = False,
    wandb: WandbOption = "disabled",
    engine: EngineOption = "local",
    address: AddressOption = None,
    workers: WorkersOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the study; runs/NAME if absent. A run that was broken "
                                                           "off goes on there.")] = None,
    json_: JsonOption = False,
) -> None:
    """Run all trials that have no row yet; the same command goes on with a run that was broken off, by whatever."""
    from undertow.cli.progress import Phases, stop_requests
    from undertow.studies.engine import Watch, run_study
    from undertow.studies.planning import plan_of

    spec = open_study(study, model, seed, set_)
    work = _work(engine, address, workers)
    folder = out or Path("runs") / spec.name
    planned = plan_of(spec)
    _show_plan(spec, planned)
    with stop_requests() as stop, Phases() as phases, _followed(spec, folder, wandb, len(planned.trials)) as told:
        result = run_study(spec, folder, Watch(phases, stop, told), retry_failed, work)
    if json_:
        emit({"path": str(folder), "stopped": result.stopped, **result.counts}, as_json=True)
    else:
        console().print(f"{folder}/rows.jsonl: " + ", ".join(f"{n} {status}" for status, n in result.counts.items() if n),
                        markup=False)
        if result.counts["failed"]:
            console().print(f"{result.counts['failed']} trials failed; their rows say why. Again: --retry-failed", markup=False)
    if result.stopped:
        words = f"{study} --out {folder}" + " --engine ray" * (engine == "ray")
        console().print(f"stopped; the same command goes on: undertow study run {words}", markup=False)
        raise typer.Exit(stop.exit_code)


def _work(engine: str, address: str | None, workers: int | None) -> Work | None:
    """How the trials are done. Raises UserError for options that do not go together, and if Ray is not there."""
    if engine == "ray":
        from undertow.studies.ray_runner import on_ray

        return on_ray(address, workers)
    if address is not None or workers is not None:
        raise UserError(f"{'--address' if address is not None else '--workers'} is for the engine ray", "add --engine ray")
    return None


@contextmanager
def _followed(spec: StudySpec, folder: Path, wandb: str, total: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What is to be told of every row: its means to wandb, if that was asked for; at the end all figures of the table."""
    from sae.sinks import WandbSink
    from undertow.studies.result import read_result, row_means

    sink, seen = WandbSink(wandb, "undertow", folder.absolute().parent), itertools.count(1)
    sink.start(total, f"study {spec.name} on {spec.model}", spec.model_dump(mode="json"))
    try:
        yield lambda row: sink.event(next(seen), row_means(row))
        if wandb != "disabled":
            sink.finish({f"{figure.arm}/{figure.name}": figure.value for figure in read_result(folder).table.figures.values()})
    finally:
        sink.close()


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study that was run.")],
    out: Annotated[Path | None, typer.Option("--out", help="Where to write; DIR/report if absent. An old report is replaced, "
                                                           "since it follows from the rows.")] = None,
    json_: JsonOption = False,
) -> None:
    """Table, hypotheses, verdict and plots from the rows of a study: HTML, Markdown, CSV, JSON, SVG. Opens no model."""
    from undertow.studies.result import read_result, summary_of
    from undertow.studies.study_report import write_report

    found = read_result(folder)
    place = out or folder / "report"
    write_report(found, place)
    if json_:
        emit({"path": str(place), **summary_of(found)}, as_json=True)
    else:
        _show_result(found, place)


def _show_result(found: Report, place: Path) -> None:
    from rich.table import Table

    from undertow.studies.judging import group_outcome
    from undertow.studies.study_report import bounded

    shown = Table("arm", "acts", "recovery (P)", "change of D", "hazard ×", "KL", "word docs", box=None, pad_edge=False)
    for arm in found.table.columns.arms:
        figures = [found.table.get(arm, name) for name in ("act_rate", "recovery_prob", "D_change", "hazard_ratio", "kl_mean",
                                                           "word_docs_free")]
        shown.add_row(arm, *("–" if figure is None else bounded(figure.value, figure.low, figure.high, 2)
                             if figure.name in ("recovery_prob", "hazard_ratio") else bounded(figure.value, None, None, 2)
                             for figure in figures))
    console().print(shown)
    for group in dict.fromkeys(clause.group for clause in found.clauses):
        own = [clause for clause in found.clauses if clause.group == group]
        console().print(f"{group}: {group_outcome(own)}", markup=False)
        for clause in own:
            figure = "" if clause.value is None else f": {bounded(clause.value, clause.low, clause.high)}"
            console().print(f"  {clause.outcome:<11}{clause.claim}{figure or f' ({clause.why})'}", markup=False)
    if found.verdict is not None:
        console().print(f"verdict: {found.verdict.verdict} (row {found.verdict.row})\n  {found.verdict.reason}", markup=False)
    if found.left:
        console().print(f"{found.left} trials have no row yet; undertow study run goes on", markup=False)
    console().print(f"{place}/report.html, report.md, figures.csv", markup=False)


def open_study(study: str, model: str | None, seeds: list[int] | None, set_: list[str] | None) -> StudySpec:
    """A study with what the options replace. Raises SpecError."""
    from undertow.studies.spec import BATTERY, load_study

    changes: dict[str, Any] = {} if model is None else {"model": model}
    if seeds:
        changes["seeds"] = seeds
    for text in set_ or []:
        name, sign, value = text.partition("=")
        if not sign:
            raise SpecError(f"--set {text!r} is not NAME=VALUE", "for example --set size.stories=20")
        try:
            changes[name.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SpecError(f"the value of --set {text!r} cannot be read: {error}") from None
    if (sae := changes.get("sae")) and Path(str(sae)).exists():
        changes["sae"] = str(Path(str(sae)).resolve())
    concept = str(changes.get("concept", ""))
    if concept.startswith(BATTERY) and (file := Path(concept.removeprefix(BATTERY))).is_file():
        changes["concept"] = f"{BATTERY}{file.resolve()}"
    return load_study(study, changes)


def _show_plan(spec: StudySpec, planned: Plan) -> None:
    from rich.table import Table

    from undertow.studies.planning import table_of

    lines = table_of(planned.trials)
    measures = [measure for measure in spec.measures if any(line["measure"] == measure for line in lines)]
    cells = {(line["arm"], line["measure"]): f"{line['n']} in {line['trials']}" for line in lines}
    table = Table("arm", *measures, box=None, pad_edge=False)
    for arm in dict.fromkeys(line["arm"] for line in lines):
        table.add_row(arm, *(cells.get((arm, measure), "–") for measure in measures))
    console().print(f"{spec.name} on {spec.model}: {len(planned.trials)} trials (stories, texts or sets, in how many trials)",
                    markup=False)
    console().print(table)
    searched = f", {planned.searches} search{'es' if planned.searches != 1 else ''} of an SAE" if planned.searches else ""
    time = "time unknown: give --params, the number of the model's parameters" if planned.seconds is None else \
        f"about {_duration(planned.seconds)} on these cores"
    console().print(f"cost: {planned.tokens:,} tokens through the model{searched}; {time}; {planned.megabytes:.1f} MB",
                    markup=False)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5_400 else f"{seconds / 3600:.1f} h"


def _joined(values: Any) -> str:
    return ", ".join(map(str, values))
