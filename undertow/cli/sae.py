"""`undertow sae`: train, resume, judge and import sparse autoencoders."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from undertow.cli.common import (
    ChatOption,
    ColumnOption,
    JsonOption,
    ModelOption,
    OptionalModelOption,
    OptionalTextOption,
    OutOption,
    SeedOption,
    TextOption,
    console,
    emit,
)
from undertow.cli.compare import app as comparing
from undertow.cli.opening import Place, SaeArgument, SameModelOption, SiteOption, open_place

if TYPE_CHECKING:
    from sae.dictionary import Dictionary
    from sae.grid import GridPlan, GridSpec
    from sae.harvesting import Source
    from sae.plan import Inputs, Plan
    from sae.sinks import Sinks
    from sae.spec import RunSpec
    from sae.story_truth import Found
    from sae.team import Team
    from undertow.cli.progress import Phases
    from undertow.subjects.subject import Subject

app = typer.Typer(no_args_is_help=True, help="Sparse autoencoders: train (one or a grid), resume, eval, compare, import.")
app.add_typer(comparing)  # without a name: `compare` is a command beside the others

DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, or auto (CUDA if there is one).")]
WandbOption = Annotated[Literal["disabled", "offline", "online"], typer.Option("--wandb", help="Log to Weights & Biases.")]


@app.command()
def train(
    model: ModelOption,
    site: Annotated[str, typer.Option("--site", help="Where to read: blocks.12.hook_resid_post, blocks.12.hook_mlp_out, "
                                                     "blocks.12.attn.hook_z; several with commas.")],
    text: TextOption,
    out: OutOption,
    width: Annotated[str, typer.Option("--width", help="Number of latents; several with commas.")] = "4096",
    k: Annotated[str | None, typer.Option("--k", help="Active latents a token (jumprelu: the L0 to aim at), 32 if absent; "
                                                      "several with commas.")] = None,
    architecture: Annotated[str, typer.Option(help="topk, batchtopk, matryoshka, jumprelu, standard (L1) or gated.")] = "topk",
    sparsity: Annotated[str | None, typer.Option(help="Price of sparsity, for standard, gated, and jumprelu without --k; "
                                                      "several with commas.")] = None,
    sparsity_warm_up: Annotated[float, typer.Option(help="Share of the steps over which that price rises.")] = 0.1,
    bandwidth: Annotated[float, typer.Option(help="jumprelu: width of the kernel by which thresholds learn.")] = 0.3,
    prefixes: Annotated[str | None, typer.Option(help="matryoshka: widths of the inner dictionaries, with commas; 1/16, 1/8, "
                                                      "1/4 and 1/2 of the width if absent.")] = None,
    normalize: Annotated[str, typer.Option(help="none, expected_average_only_in or layer_norm.")] = "expected_average_only_in",
    tokens: Annotated[int, typer.Option(help="Distinct activations to train on; fewer if the text has fewer.")] = 1_000_000,
    epochs: Annotated[float, typer.Option(help="How often each activation is seen.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Activations a step, of all processes together.")] = 2048,
    precision: Annotated[str, typer.Option(help="Of the large products: float32, tf32 or bfloat16.")] = "float32",
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; derived from the width if absent.")] = None,
    aux_coefficient: Annotated[float, typer.Option(help="Weight of the AuxK loss that revives dead latents.")] = 1 / 32,
    context: Annotated[int, typer.Option(help="Tokens a row.")] = 256,
    held_out: Annotated[float, typer.Option(help="Share of the documents kept for judging.")] = 0.05,
    eval_tokens: Annotated[int, typer.Option(help="Held-out activations to judge on.")] = 65_536,
    ce_tokens: Annotated[int, typer.Option(help="Held-out tokens for cross-entropy and KL.")] = 8_192,
    store: Annotated[str, typer.Option(help="Type of the stored activations: bfloat16 or float32.")] = "bfloat16",
    memory: Annotated[float | None, typer.Option(help="MB that a site's activations may take during the harvest.")] = None,
    weights: Annotated[str, typer.Option(help="Type of the saved weights: float32 or float16.")] = "float32",
    column: ColumnOption = None,
    chat: ChatOption = False,
    device: DeviceOption = "auto",
    wandb: WandbOption = "disabled",
    seed: SeedOption = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Train each with this many seeds, counting up from --seed.")] = 1,
    json_: JsonOption = False,
) -> None:
    """Harvest activations, train an SAE on them, judge it on held-out text, and save it in sae-lens' format.

    Several sites, widths, k, prices or seeds train the whole grid from one harvest: one folder each in OUT, and an index.
    Says beforehand what it will cost. Ctrl-C and SIGTERM save; `undertow sae resume OUT` goes on. Past one device:
    torchrun --nproc-per-node 2 -m undertow sae train ..., which divides harvest and batches among the processes.
    """
    from sae.spec import RunSpec

    sites, widths = [part.strip() for part in site.split(",")], _numbers("--width", width, int)
    counts, prices = _sparsities(architecture, k, sparsity)
    spec = RunSpec.checked({
        "model": model, "site": sites[0], "tokens": tokens, "eval_tokens": eval_tokens, "ce_tokens": ce_tokens,
        "weights": weights, "seed": seed, "store": {"dtype": store, "memory_mb": memory},
        "text": {"source": text, "column": column, "chat": chat, "context": context, "held_out": held_out},
        "learn": {"width": widths[0], "k": counts and counts[0], "architecture": architecture, "epochs": epochs,
                  "batch_size": batch_size, "lr": lr, "aux_coefficient": aux_coefficient, "normalize": normalize,
                  "precision": precision, "prefixes": prefixes and _numbers("--prefixes", prefixes, int),
                  "penalty": {"coefficient": prices and prices[0], "warm_up": sparsity_warm_up, "bandwidth": bandwidth}}},
        "sae train")
    axes = {"sites": sites, "widths": widths, "sparsities": prices or counts, "seeds": seeds}
    _train(spec, axes, out, (device, wandb, json_))


def _train(spec: RunSpec, axes: dict[str, Any], out: Path, how: tuple[str, str, bool]) -> None:
    from sae.team import joined
    from undertow.core.storage import refuse_existing

    refuse_existing(out)
    alone = axes["seeds"] == 1 and all(len(axes[axis]) == 1 for axis in ("sites", "widths", "sparsities"))
    with joined(how[0]) as team:
        (_train_one if alone else _train_grid)(spec, axes, team, out, how)


def _sparsities(architecture: str, k: str | None, sparsity: str | None) -> tuple[list[int] | None, list[float] | None]:
    """Values of k and prices of sparsity; where neither is given, k = 32 for an architecture that has a k."""
    prices = None if sparsity is None else _numbers("--sparsity", sparsity, float)
    if k is not None:
        return _numbers("--k", k, int), prices
    return ([32] if prices is None and architecture not in ("standard", "gated") else None), prices


def _numbers(option: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    """Numbers with commas between them. Raises SpecError that names the option."""
    from undertow.core.errors import SpecError

    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise SpecError(f"{option} {text!r} is not {'a whole number' if kind is int else 'a number'}, or several with commas",
                        "see undertow sae train --help") from None
    if len(set(found)) < len(found):
        raise SpecError(f"{option} {text!r} names a value twice")
    return found


def _open_subject(model: str, device: str, team: Team) -> Subject:
    from undertow.subjects.load import load_subject

    return load_subject(model, device if team.size == 1 else team.device)


def _train_one(spec: RunSpec, _axes: dict[str, Any], team: Team, out: Path, how: tuple[str, str, bool]) -> None:
    from sae.plan import make_plan, open_inputs
    from sae.run import claim
    from undertow.core.storage import cache_dir

    device, wandb, json_ = how
    team.share_of(spec.learn.batch_size)
    inputs = open_inputs(spec, _open_subject(spec.model, device, team))

    def begin() -> None:
        _announce(make_plan(spec, inputs, cache_dir()), spec)
        claim(out, spec)

    team.first(begin)
    _carry_out(spec, inputs, out, (wandb, json_), team)


def _train_grid(spec: RunSpec, axes: dict[str, Any], team: Team, out: Path, how: tuple[str, str, bool]) -> None:
    from sae.grid import GridSpec, claim_grid, plan_grid
    from undertow.core.storage import cache_dir

    _refuse_team(team)
    subject = _open_subject(spec.model, how[0], team)
    grid = GridSpec.checked({**axes, "base": spec}, "sae train")
    for run in grid.runs().values():  # refused before anything is computed
        run.learn.train_spec(run.tokens, run.seed)
    plan = plan_grid(grid, subject, cache_dir())
    _announce_cost(f"{plan.runs} SAEs of {spec.model} from one harvest: {', '.join(grid.runs())}", plan)
    claim_grid(out, grid)
    _carry_out_grid(grid, subject, out, *how[1:])


def _refuse_team(team: Team) -> None:
    from undertow.core.errors import SpecError

    if team.size > 1:
        raise SpecError(f"a grid is trained by one process, and torchrun started {team.size}",
                        "name one site, width, sparsity and seed, or start it without torchrun")


@app.command()
def resume(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The --out of the run or grid that was interrupted.")],
    device: DeviceOption = "auto",
    wandb: WandbOption = "disabled",
    json_: JsonOption = False,
) -> None:
    """Go on with an interrupted run or grid, from its last saved state."""
    from sae.grid import unfinished_grid
    from sae.plan import open_inputs
    from sae.run import unfinished
    from sae.team import joined

    grid = unfinished_grid(out)
    with joined(device) as team:
        if grid is not None:
            _refuse_team(team)
            _carry_out_grid(grid, _open_subject(grid.base.model, device, team), out, wandb, json_)
            return
        spec = unfinished(out)
        inputs = open_inputs(spec, _open_subject(spec.model, device, team))
        _carry_out(spec, inputs, out, (wandb, json_), team)


def _announce(plan: Plan, spec: RunSpec) -> None:
    _announce_cost(f"{spec.learn.describe()}, at {spec.site} of {spec.model}\n"
                   f"  tokens   {plan.tokens:,} activations, {plan.steps:,} steps of {spec.learn.batch_size:,}", plan)


def _announce_cost(head: str, plan: Plan | GridPlan) -> None:
    from sae.sinks import duration

    console().print(
        f"{head}\n"
        f"  time     about {duration(plan.total_s)}: harvest {duration(plan.harvest_s) if plan.harvest_s else 'cached'}, "
        f"train {duration(plan.train_s)}, judge {duration(plan.judge_s)}\n"
        f"  memory   {plan.memory_bytes / 1e9:.1f} GB beside the subject; disk {plan.disk_bytes / 1e9:.1f} GB in the cache",
        markup=False)


def _sinks(out: Path, wandb: str) -> Sinks:
    """The sinks of the run on its way to `out`."""
    from rich.console import Console

    from sae.run import LOG, partial_folder
    from sae.sinks import open_sinks

    return open_sinks(Console(stderr=True), partial_folder(out) / LOG, wandb, wandb_folder=out.absolute().parent)


def _carry_out(spec: RunSpec, inputs: Inputs, out: Path, shown: tuple[str, bool], team: Team) -> None:
    from sae.run import Interrupted, Watch, run
    from undertow.cli.progress import Phases, stop_requests
    from undertow.core.storage import cache_dir

    if not team.is_first:
        _assist(spec, inputs, out, team)
        return
    wandb, json_ = shown
    with stop_requests() as stop, _sinks(out, wandb) as sinks, Phases() as phases:
        try:
            result = run(spec, inputs, out, cache_dir(), Watch(phases, sinks, stop), team)
        except Interrupted as stopped:
            _say_stopped(stopped.folder, out, json_)
            raise typer.Exit(stop.exit_code) from None
    _print_figures(result.summary, json_)


def _assist(spec: RunSpec, inputs: Inputs, out: Path, team: Team) -> None:
    """The part of every process but the first: no screen, no files."""
    from sae.run import Interrupted, Watch, assist
    from sae.sinks import Sinks
    from undertow.cli.progress import stop_requests
    from undertow.core.storage import cache_dir

    with stop_requests() as stop:
        try:
            assist(spec, inputs, out, cache_dir(), Watch(lambda *_: None, Sinks([]), stop), team)
        except Interrupted:
            raise typer.Exit(stop.exit_code) from None


def _carry_out_grid(spec: GridSpec, subject: Subject, out: Path, wandb: str, json_: bool) -> None:
    from sae.grid import run_grid
    from sae.run import Interrupted, Watch
    from sae.sinks import Sinks
    from undertow.cli.compare import print_table
    from undertow.cli.progress import Phases, stop_requests
    from undertow.core.storage import cache_dir

    with stop_requests() as stop, Phases() as phases:
        try:
            index = run_grid(spec, subject, out, cache_dir(),
                             (Watch(phases, Sinks([]), stop), lambda folder: _sinks(folder, wandb)))
        except Interrupted as stopped:
            _say_stopped(stopped.folder, out, json_)
            raise typer.Exit(stop.exit_code) from None
    if json_:
        emit(index, as_json=True)
        return
    print_table(index["runs"], f"{out} (undertow sae compare {out} shows them side by side)")


def _say_stopped(folder: Path, out: Path, json_: bool) -> None:
    console().print(f"stopped; saved in {folder}. Go on with: undertow sae resume {out}", markup=False)
    if json_:
        emit({"stopped": str(folder), "resume": f"undertow sae resume {out}"}, as_json=True)


@app.command("eval")
def evaluate_(
    sae: SaeArgument,
    model: OptionalModelOption = None,
    site: SiteOption = None,
    text: OptionalTextOption = None,
    column: ColumnOption = None,
    chat: ChatOption = False,
    eval_tokens: Annotated[int | None, typer.Option(help="Held-out activations; those of the card, if absent.")] = None,
    ce_tokens: Annotated[int | None, typer.Option(help="Held-out tokens for cross-entropy and KL.")] = None,
    truth: Annotated[str | None, typer.Option("--truth", help="keeper:400: how well single features recover what is true of so "
                                                              "many stories of the Keeper's world.")] = None,
    same_model: SameModelOption = False,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Judge an SAE on the held-out documents of a text: FVU, L0, dead latents, cross-entropy and KL with its terms.

    Without options this repeats the measurement of the SAE's card. With --truth: for bond, cost, act, word and genre the best
    single feature, chosen on half of the stories and judged on the others, beside the same search with the truth shuffled.
    """
    from sae.evaluation import evaluate
    from sae.formats import load
    from sae.harvesting import Source, StoreSpec
    from sae.plan import open_held_out
    from sae.story_truth import parse_truth
    from undertow.cli.progress import Phases
    from undertow.core.storage import cache_dir

    n_stories = None if truth is None else parse_truth(truth)
    dictionary = load(sae)
    subject, place = open_place(sae, dictionary, Place(model, site, same_model), device)
    provenance = dictionary.provenance
    run = provenance.extra.get("run", {})
    began = time.perf_counter()
    with Phases() as phases:
        source = Source(subject, place, open_held_out(provenance, subject, text, column, chat))
        tokens = eval_tokens or int(run.get("eval_tokens", 65_536)), ce_tokens or int(run.get("ce_tokens", 8_192))
        result = evaluate(dictionary.to(subject.device), source, tokens, cache_dir(), lambda d, t: phases("harvest", d, t),
                          StoreSpec.checked(run.get("store", {}), sae))
        found = _truth(source, dictionary, (n_stories, seed), phases) if n_stories else []
    more = {"truth": [{k: v for k, v in one._asdict().items() if v is not None} for one in found]} if found else {}
    _print_figures({"path": sae, **result.summary(), **more, "wall_s": time.perf_counter() - began}, json_)
    if found and not json_:
        _print_truth(found)


