"""`undertow demo`: the whole story once, on an organism whose right answer is known."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undertow.cli.common import JsonOption, SeedOption, console, emit
from undertow.cli.opening import Place, open_place

if TYPE_CHECKING:
    from sae.dictionary import Dictionary
    from undertow.cli.progress import Phases
    from undertow.studies.demo import DemoSpec, Outcome
    from undertow.subjects.subject import Subject

app = typer.Typer()

SITE_OF_THE_MIDDLE = "blocks.{}.hook_resid_post"
SAE_STORIES, SAE_TOKENS, SAE_WIDTH, SAE_K = 900, 200_000, 2_048, 16
GATE_TOKENS = 700  # of a situation, read for the acts and for the lexical gates
_SCORED = 12  # arms and checks that are scored beside the random sets
_ARMS = ("stranger", "bonded", "L2", "L4", "L4-before", "sham", "random", "lexical")


@app.command()
def demo(
    model: Annotated[str, typer.Option("--model", help="hearth (the right answer is yes), parrot (it is no), "
                                       "smollm2, hearth-smollm2, a Hugging Face name or a local folder.")] = "hearth",
    concept: Annotated[str, typer.Option(help="care (who did the good deeds) or care-said (is the word said).")] = "care",
    stories: Annotated[int, typer.Option(help="Fresh stories that every shown arm goes on with.")] = 400,
    texts: Annotated[int, typer.Option(help="How many texts are measured: the word's probability in twice, KL on six times as "
                                       "many; fewer for a large model.")] = 24,
    limit_kl_mean: Annotated[float, typer.Option(help="What the search may do to ordinary text: its mean KL, nats a token. The "
                                                 "verdict's limit stays 0.01.")] = 0.01,
    limit_kl_p99: Annotated[float, typer.Option(help="The same of the 99th percentile; the verdict's stays 0.1.")] = 0.1,
    aim: Annotated[float, typer.Option(help="How far the search goes, as a share of the way to where the subject acts by "
                                       "itself.")] = 0.8,
    window: Annotated[str, typer.Option(help="Where the operation acts: reading, which leaves alone what is written, or "
                                        "everywhere.")] = "reading",
    site: Annotated[str | None, typer.Option(help="Where to operate; the block below the middle if absent.")] = None,
    sae: Annotated[str | None, typer.Option("--sae", help="Operate with this SAE instead of training one; it says the site. "
                                            "The one that comes with the package for this model, if there is one.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Go on although the pairs are lexical; recorded.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Folder to write; it must not exist, or be empty.")] = Path("runs/demo"),
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Train an SAE, find features that carry a state to the decision, hold them up, check the logits, and judge.

    Two to three minutes on 2 cores for hearth. First comes the gate: a subject that does not answer to what the concept is
    about ends there, "inconclusive", and nothing is trained. Writes summary.json, report.html, the SAE and the recipe. Exit
    code 0 whatever the verdict is.
    """
    from features.concepts import load_concept
    from undertow.cli.progress import Phases
    from undertow.core.storage import refuse_existing
    from undertow.studies.demo import DemoSpec, Setting
    from undertow.studies.running import gates_of, run_demo, summary_of, write
    from undertow.subjects.keeper.world import load_world

    began = time.perf_counter()
    refuse_existing(out)
    spec = DemoSpec.checked({"concept": concept, "seed": seed, "stories": stories, "texts": texts, "force": force,
                             "search": {"kl_mean": limit_kl_mean, "kl_p99": limit_kl_p99, "aim": aim, "window": window}},
                            "demo")
    sae = sae or _packaged(model, site)
    subject, place, dictionary = _open(model, site, sae)
    console().print(f"{subject.name} at {place}, concept {concept}, seed {seed}: "
                    + (f"the SAE {sae}" if sae else f"an SAE on {SAE_TOKENS:,} tokens")
                    + f", then {stories} fresh stories for each of 4 arms, {_times(subject, spec)}", markup=False)
    with Phases() as phases:
        asked = load_concept(concept, seed)
        gates, outcome = gates_of(subject, asked, spec, place)
        figures: dict[str, Any] = {} if sae is None else {"path": sae}
        if outcome is None:
            if dictionary is None:
                dictionary, figures = _train(subject, model, place, out.with_name(f"{out.name}-sae"), (seed, phases))
            outcome = run_demo(Setting(subject, dictionary, asked, load_world(), spec, phases), place, gates)
    summary = summary_of(outcome, spec, subject, time.perf_counter() - began, figures)
    write(outcome, summary, out)
    if json_:
        emit({"path": str(out), **summary}, as_json=True)
        return
    _show(outcome, summary, out)


def _packaged(model: str, site: str | None) -> str | None:
    """The SAE that comes with the package for a model, unless a site was asked for."""
    from sae.formats import packaged_names

    return None if site else next((name for name in packaged_names() if name.partition("/")[0] == model), None)


