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
from undertow.cli.opening import Place, SaeArgument, SameModelOption, SiteOption, open_place

if TYPE_CHECKING:
    from sae.plan import Inputs, Plan
    from sae.spec import RunSpec

app = typer.Typer(no_args_is_help=True, help="Sparse autoencoders: train, resume, eval, import.")

DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, or auto (CUDA if there is one).")]
WandbOption = Annotated[Literal["disabled", "offline", "online"], typer.Option("--wandb", help="Log to Weights & Biases.")]


@app.command()
def train(
    model: ModelOption,
    site: Annotated[str, typer.Option("--site", help="Where to read, e.g. blocks.12.hook_resid_post.")],
    text: TextOption,
    out: OutOption,
    width: Annotated[int, typer.Option("--width", help="Number of latents.")] = 4096,
    k: Annotated[int, typer.Option("--k", help="Active latents a token.")] = 32,
    architecture: Annotated[str, typer.Option(help="topk or batchtopk (saved as jumprelu).")] = "topk",
    tokens: Annotated[int, typer.Option(help="Distinct activations to train on; fewer if the text has fewer.")] = 1_000_000,
    epochs: Annotated[float, typer.Option(help="How often each activation is seen.")] = 3.0,
    batch_size: Annotated[int, typer.Option(help="Activations a step.")] = 2048,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; derived from the width if absent.")] = None,
    aux_coefficient: Annotated[float, typer.Option(help="Weight of the AuxK loss that revives dead latents.")] = 1 / 32,
    context: Annotated[int, typer.Option(help="Tokens a row.")] = 256,
    held_out: Annotated[float, typer.Option(help="Share of the documents kept for judging.")] = 0.05,
    eval_tokens: Annotated[int, typer.Option(help="Held-out activations to judge on.")] = 65_536,
    ce_tokens: Annotated[int, typer.Option(help="Held-out tokens for cross-entropy and KL.")] = 8_192,
    weights: Annotated[str, typer.Option(help="Type of the saved weights: float32 or float16.")] = "float32",
    column: ColumnOption = None,
    chat: ChatOption = False,
    device: DeviceOption = "auto",
    wandb: WandbOption = "disabled",
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Harvest activations, train an SAE on them, judge it on held-out text, and save it in sae-lens' format.

    Says beforehand what it will cost. Ctrl-C and SIGTERM save; `undertow sae resume OUT` goes on.
    """
    from sae.plan import make_plan, open_inputs
    from sae.run import claim
    from sae.spec import RunSpec
    from undertow.core.storage import cache_dir, refuse_existing
    from undertow.subjects.load import load_subject

    spec = RunSpec.checked({
        "model": model, "site": site, "tokens": tokens, "eval_tokens": eval_tokens, "ce_tokens": ce_tokens,
        "weights": weights, "seed": seed,
        "text": {"source": text, "column": column, "chat": chat, "context": context, "held_out": held_out},
        "learn": {"width": width, "k": k, "architecture": architecture, "epochs": epochs, "batch_size": batch_size,
                  "lr": lr, "aux_coefficient": aux_coefficient}}, "sae train")
    refuse_existing(out)
    inputs = open_inputs(spec, load_subject(model, device))
    _announce(make_plan(spec, inputs, cache_dir()), spec)
    claim(out, spec)
    _carry_out(spec, inputs, out, wandb, json_)


@app.command()
def resume(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The --out of the run that was interrupted.")],
    device: DeviceOption = "auto",
    wandb: WandbOption = "disabled",
    json_: JsonOption = False,
) -> None:
    """Go on with an interrupted run, from its last saved state."""
    from sae.plan import open_inputs
    from sae.run import unfinished
    from undertow.subjects.load import load_subject

    spec = unfinished(out)
    _carry_out(spec, open_inputs(spec, load_subject(spec.model, device)), out, wandb, json_)


def _announce(plan: Plan, spec: RunSpec) -> None:
    from sae.sinks import duration

    console().print(
        f"{spec.learn.architecture}, {spec.learn.width:,} latents, k = {spec.learn.k}, at {spec.site} of {spec.model}\n"
        f"  tokens   {plan.tokens:,} activations, {plan.steps:,} steps of {spec.learn.batch_size:,}\n"
        f"  time     about {duration(plan.total_s)}: harvest {duration(plan.harvest_s) if plan.harvest_s else 'cached'}, "
        f"train {duration(plan.train_s)}, judge {duration(plan.judge_s)}\n"
        f"  memory   {plan.memory_bytes / 1e9:.1f} GB beside the subject; disk {plan.disk_bytes / 1e9:.1f} GB in the cache",
        markup=False)


def _carry_out(spec: RunSpec, inputs: Inputs, out: Path, wandb: str, json_: bool) -> None:
    from rich.console import Console

    from sae.run import LOG, Interrupted, Watch, partial_folder, run
    from sae.sinks import open_sinks
    from undertow.cli.progress import Phases, stop_requests
    from undertow.core.storage import cache_dir

    folder = out.absolute().parent
    sinks = open_sinks(Console(stderr=True), partial_folder(out) / LOG, wandb, wandb_folder=folder)
    with stop_requests() as stop, sinks, Phases() as phases:
        try:
            result = run(spec, inputs, out, cache_dir(), Watch(phases, sinks, stop))
        except Interrupted as stopped:
            console().print(f"stopped; saved in {stopped.folder}. Go on with: undertow sae resume {out}", markup=False)
            if json_:
                emit({"stopped": str(stopped.folder), "resume": f"undertow sae resume {out}"}, as_json=True)
            raise typer.Exit(stop.exit_code) from None
    _print_figures(result.summary, json_)


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
    same_model: SameModelOption = False,
    device: DeviceOption = "auto",
    json_: JsonOption = False,
) -> None:
    """Judge an SAE on the held-out documents of a text: FVU, L0, dead latents, cross-entropy and KL with its terms.

    Without options this repeats the measurement of the SAE's card.
    """
    from sae.evaluation import evaluate
    from sae.formats import load
    from sae.harvesting import Source
    from sae.plan import open_held_out
    from undertow.cli.progress import Phases
    from undertow.core.storage import cache_dir

    dictionary = load(sae)
    subject, place = open_place(sae, dictionary, Place(model, site, same_model), device)
    provenance = dictionary.provenance
    run = provenance.extra.get("run", {})
    began = time.perf_counter()
    with Phases() as phases:
        source = Source(subject, place, open_held_out(provenance, subject, text, column, chat))
        result = evaluate(dictionary.to(subject.device), source, eval_tokens or int(run.get("eval_tokens", 65_536)),
                          ce_tokens or int(run.get("ce_tokens", 8_192)), cache_dir(), lambda d, t: phases("harvest", d, t))
    _print_figures({"path": sae, **result.summary(), "wall_s": time.perf_counter() - began}, json_)


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
