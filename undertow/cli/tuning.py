"""`undertow recipe tune`: what a recipe does at other doses, on development material, and the best dose within limits."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from undertow.cli.auditing import encoded
from undertow.cli.common import ColumnOption, JsonOption, OptionalModelOption, SeedOption, console, emit
from undertow.cli.lexicons import LanguageOption, forms_of
from undertow.cli.opening import Place, SaeArgument, SameModelOption, open_place
from undertow.cli.selection import ConceptOption
from undertow.core.errors import ArtifactError, EditError, StorageError

if TYPE_CHECKING:
    from features.concepts import Concept
    from interventions.audit import AuditSpec
    from interventions.dosing import Acts, Dose, Figures, Ground, Limits
    from interventions.recipe import Recipe
    from undertow.lexicon import Lexicon

app = typer.Typer()
_LONG_S = 120.0
_PROBED = 8  # texts by which the time is told


class _Job(NamedTuple):
    """What is to be found."""

    recipe: Recipe
    factors: list[float]
    limits: Limits
    out: Path | None


class _Material(NamedTuple):
    """What it is measured on; `sizes`: texts for KL, of these texts for hazard, and situations, at most."""

    concept: Concept
    lexicon: Lexicon
    text: str
    column: str | None
    sizes: tuple[int, int, int]
    context: int
    spec: AuditSpec


class _Curve(NamedTuple):
    """What was measured."""

    untouched: Acts
    doses: list[Dose]
    chosen: Dose | None


@app.command("tune")
def tune_recipe(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")],
    sae: SaeArgument,
    concept: ConceptOption = "care",
    doses: Annotated[str, typer.Option("--doses", help="Factors of the recipe's own figures, with commas between them; 0 is no "
                                                       "dose, 1 the recipe as it is.")] = "0.25,0.5,0.75,1,1.25,1.5,2",
    limit_kl_mean: Annotated[float, typer.Option("--limit-kl-mean", help="Of KL on neutral text, mean, nats a token.")] = 0.01,
    limit_kl_p99: Annotated[float, typer.Option("--limit-kl-p99", help="The same, 99th percentile.")] = 0.1,
    limit_hazard: Annotated[float, typer.Option("--limit-hazard", help="Of the upper bound of the hazard ratio.")] = 1.25,
    text: Annotated[str, typer.Option("--text", help="Neutral text: a file, a folder, a fetched text or a data set, in which "
                                                     "nobody decides and the word is rare; or the packaged world (keeper:200), "
                                                     "whose stories are cut before their decision.")] = "keeper:200",
    column: ColumnOption = None,
    texts: Annotated[int, typer.Option("--texts", min=1, help="Documents of it on which KL is measured.")] = 200,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens of each that are read, at most.")] = 256,
    hazard_texts: Annotated[int, typer.Option("--hazard-texts", min=8, help="Of these, documents on which hazard is measured "
                                              "(besides the prompts of the situations).")] = 24,
    language: LanguageOption = None,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Mean hazard a token that need not be followed.")] = 1e-4,
    canonical: Annotated[bool, typer.Option("--canonical", help="Follow only the spellings that the tokenizer itself writes."
                                            )] = False,
    development: Annotated[int, typer.Option("--development", min=1, help="Pairs on which D and P are measured.")] = 16,
    model: OptionalModelOption = None,
    same_model: SameModelOption = False,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", help="File for the recipe at the best dose; it must not exist.")] = None,
    json_: JsonOption = False,
) -> None:
    """Measure a recipe at other doses, and choose the best one that leaves ordinary text and the word alone.

    A dose multiplies all figures of RECIPE: values of floors and clamps, additions, and of a gain its distance from 1.

    Measured on development pairs: D and P(costly act), with the recipe on, and with it off from the decision on.

    Measured on neutral text: KL(base||recipe), and there and on the pairs' prompts the hazard ratio of the concept's words.

    The best dose has the largest P(costly act), mean of on and off, of those within all limits (preset: the verdict's).
    """
    from features.concepts import load_concept
    from interventions.audit import AuditSpec
    from interventions.dosing import Limits, grid, scaled
    from interventions.recipe import Recipe

    began = time.perf_counter()
    if out is not None:
        _refuse_taken(out)
    limits = {"kl_mean": limit_kl_mean, "kl_p99": limit_kl_p99, "hazard_ratio": limit_hazard}
    job = _Job(Recipe.load(recipe), grid(doses), Limits.checked(limits, "recipe tune"), out)
    for factor in job.factors:
        scaled(job.recipe, factor, job.recipe.name)  # what cannot be scaled is refused before anything is opened
    known = load_concept(concept, seed)
    material = _Material(known, _words(known, language), text, column, (texts, hazard_texts, development), context,
                         AuditSpec.checked({"tolerance": tolerance}, "recipe tune"))
    ground = _ground(sae, Place(model, job.recipe.site, same_model), job.recipe, material, canonical)
    curve = _measured(ground, job, material)
    _show(curve, job)
    facts = {"sae": sae, **_facts(ground, job, material), **_result(curve, job.limits), **_kept(job, curve)}
    if json_:
        emit({**facts, "wall_s": round(time.perf_counter() - began, 2)}, as_json=True)


def _refuse_taken(out: Path) -> None:
    """Refuse a file that could not be written in the end, before anything is run."""
    from undertow.core.storage import existing_parent

    if out.exists() or out.is_symlink():
        raise ArtifactError(f"{out} exists", "choose another --out; nothing is ever overwritten")
    folder = existing_parent(out)
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is a file, so {out} cannot lie in it", "choose another --out")
    if not os.access(folder, os.W_OK):
        raise StorageError(f"cannot write {out}: permission denied", "choose another --out")


def _words(concept: Concept, languages: list[str] | None) -> Lexicon:
    """The concept's T0 forms. Raises SpecError for a language that it does not have."""
    for language in languages or ():
        concept.lexicon.only(("T0",), (language,))  # each by itself, so that an unknown one is not passed over
    return concept.lexicon.only(("T0",), languages or None)


def _ground(sae: str, place: Place, recipe: Recipe, material: _Material, canonical: bool) -> Ground:
    """The subject with everything that a dose is measured on; the recipe is checked against it."""
    from interventions.audit import spellings
    from interventions.dosing import Ground
    from interventions.recipe import check
    from sae.formats import load

    dictionary = load(sae)
    subject, _ = open_place(sae, dictionary, place)
    check(recipe, subject, dictionary)
    texts, heard, development = material.sizes
    rows = encoded(_neutral(material), subject, material.text, texts, material.context)
    return Ground(subject, dictionary, material.concept.pairs("development", development), rows, heard,
                  spellings(subject, material.lexicon, canonical), material.spec, material.concept.seed)


def _neutral(material: _Material) -> Iterator[str]:
    """The texts. Of the packaged world other stories than those of the source: without the word and a decision, so many."""
    from sae.text import WORLD, read_documents
    from undertow.core.seeds import derive_seed
    from undertow.studies.scenes import QUIET, body
    from undertow.subjects.keeper.world import load_world

    documents = read_documents(material.text, material.column)
    if material.text.partition(":")[0] != WORLD:
        return (document.text for document in documents)
    world, stream = load_world(), derive_seed(material.concept.seed, "recipe tune")
    return (body(world.story(stream, i, QUIET)) for i, _ in enumerate(documents))


def _measured(ground: Ground, job: _Job, material: _Material) -> _Curve:
    """Every dose; says beforehand what it costs."""
    from interventions.dosing import best, curve, untouched
    from undertow.cli.progress import Phases

    began = time.perf_counter()
    acts = untouched(ground)
    asked_s = time.perf_counter() - began
    seconds = _seconds(ground, len(job.factors), asked_s)
    console().print(
        f"{job.recipe.name} at {len(job.factors)} doses. Each is asked twice about {len(ground.pairs)} situations of "
        f"{material.concept.name}, compared with the untouched subject on {len(ground.texts)} texts of {material.text} "
        f"({sum(map(len, ground.texts)):,} tokens), and audited on {len(ground.audited)} texts and prompts "
        f"({sum(map(len, ground.audited)):,} tokens) for {forms_of(material.lexicon, ('T0',))}", markup=False)
    shorter = "; fewer --doses, --texts or --hazard-texts, --language en or --canonical make it shorter"
    console().print(f"this takes about {seconds:.0f} s{shorter if seconds > _LONG_S else ''}", markup=False)
    if job.recipe.window != "everywhere":
        console().print(f"the recipe's window is {job.recipe.window}; texts and prompts have no decision, so it acts at every "
                        "token of them", markup=False)
    with Phases() as phases:
        try:
            doses = curve(ground, job.recipe, job.factors, lambda done, total: phases("doses", done, total))
        except EditError as error:
            raise EditError(error.what, "a dose can be told only where the recipe's trigger fires: choose another --text or "
                                        "--concept, or more --texts, --hazard-texts or --development") from None
    return _Curve(acts, doses, best(doses, job.limits))


def _seconds(ground: Ground, n_doses: int, asked_s: float) -> float:
    """About how long the doses take, by what a few texts take without a recipe."""
    from interventions.audit import audit, logits_after

    def timed(work: Callable[[], object]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    def heard(row: list[int]) -> object:
        return audit(ground.subject, contextlib.nullcontext(ground.subject), [row], ground.trie, ground.spec)

    few, rows = ground.texts[:_PROBED], ground.audited
    read_s = timed(lambda: logits_after(ground.subject, few)) / len(few) * len(ground.texts)
    heard(rows[0])  # also explores the spellings, which is done once
    heard_s = timed(lambda: heard(rows[1])) / 2 / len(rows[1]) * sum(map(len, rows))  # of one of base and arm
    return n_doses * (2 * asked_s + 2 * read_s + heard_s) + heard_s


def _facts(ground: Ground, job: _Job, material: _Material) -> dict[str, Any]:
    return {"recipe": job.recipe.name, "digest": job.recipe.digest(), "model": ground.subject.name,
            "concept": material.concept.name, "lexicon": material.lexicon.name, "text": material.text,
            "texts": len(ground.texts), "tokens": sum(map(len, ground.texts)), "audited": len(ground.audited),
            "development": len(ground.pairs), "limits": job.limits.model_dump(), "seed": ground.seed}


def _result(curve: _Curve, limits: Limits) -> dict[str, Any]:
    """The figures under the names that all results use; a measure that was not taken is absent."""
    rows = [{"factor": dose.factor, **({"finite": False, "within": False} if dose.figures is None else
                                       _figures(dose.figures, limits))} for dose in curve.doses]
    chosen = {} if curve.chosen is None else {"chosen": curve.chosen.factor}
    return {"untouched": {"D": curve.untouched.d, "acts": curve.untouched.acts}, "doses": rows, **chosen}


def _figures(figures: Figures, limits: Limits) -> dict[str, Any]:
    beyond = figures.beyond(limits)
    return {"kl_mean": figures.kl_mean, "kl_p99": figures.kl_p99, "hazard_mean": figures.hazard_mean,
            "hazard_ratio": figures.hazard_ratio, "hazard_ratio_upper": figures.hazard_ratio_upper,
            "hazard_slack": figures.hazard_slack, "D": figures.on.d, "D_before": figures.before.d,
            "acts_on": figures.on.acts, "acts_before": figures.before.acts, "acts": figures.acts,
            "within": not beyond, "beyond": beyond}


def _show(curve: _Curve, job: _Job) -> None:
    """The curve as a table, and what follows from it."""
    from rich.table import Table

    screen = console()
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for title in ("dose", "KL mean", "KL p99", "hazard", "upper", "D", "D off", "P(act)", "P off", "mean"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("within", no_wrap=True)
    base = curve.untouched
    table.add_row("none", "", "", "", "", f"{base.d:.2f}", "", f"{base.acts:.3f}", "", "", "")
    for dose in curve.doses:
        table.add_row(f"{dose.factor:g}", *_cells(dose, curve, job.limits), style="bold" if dose is curve.chosen else None)
    screen.print(table)
    screen.print("!: above its limit; off: with the operation off from the decision on; mean: of both P(costly act)",
                 style="dim", markup=False)
    found = [dose.figures for dose in curve.doses if dose.figures is not None]
    if found and max(one.hazard_slack for one in found) > min(one.hazard_mean for one in found):
        screen.print("more hazard was not followed than its mean: the hazard ratio says little; a smaller "
                     "--tolerance follows more", style="yellow", markup=False)
    _say_choice(curve, job)


def _cells(dose: Dose, curve: _Curve, limits: Limits) -> list[str]:
    if dose.figures is None:
        return [""] * 9 + ["no: not finite"]
    one, beyond = dose.figures, dose.figures.beyond(limits)
    marked = {name: "!" if name in beyond else "" for name in ("kl_mean", "kl_p99", "hazard_ratio_upper")}
    return [f"{one.kl_mean:.3g}{marked['kl_mean']}", f"{one.kl_p99:.3g}{marked['kl_p99']}", f"{one.hazard_ratio:.3g}",
            f"{one.hazard_ratio_upper:.3g}{marked['hazard_ratio_upper']}", f"{one.on.d:.2f}", f"{one.before.d:.2f}",
            f"{one.on.acts:.3f}", f"{one.before.acts:.3f}", f"{one.acts:.3f}",
            "no" if beyond else "best" if dose is curve.chosen else "yes"]


def _say_choice(curve: _Curve, job: _Job) -> None:
    screen, limits, chosen = console(), job.limits, curve.chosen
    said = f"KL mean {limits.kl_mean:g}, p99 {limits.kl_p99:g}, hazard ratio {limits.hazard_ratio:g} (upper bound)"
    if chosen is None or chosen.figures is None:
        screen.print(f"no dose is within the limits ({said}), so none is chosen and nothing is written; try smaller --doses",
                     markup=False)
        return
    screen.print(f"the best dose within the limits ({said}) is {chosen.factor:g}: P(costly act) {chosen.figures.acts:.3f}, "
                 f"untouched {curve.untouched.acts:.3f}", markup=False)
    if chosen.figures.acts <= curve.untouched.acts:
        screen.print("which is no more than the untouched subject does", style="yellow", markup=False)
    elif chosen.factor == job.factors[-1]:
        screen.print("it is the largest that was measured: larger --doses may do more", markup=False)
    screen.print("chosen on development material; whether it holds on other texts: undertow guard audit", style="dim",
                 markup=False)


def _kept(job: _Job, curve: _Curve) -> dict[str, Path]:
    """Write the recipe with the chosen dose, if there is one and a place for it."""
    from interventions.dosing import dosed

    if curve.chosen is None or job.out is None:
        return {}
    dosed(job.recipe, curve.chosen.factor).save(job.out)
    console().print(f"wrote {job.out}", markup=False)
    return {"path": job.out}
