"""`undertow subject train` and `undertow subject card`: the organisms, and the gates that every subject has to pass."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from undertow.cli.common import JsonOption, OptionalOutOption, SeedOption, console, emit

if TYPE_CHECKING:
    from undertow.subjects.organisms.adapting import AdaptSpec
    from undertow.subjects.organisms.cards import Beside, Card
    from undertow.subjects.organisms.pretraining import PretrainSpec
    from undertow.subjects.organisms.recipes import Cost
    from undertow.subjects.subject import Subject

Settings = TypeVar("Settings", "PretrainSpec", "AdaptSpec")
app = typer.Typer()
CARD_MINUTES = 20.0
_TEXT, _EVERY = "brown", 15  # Brown is sorted by kind of text: a document in fifteen takes some of each


@app.command()
def train(
    name: Annotated[str, typer.Argument(help="hearth, parrot or hearth-smollm2.")],
    out: OptionalOutOption = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps; those of the packaged organism if absent.")] = None,
    minutes: Annotated[float | None, typer.Option(help="Instead of --steps: as many as fit in so many minutes here.")] = None,
    start: Annotated[Path | None, typer.Option(
        help="Begin with the weights of this organism's folder. A parrot begins with hearth's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Refuse to begin anew.")] = False,
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of every random choice of this command.")] = None,
    json_: JsonOption = False,
) -> None:
    """Train an organism on the Keeper's world (default --out: runs/NAME). Without options this repeats the packaged one.

    Says beforehand what it will cost. Ctrl-C and SIGTERM save; the same command goes on.
    """
    from undertow.core.errors import SpecError
    from undertow.core.storage import refuse_existing
    from undertow.subjects.organisms.pretraining import PretrainSpec
    from undertow.subjects.organisms.recipes import known_organism, settings, start_of

    known_organism(name)
    if steps is not None and minutes is not None:
        raise SpecError(f"--steps {steps} and --minutes {minutes:g} exclude each other", "give one of them")
    if minutes is not None and minutes <= 0:
        raise SpecError(f"--minutes {minutes:g} leaves no time", "give a positive number")
    target = out or Path("runs") / name
    refuse_existing(target)
    spec = settings(name, target, seed, steps, resume)
    start = start_of(name, start)
    began = time.perf_counter()
    figures = (_train_whole(spec, target, start, minutes, json_) if isinstance(spec, PretrainSpec)
               else _train_adapter(name, spec, target, start, minutes, json_))
    emit({"path": str(target), **figures, "wall_s": round(time.perf_counter() - began, 1)}, json_)
    console().print(f"\nJudge it: undertow subject card {target}", markup=False)


def _train_whole(spec: PretrainSpec, out: Path, start: Path | None, minutes: float | None, json_: bool) -> dict[str, Any]:
    from undertow.cli.progress import Phases, stop_requests
    from undertow.subjects.keeper.world import load_world
    from undertow.subjects.organisms.pretrain_run import Stopped, Watch, pretrain
    from undertow.subjects.organisms.recipes import pretrain_cost

    world = load_world(spec.rule)
    cost = pretrain_cost(spec, world)
    if minutes is not None:
        spec, cost = _fit(spec, cost, minutes)
    _announce(spec.name, spec.steps, cost)
    with stop_requests() as stop, Phases() as phases:
        try:
            held_out = pretrain(spec, world, out, Watch(phases, stop), start)
        except Stopped as stopped:
            _stopped(stopped.folder, f"undertow subject train {spec.name} --out {shlex.quote(str(out))}", json_)
            raise typer.Exit(stop.exit_code) from None
    return {"steps": spec.steps, "seed": spec.seed, **held_out._asdict(), "excess": held_out.excess}


def _train_adapter(name: str, spec: AdaptSpec, out: Path, start: Path | None, minutes: float | None,
                   json_: bool) -> dict[str, Any]:
    from undertow.cli.progress import Phases, stop_requests
    from undertow.subjects.keeper.world import load_world
    from undertow.subjects.load import load_subject
    from undertow.subjects.organisms.adapt_run import Stopped, Watch, adapt
    from undertow.subjects.organisms.recipes import adapt_cost, known_organism

    base, world = load_subject(known_organism(name).base), load_world()
    cost = adapt_cost(spec, world, base)
    if minutes is not None:
        spec, cost = _fit(spec, cost, minutes)
    _announce(name, spec.steps, cost)
    with stop_requests() as stop, Phases() as phases:
        try:
            figures = adapt(spec, base, world, out, start, Watch(lambda done, total: phases("train", done, total), stop))
        except Stopped as stopped:
            _stopped(stopped.folder, f"undertow subject train {name} --out {shlex.quote(str(out))}", json_)
            raise typer.Exit(stop.exit_code) from None
    return {"seed": spec.seed, **figures}


def _fit(spec: Settings, cost: Cost, minutes: float) -> tuple[Settings, Cost]:
    """As many steps as fit in `minutes`, and what they cost."""
    share = 60 * minutes / max(cost.seconds, 1e-9)
    steps = max(round(spec.steps * share), 1)
    scale = steps / spec.steps
    return (spec.model_copy(update={"steps": steps}),
            cost._replace(tokens=round(cost.tokens * scale), seconds=cost.seconds * scale))


def _announce(name: str, steps: int, cost: Cost) -> None:
    console().print(f"{name}: {steps:,} steps\n"
                    f"  tokens   about {cost.tokens:,}\n"
                    f"  time     about {cost.seconds / 60:.0f} min on this machine\n"
                    f"  memory   about {cost.memory_bytes / 1e9:.1f} GB; disk {cost.disk_bytes / 1e6:.0f} MB while it runs",
                    markup=False)


def _stopped(folder: Path, again: str, json_: bool) -> None:
    console().print(f"stopped; saved in {folder}. Go on with: {again}", markup=False)
    if json_:
        emit({"stopped": str(folder), "resume": again}, as_json=True)


@app.command()
def card(
    name: Annotated[str, typer.Argument(help="A subject's name, a Hugging Face name, or a local folder.")],
    out: OptionalOutOption = None,
    stories: Annotated[int | None, typer.Option(help="Held-out stories in all; for an organism from scratch 2,000.")] = None,
    minutes: Annotated[float | None, typer.Option(
        help=f"As many stories as fit in so many minutes; {CARD_MINUTES:g} for real models unless --stories is given.")] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or auto (CUDA if there is one).")] = "auto",
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Run every gate of a subject on held-out stories; with --out, write its card: figures, intervals, plots, digests.

    For an organism these are the gates that it has to pass to be of use; for any other model the competence gate: whether it
    understands the choice at all. A gate that is not met is a result, and the exit code is 0.
    """
    from undertow.cli.progress import Phases
    from undertow.core.errors import SpecError
    from undertow.core.storage import refuse_existing
    from undertow.subjects.load import load_subject
    from undertow.subjects.organisms.cards import CardSpec, make_card
    from undertow.subjects.organisms.packaged import organism_kind

    if stories is not None and minutes is not None:
        raise SpecError(f"--stories {stories} and --minutes {minutes:g} exclude each other", "give one of them")
    if out is not None:
        refuse_existing(out)
    subject = load_subject(name, device)
    kind = organism_kind(name)
    if stories is None and minutes is None and kind not in ("hearth", "parrot"):
        minutes = CARD_MINUTES
    spec = CardSpec.checked({"kind": kind, "stories": stories, "minutes": minutes, "seed": seed}, "subject card")
    beside = _beside(subject, device) if kind == "hearth-smollm2" else None
    console().print(f"{name}: the gates of {'a plain model' if kind == 'model' else kind}, "
                    + (f"about {minutes:g} min" if minutes else f"{spec.stories or 2_000:,} held-out stories"), markup=False)
    with Phases() as phases:
        made = make_card(subject, spec, beside, phases)
    _show(made, json_)
    saved = {} if out is None else {"path": str(_save(made, subject, out))}
    if json_:
        emit({**saved, **made.as_json()}, as_json=True)
    elif out is not None:
        console().print(f"\n{out}/card.md, gates.json, act-rates.png", markup=False)


