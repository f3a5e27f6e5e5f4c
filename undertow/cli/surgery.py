"""A subject with or without a recipe: the same for every command that writes text under one, and the view of what differs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.text import Text

from undertow.cli.opening import Place, open_place
from undertow.core.errors import EditError, SpecError

if TYPE_CHECKING:
    from interventions.recipe import Recipe
    from sae.dictionary import Dictionary
    from undertow.studies.stories import Piece
    from undertow.subjects.sampling import Choice, Generated, Sampling
    from undertow.subjects.subject import Subject

RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="A recipe (YAML) to operate by; needs --sae.")]
SaeOption = Annotated[str | None, typer.Option("--sae", help="The recipe's SAE: a folder, or a packaged name.")]
AT_ONCE = 64  # texts sampled in one batch
MARKS = "«", "»"  # round changed words where there is no colour to mark them


class Surgery(NamedTuple):
    """A recipe with the SAE whose latents it names."""

    recipe: Recipe
    dictionary: Dictionary


class Written(NamedTuple):
    """Texts, and the tokens at which the recipe fired, of those at which it could have (0 of 0 without a recipe)."""

    texts: list[Generated]
    firings: int
    positions: int


def open_subject(model: str | None, recipe: Path | None, sae: str | None, same_model: bool) -> tuple[Subject, Surgery | None]:
    """The subject, and the recipe if one is named, checked against it; warnings about the fit are shown.

    Raises SpecError for a recipe without its SAE, an SAE without a recipe, and for neither a model nor a recipe.
    """
    from undertow.subjects.load import load_subject

    if (recipe is None) != (sae is None):
        raise SpecError(f"--recipe {recipe} was given without its SAE" if sae is None else f"--sae {sae} was given without "
                        "a recipe", "add --sae FOLDER" if sae is None else "add --recipe FILE")
    if recipe is None or sae is None:
        if model is None:
            raise SpecError("no model was named", "add --model NAME (undertow subject list)")
        return load_subject(model), None
    from interventions.recipe import Recipe, check
    from sae.formats import load

    read, dictionary = Recipe.load(recipe), load(sae)
    subject, _ = open_place(sae, dictionary, Place(model, read.site, same_model))
    check(read, subject, dictionary)
    return subject, Surgery(read, dictionary)


def write_on(subject: Subject, surgery: Surgery | None, prompts: Sequence[Sequence[int]], sampling: Sampling,
             seeds: Sequence[int], choice: Choice | None = None) -> Written:
    """Continue prompts, under the recipe if there is one. A recipe that fires nowhere is reported as 0 firings."""
    from interventions.applying import apply
    from undertow.subjects.sampling import generate

    if surgery is None:
        return Written(generate(subject, prompts, sampling, seeds, choice), 0, 0)
    written: Written | None = None
    try:
        with apply(surgery.recipe, subject, surgery.dictionary) as operated:
            operated.announce(max(map(len, prompts)) - 1)
            texts = generate(subject, prompts, sampling, seeds, choice)
            written = Written(texts, operated.firings, operated.positions)
    except EditError:
        if written is None:
            raise
    return written


def marked(pieces: Sequence[Piece], styled: bool) -> Text:
    """A text whose changed words are bold and underlined, or in MARKS if not `styled`. A terminal obeys nothing in it."""
    text = Text()
    for piece in pieces:
        shown, core = safe(piece.text), safe(piece.text.strip())
        if not piece.changed or not core:
            text.append(shown)
        elif styled:
            text.append(shown, style="bold underline")
        else:
            text.append(shown.replace(core, core.join(MARKS), 1))
    return text


def safe(text: str) -> str:
    """`text` with its lines kept and every other control character spelt out."""
    from features.wording import printable

    return "\n".join(map(printable, text.split("\n")))


def write_result(out: Path, kind: str, surgery: Surgery | None, result: dict[str, Any], spec: dict[str, Any]) -> None:
    """Write the result of a command (which holds its `model` and `seed`) as an artifact, with the recipe beside it."""
    from undertow.core.record import run_record
    from undertow.core.storage import create_artifact, write_json

    recipe = None if surgery is None else surgery.recipe.digest()
    with create_artifact(out, kind, run_record({"model": result["model"], "recipe": recipe, **spec}, result["seed"])) as work:
        if surgery is not None:
            surgery.recipe.save(work / "recipe.yaml")
        write_json(work / "result.json", result)
