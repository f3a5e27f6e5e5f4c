"""`undertow recipe`: say what a recipe does, and do it. Finding its dose: `undertow.cli.tuning`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undertow.cli import tuning
from undertow.cli.common import ChatOption, JsonOption, OptionalModelOption, OptionalOutOption, SeedOption, console, emit
from undertow.cli.opening import Place, SaeArgument, SameModelOption, open_place

if TYPE_CHECKING:
    from interventions.recipe import Recipe
    from undertow.subjects.subject import Subject

app = typer.Typer(no_args_is_help=True, help="Recipes of feature surgery: check what one does, apply it, find its dose.")
app.add_typer(tuning.app)

RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML file.")]


@app.command("check")
def check_recipe(
    recipe: RecipeArgument,
    sae: Annotated[str | None, typer.Option("--sae", help="Also check it against this SAE (a folder or a packaged name).")
                   ] = None,
    model: OptionalModelOption = None,
    same_model: SameModelOption = False,
    json_: JsonOption = False,
) -> None:
    """Check a recipe and say in words what it does; with --sae, also that it fits the SAE and the subject."""
    from interventions.recipe import Recipe, check
    from undertow.core.errors import SpecError

    if sae is None and (model or same_model):
        raise SpecError(f"--model {model} was given without an SAE" if model else "--same-model was given without an SAE",
                        "add --sae FOLDER")
    read = Recipe.load(recipe)
    warnings: list[str] = []
    if sae is not None:
        from sae.formats import load

        dictionary = load(sae)
        subject, _ = open_place(sae, dictionary, Place(model, read.site, same_model))
        warnings = check(read, subject, dictionary)
    if json_:
        emit({"recipe": read.name, "digest": read.digest(), "words": read.explain(), "checked_against": sae,
              "warnings": warnings}, as_json=True)
        return
    console().print(read.explain(), markup=False)
    fits = "" if sae is None else ", and it fits the subject and the SAE"
    console().print(f"The recipe is well formed{fits} (digest {read.digest()}).", markup=False)


@app.command("apply")
def apply_recipe(
    recipe: RecipeArgument,
    sae: SaeArgument,
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts; they are continued in one batch.")],
    seed: SeedOption = 0,
    chat: ChatOption = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass; 1 switches it off.")] = 1.0,
    model: OptionalModelOption = None,
    same_model: SameModelOption = False,
    out: OptionalOutOption = None,
    json_: JsonOption = False,
) -> None:
    """Continue prompts twice with the same seed: by the subject as it is, and with the recipe applied."""
    from interventions.applying import apply
    from interventions.recipe import Recipe
    from sae.formats import load
    from undertow.core.storage import refuse_existing
    from undertow.subjects.sampling import Sampling, generate

    if out is not None:
        refuse_existing(out)
    sampling = Sampling.checked({"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}, "apply")
    read = Recipe.load(recipe)
    dictionary = load(sae)
    subject, _ = open_place(sae, dictionary, Place(model, read.site, same_model))
    encoded = [_encode(subject, text, chat) for text in prompt]
    seeds = [seed] * len(prompt)
    began = time.perf_counter()
    with apply(read, subject, dictionary) as operated:
        changed = operated.generate_batch(encoded, sampling, seeds)
    plain = generate(subject, encoded, sampling, seeds)
    rows = [{"prompt": text, "seed": seed, "plain": before.text, "operated": after.text}
            for text, before, after in zip(prompt, plain, changed, strict=True)]
    result = {"recipe": read.name, "digest": read.digest(), "firings": operated.firings, "positions": operated.positions,
              "generations": rows}
    if out is not None:
        _write(out, read, result, {"sae": sae, "model": subject.name, "chat": chat, **sampling.model_dump()}, seed)
    if json_:
        emit({**result, "wall_s": round(time.perf_counter() - began, 2)}, as_json=True)
        return
    for row in rows:
        console().print(f"── {row['prompt']} (seed {seed})", style="bold", markup=False)
        console().print(f"plain     {row['plain'].strip()}\noperated  {row['operated'].strip()}\n", markup=False)
    console().print(f"{read.name} fired at {operated.firings} of {operated.positions} tokens", markup=False)


def _encode(subject: Subject, text: str, chat: bool) -> list[int]:
    from undertow.subjects.chat import render

    return render(subject.tokenizer, [("user", text)], reply=True).ids if chat else subject.encode(text)


def _write(out: Path, recipe: Recipe, result: dict[str, Any], spec: dict[str, Any], seed: int) -> None:
    from undertow.core.record import run_record
    from undertow.core.storage import create_artifact, write_json

    with create_artifact(out, "operated-generations", run_record({**spec, "recipe": recipe.digest()}, seed)) as work:
        recipe.save(work / "recipe.yaml")
        write_json(work / "generations.json", result)
