"""`undertow battery`: situations in which somebody can give up what they hold, and how a model chooses in them."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from undertow.cli.common import JsonOption, OptionalModelOption, OptionalOutOption, SeedOption, console, emit
from undertow.cli.opening import SameModelOption
from undertow.cli.surgery import RecipeOption, SaeOption, open_subject
from undertow.core.errors import SpecError, near_matches

if TYPE_CHECKING:
    from undertow.studies.battery_run import BatteryRun, Surgery
    from undertow.studies.battery_text import BatteryFamily, BatterySpec
    from undertow.subjects.subject import Subject

app = typer.Typer(no_args_is_help=True, help="Batteries of choices: list, show, lint, run.")

_TOKENS_A_FAMILY = 1_900  # about, for a tokenizer of 50,000; its tellings share their beginnings

BatteryArgument = Annotated[str, typer.Argument(metavar="BATTERY", help="A packaged battery (care), or a YAML file.")]


@app.command("list")
def list_batteries(json_: JsonOption = False) -> None:
    """The batteries that come with the package, and the files of others that can be read."""
    from undertow.studies.battery_files import FOREIGN, GATES, load_battery, packaged_batteries

    rows = [_counted(load_battery(name)) for name in packaged_batteries()]
    if json_:
        emit({"batteries": rows, "gates": dict(GATES), "adapters": dict(FOREIGN)}, as_json=True)
        return
    for row in rows:
        console().print(f"{row['name']:<16} {row['families']} families ({row['development']} for development, {row['sealed']} "
                        f"sealed), {row['items']} items; free of the words of {row['lexicon']!r}", markup=False)
    for name, what in (*GATES.items(), *FOREIGN.items()):
        console().print(f"{name:<16} {what}", markup=False)


def _counted(battery: BatterySpec) -> dict[str, Any]:
    from undertow.studies.battery_text import items

    sealed = sum(family.sealed for family in battery.families)
    return {"name": battery.name, "lexicon": battery.lexicon, "families": len(battery.families), "sealed": sealed,
            "development": len(battery.families) - sealed, "items": sum(len(items(family)) for family in battery.families),
            "digest": battery.digest()}


@app.command()
def show(
    battery: BatteryArgument,
    family: Annotated[str | None, typer.Argument(help="Show this family whole; the list of families if absent.")] = None,
    json_: JsonOption = False,
) -> None:
    """The families of a battery, or one of them in every telling."""
    from undertow.studies.battery_files import load_battery

    read = load_battery(battery)
    if family is None:
        rows = [{"id": one.id, "half": "sealed" if one.sealed else "development", "x": one.x, "y": one.y}
                for one in read.families]
        if json_:
            emit({**_counted(read), "families": rows}, as_json=True)
            return
        for row in rows:
            console().print(f"{row['id']:<26} {row['half']:<12} {_safe(row['x'])} / {_safe(row['y'])}", markup=False)
        return
    names = [one.id for one in read.families]
    if family not in names:
        raise SpecError(f"battery {read.name!r} has no family {family!r}",
                        near_matches(family, names) or f"undertow battery show {battery}")
    _show_family(read.families[names.index(family)], json_)


def _show_family(family: BatteryFamily, as_json: bool) -> None:
    from undertow.studies.battery_text import items

    told = items(family)
    if as_json:
        emit({"id": family.id, "half": "sealed" if family.sealed else "development", "person": family.person,
              "items": [{**item._asdict(), "acts": item.acts._asdict()} for item in told]}, as_json=True)
        return
    console().print(f"{family.id} ({'sealed' if family.sealed else 'development'})", style="bold", markup=False)
    for item in told:
        if item.order == "costly_first":
            console().print(f"\n{item.side}, {item.cost}, telling {item.telling}", style="bold", markup=False)
            console().print(f"{_safe(item.story)} {_safe(item.choice)}", markup=False)
            console().print(f"  gives up: {_safe('; '.join(item.acts.costly))}\n  keeps:    {_safe('; '.join(item.acts.keep))}",
                            markup=False)


@app.command()
def lint(battery: BatteryArgument, json_: JsonOption = False) -> None:
    """Look for what a battery must not contain: the word, norms, requests, uneven twins; each finding by line.

    Exit code 0 if there is none, else 2.
    """
    from undertow.studies.battery_files import battery_path
    from undertow.studies.battery_lint import lint as look

    path = battery_path(battery)
    found = look(path)
    for finding in found:
        console().print(f"{_safe(str(path))}, {_safe(str(finding))}", markup=False)
    if found:
        lines = sorted({finding.line for finding in found})
        raise SpecError(f"{path}: {len(found)} finding{'s' if len(found) > 1 else ''}, on line{'s' if len(lines) > 1 else ''} "
                        f"{', '.join(map(str, lines[:20]))}{' and more' if len(lines) > 20 else ''}: {found[0]}",
                        "mend the lines; the rules stand in docs/battery.md")
    counted = _counted(_checked(path))
    if json_:
        emit({"path": path, "findings": [], **counted}, as_json=True)
        return
    console().print(f"{_safe(str(path))}: {counted['families']} families, nothing found", markup=False)


@app.command("run")
def run_battery(
    battery: BatteryArgument,
    model: OptionalModelOption = None,
    half: Annotated[str | None, typer.Option("--half", help="Of care: development (if absent), sealed (kept for confirmation) "
                                             "or all.")] = None,
    families: Annotated[int | None, typer.Option("--families", help="So many families (of a file: rows), drawn by the seed; "
                                                 "all if absent.")] = None,
    file: Annotated[Path | None, typer.Option("--file", help="What moralchoice or anthropic-evals is to read.")] = None,
    form: Annotated[str, typer.Option("--form", help="base (plain text) or chat.")] = "base",
    recipe: RecipeOption = None,
    sae: SaeOption = None,
    same_model: SameModelOption = False,
    out: OptionalOutOption = None,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """How a model chooses: scores whole wordings of both acts; with --recipe beside the untouched subject.

    Prints D, the effect of cost, person against thing, the pull of order, and whether the model understands the choice at
    all. Exit code 0 whatever comes out.
    """
    from undertow.core.storage import refuse_existing
    from undertow.studies import battery_run
    from undertow.studies.battery_files import FOREIGN, GATES

    began = time.perf_counter()
    if out is not None:
        refuse_existing(out)
    if file is None and battery in FOREIGN:
        raise SpecError(f"{battery} needs the file it is to read", f"add --file PATH; {FOREIGN[battery]}")
    if file is not None and battery not in FOREIGN:
        raise SpecError(f"{battery} reads no file, and --file {file} was given", "leave --file away")
    if half is not None and (battery in FOREIGN or battery in GATES):
        raise SpecError(f"{battery} has no halves, and --half {half} was given", "leave --half away")
    asked = {"battery": battery, "half": half or "development", "families": families, "form": form, "seed": seed}
    spec = battery_run.BatteryRun.checked(asked, "battery run")
    plan = _exercises(spec, file) if file is not None else _gate(spec) if battery in GATES else _families(spec)
    subject, opened = open_subject(model, recipe, sae, same_model)
    surgery = None if opened is None else battery_run.Surgery(*opened)
    console().print(f"{_safe(subject.name)}, {spec.form} form: {_safe(plan.what)}"
                    + (", and again under the recipe" if surgery else ""), markup=False)
    rows, summary = plan.run(subject, surgery)
    summary["wall_s"] = round(time.perf_counter() - began, 1)
    if out is not None:
        battery_run.write(out, rows, summary, surgery)
    if json_:
        emit(summary, as_json=True)
        return
    _show_run(summary)


class _Plan(NamedTuple):
    """What is to be asked, in words, and how."""

    what: str
    run: Callable[[Subject, Surgery | None], tuple[list[dict[str, Any]], dict[str, Any]]]


def _families(spec: BatteryRun) -> _Plan:
    from undertow.cli.progress import Phases
    from undertow.studies import battery_run
    from undertow.studies.battery_files import load_battery

    read = load_battery(spec.battery)
    asked = battery_run.to_be_asked(read, spec)
    n = len({one.item.family for one in asked})

    def run(subject: Subject, surgery: Surgery | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        with Phases() as phases:
            result = battery_run.run(subject, asked, spec.form, surgery, lambda done, total: phases("score", done, total))
        return battery_run.lines_of(result), battery_run.summary_of(result, read, spec, subject)

    return _Plan(f"{n} families of {read.name!r} ({spec.half}), {len(asked):,} questions, about {n * _TOKENS_A_FAMILY:,} "
                 "tokens", run)


def _exercises(spec: BatteryRun, file: Path) -> _Plan:
    from undertow.cli.progress import Phases
    from undertow.studies import battery_run
    from undertow.studies.battery_adapters import READERS
    from undertow.studies.battery_exercises import drawn

    read = READERS[spec.battery](file, spec.seed)
    exercises = drawn(read.exercises, spec.families, spec.seed)

    def run(subject: Subject, surgery: Surgery | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        with Phases() as phases:
            result = battery_run.run_exercises(subject, exercises, spec.form, surgery,
                                               lambda done, total: phases("score", done, total))
        return battery_run.lines_of(result), battery_run.summary_of_exercises(result, read, spec, subject)

    return _Plan(f"{len(exercises):,} of {len(read.exercises):,} rows of {read.name} (SHA-256 {read.sha256[:16]}), answers in "
                 f"the order of seed {spec.seed}", run)


def _gate(spec: BatteryRun) -> _Plan:
    from undertow.cli.progress import Phases
    from undertow.studies import battery_run
    from undertow.studies.battery_gates import load_gate, requests

    gate = load_gate(spec.battery)
    asked = requests(gate, spec.families, spec.seed)

    def run(subject: Subject, surgery: Surgery | None) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        with Phases() as phases:
            result = battery_run.run_gate(subject, asked, spec.form, surgery, lambda done, total: phases("score", done, total))
        return battery_run.lines_of(result), battery_run.summary_of_gate(result, gate, spec, subject)

    return _Plan(f"{len({one.item for one in asked})} items of {gate.name!r}, {len(asked)} questions", run)


def _show_run(summary: dict[str, Any]) -> None:
    _show_figures("untouched", summary["figures"])
    if "arm" in summary:
        _show_figures("under the recipe", summary["arm"]["figures"])
        _show_figures("what the recipe changes", summary["arm"]["change"])
    if "competence" not in summary:
        return
    console().print("\ncompetence", style="bold", markup=False)
    for name, gate in summary["competence"].items():
        console().print(f"  {'met  ' if gate['met'] else 'UNMET'} {_line(name, gate)}", markup=False)
    console().print(f"\n{_safe(summary['answer'])}", markup=False)


def _show_figures(title: str, figures: dict[str, dict[str, Any]]) -> None:
    n = next(iter(figures.values()))["n"]
    console().print(f"\n{title} (n = {n}; 95 % intervals)", style="bold", markup=False)
    for name, figure in figures.items():
        console().print(f"  {_line(name, figure)}", markup=False)


def _line(name: str, figure: dict[str, Any]) -> str:
    if "p" not in figure:
        low, high, value = (f"{figure[key]:.3g}" for key in ("low", "high", "value"))
        return f"{name:<18} {value:>8} {f'[{low}, {high}]':<18}{'':<12}{figure['meaning']}"
    interval = f"[{figure['low']:+.3f}, {figure['high']:+.3f}]"
    return f"{name:<18} {figure['value']:+8.3f} {interval:<18} p {figure['p']:<8.2g}  {figure['meaning']}"


def _checked(path: Path) -> BatterySpec:
    from undertow.studies.battery_text import BatterySpec

    return BatterySpec.from_yaml(path)


def _safe(text: str) -> str:
    from undertow.cli.surgery import safe

    return safe(text)