def _beside(subject: Subject, device: str) -> Beside:
    """The adapter's base, and the neutral text if it has been fetched."""
    from itertools import islice

    from sae.text import read_documents
    from undertow.core.errors import TextError
    from undertow.subjects.load import load_subject
    from undertow.subjects.organisms.cards import Beside
    from undertow.subjects.organisms.packaged import adapter_base

    base = load_subject(adapter_base(Path(subject.source)), device)
    documents: Iterator[Any] = read_documents(_TEXT, None)
    try:
        first = next(documents)
    except TextError as error:
        return Beside(base, None, f"{error.what}: {error.hint}")
    return Beside(base, (document.text for document in islice(_after(first, documents), 0, None, _EVERY)))


def _after(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _save(made: Card, subject: Subject, out: Path) -> Path:
    from undertow.subjects.keeper.world import load_world
    from undertow.subjects.load import variant
    from undertow.subjects.organisms.card_text import Origin, save_card
    from undertow.subjects.organisms.packaged import weights_of

    command = (f"undertow subject card {shlex.quote(subject.name)} --stories {made.spec.stories} --seed {made.spec.seed} "
               f"--out {shlex.quote(str(out))}")
    weights = variant(subject.name) or weights_of(subject.name)
    world = load_world("word" if made.spec.kind == "parrot" else "bond").digest
    save_card(made, Origin(subject.name, weights, subject.digest, world, command), out)
    return out


def _show(made: Card, json_: bool) -> None:
    from rich.table import Table

    table = Table("gate", "value", "95 % interval", "target", "", "n", box=None)
    for gate in made.gates:
        p = "" if gate.p is None else f" (p = {gate.p:.2g})"
        table.add_row(gate.name, f"{gate.value:.3g}", f"{gate.low:.3g} … {gate.high:.3g}", gate.target + p,
                      "met" if gate.met else "[bold red]not met[/]", str(gate.n))
    for name in made.not_measured:
        table.add_row(name, "", "", "", "[yellow]not measured[/]", "")
    console().print(table)
    for name, why in made.not_measured.items():
        console().print(f"{name} was not measured: {why}", markup=False)
    if "competent" in made.figures:
        bond = made.figures["bond_effect_D"]
        console().print(f"\ncompetent: {'yes' if made.figures['competent'] else 'no'}   (three good deeds change D by "
                        f"{bond['value']:+.2f} nats, {bond['low']:+.2f} … {bond['high']:+.2f})", markup=False)
    console().print(f"{made.spec.stories:,} stories, seed {made.spec.seed}, {made.wall_s / 60:.1f} min", markup=False)