def _truth(source: Source, dictionary: Dictionary, stories: tuple[int, int], phases: Phases) -> list[Found]:
    from sae.story_truth import story_truth, tell

    told = tell(*stories, "word" if source.subject.name == "parrot" else "bond")
    return story_truth(source.subject, source.site, dictionary.to(source.subject.device), told,
                       (source.corpus.spec.chat, stories[1], lambda done, total: phases("stories", done, total)))


def _print_truth(found: list[Found]) -> None:
    from rich.table import Table

    table = Table("variable", "measure", "feature", "read at", "value", "shuffled", "at most", "ceiling", box=None)
    for one in found:
        ceiling = "" if one.ceiling is None else f"{one.ceiling:.3f}"
        table.add_row(one.variable, {"auroc": "AUROC", "r2": "R²"}[one.measure], str(one.feature), one.reading,
                      f"{one.value:.3f}", f"{one.chance:.3f}", f"{one.chance_high:.3f}", ceiling)
    console().print(table)


def _print_figures(summary: dict[str, Any], json_: bool) -> None:
    if json_:
        emit(summary, as_json=True)
        return
    from sae.sinks import duration

    s = summary
    recovered = f", recovered {s['ce_recovered']:.3f}" if "ce_recovered" in s else ""
    lines = [
        f"{s['path']}",
        f"  FVU {s['fvu']:.4f}   L0 {s['l0']:.1f}   dead {100 * s['dead_share']:.2f} %   "
        f"on {s['tokens']:,} held-out activations",
        f"  CE  untouched {s['ce_base']:.4f}, reconstructed {s['ce_recon']:.4f}, mean ablation {s['ce_mean_ablation']:.4f}, "
        f"zero ablation {s['ce_zero_ablation']:.4f} nats{recovered}",
        f"  KL  reconstructed {s['kl_recon']:.4f}, mean ablation {s['kl_mean_ablation']:.4f} nats   "
        f"({s['ce_tokens']:,} tokens)",
        f"  density  {'   '.join(f'{name}: {count:,}' for name, count in s['density_histogram'].items() if count)}",
        f"  left out as massive: {s['massive_tokens']:,} tokens   wall {duration(s['wall_s'])}"]
    console().print("\n".join(lines), markup=False)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="A sae-lens folder, or RELEASE:SAE_ID of sae-lens' registry.")],
    model: ModelOption,
    out: OutOption,
    site: Annotated[str | None, typer.Option("--site", help="Refuse an SAE of another site.")] = None,
    same_model: SameModelOption = False,
    json_: JsonOption = False,
) -> None:
    """Import an SAE that sae-lens opens; refuse one of another width, site or subject."""
    from sae.formats import import_sae
    from undertow.core.storage import refuse_existing
    from undertow.subjects.load import load_subject

    refuse_existing(out)
    subject = load_subject(model, "cpu")
    hook = subject.site(site).name if site else None
    got = import_sae(source, out, subject.name, subject.d_model, hook, subject.digest, same_model)
    for warning in got.warnings:
        console().print(warning, style="yellow", markup=False)
    facts = dataclasses.asdict(got.dictionary.provenance)
    emit({"path": str(got.path), "architecture": got.dictionary.architecture, "d_in": got.dictionary.d_in,
          "d_sae": got.dictionary.d_sae, "hook_name": facts["hook_name"], "model_name": facts["model_name"],
          "warnings": got.warnings}, json_)