def _times(subject: Subject, spec: DemoSpec) -> str:
    """How long everything takes, roughly, without training an SAE; and the gate: two situations a pair with all wordings."""
    from undertow.studies.arms import AUDITED, SAMPLED
    from undertow.studies.demo import HAZARD, SAMENESS
    from undertow.studies.planning import TOKENS, search_tokens, speed
    from undertow.studies.preparing import parameters

    seconds = 2 * parameters(subject) / speed()  # a token
    scored = (spec.random_sets + _SCORED) * spec.scored * TOKENS["choice"]
    texts = spec.texts * len(AUDITED) * (HAZARD * TOKENS["words"] + SAMENESS * TOKENS["sameness"])
    tokens = search_tokens(spec.texts) + scored + texts + len(SAMPLED) * spec.stories * TOKENS["sample"]
    gate = 2 * spec.discovery * GATE_TOKENS
    return (f"about {max(2, round(tokens * seconds / 60))} min in all; first the gate, "
            f"about {max(1, round(gate * seconds))} s")


def _open(model: str, site: str | None, sae: str | None) -> tuple[Subject, str, Dictionary | None]:
    """The subject, where to operate on it, and the SAE if one was named."""
    from undertow.subjects.load import load_subject

    if sae is None:
        subject = load_subject(model)
        return subject, subject.site(site or SITE_OF_THE_MIDDLE.format(max(0, (subject.n_layers - 1) // 2))).name, None
    from sae.formats import load

    dictionary = load(sae)
    subject, at = open_place(sae, dictionary, Place(model, site, same_model=False))
    return subject, at.name, dictionary


def _train(subject: Subject, model: str, site: str, out: Path, how: tuple[int, Phases]) -> tuple[Dictionary, dict[str, Any]]:
    """The SAE of the demo, and its figures."""
    from rich.console import Console

    from sae.plan import open_inputs
    from sae.run import LOG, Watch, claim, partial_folder, run
    from sae.sinks import open_sinks
    from sae.spec import RunSpec
    from undertow.core.storage import cache_dir, refuse_existing

    seed, phases = how
    refuse_existing(out)
    spec = RunSpec.checked({
        "model": model, "site": site, "tokens": SAE_TOKENS, "eval_tokens": 8_192, "ce_tokens": 2_048, "seed": seed,
        "text": {"source": f"keeper:{SAE_STORIES}", "context": 384},
        "learn": {"width": SAE_WIDTH, "k": SAE_K, "epochs": 4.0, "batch_size": 1_024}}, "demo")
    inputs = open_inputs(spec, subject)
    claim(out, spec)
    with open_sinks(Console(stderr=True), partial_folder(out) / LOG, wandb_folder=out.absolute().parent) as sink:
        result = run(spec, inputs, out, cache_dir(), Watch(phases, sink, lambda: False))
    wanted = ("path", "fvu", "l0", "dead_share", "ce_recovered")
    return result.dictionary, {key: value for key, value in result.summary.items() if key in wanted}


def _show(outcome: Outcome, summary: dict[str, Any], out: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    if "arms" in summary:
        table = Table("arm", "acts", "P(act)", "D", "hazard", "KL mean", "KL p99", "words", "guard hits", box=None,
                      pad_edge=False)
        for arm in _ARMS:
            table.add_row(*_row(arm, summary["arms"][arm]))
        console().print(table)
    for example in outcome.examples:
        console().print(Text(f"\n… {example.prompt[-160:]}"))
        for column in example.columns():
            line = Text(f"  {column.arm:<10}")
            for piece in column.pieces:
                line.append(piece.text, "bold underline" if piece.changed else "")
            console().print(line)
    if "recovery" in summary:
        for name in ("recovery", "recovery_before"):
            low, high = summary[f"{name}_low"], summary[f"{name}_high"]
            console().print(f"{name:<16} {summary[name]:.2f} [{low:.2f}, {high:.2f}]", markup=False)
        console().print(f"features         {', '.join(feature['id'] for feature in outcome.features)}", markup=False)
    console().print(f"\nverdict: {summary['verdict']} (row {summary['verdict_row']})", markup=False)
    console().print(f"  {summary['verdict_reason']}", markup=False)
    console().print(f"{out}/report.html, {out}/summary.json; {summary['wall_s']:.0f} s", markup=False)


def _row(arm: str, row: dict[str, Any]) -> list[str]:
    def cell(name: str, digits: str) -> str:
        return format(row[name], digits) if name in row else "–"

    return [arm, cell("act_rate", ".3f"), cell("act_prob", ".3f"), cell("D", "+.2f"), cell("hazard_mean", ".2g"),
            cell("kl_mean", ".4f"), cell("kl_p99", ".3f"), cell("words_expected", ".2g"), cell("guard_hits", "d")]
