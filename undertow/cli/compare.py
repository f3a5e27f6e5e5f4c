"""`undertow sae compare`: several SAEs on the same held-out tokens, side by side, with their overlap and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undertow.cli.common import ChatOption, ColumnOption, JsonOption, OptionalModelOption, OptionalTextOption, console, emit
from undertow.cli.opening import Place, SameModelOption, open_place

if TYPE_CHECKING:
    from sae.dictionary import Dictionary


app = typer.Typer()


@app.command()
def compare(
    saes: Annotated[list[str], typer.Argument(metavar="SAE...", help="Folders, packaged names, or a grid's folder.")],
    model: OptionalModelOption = None,
    text: OptionalTextOption = None,
    column: ColumnOption = None,
    chat: ChatOption = False,
    recorded: Annotated[bool, typer.Option("--recorded", help="Take the figures of the SAEs' own cards: quick, but each on the "
                                                              "text that its card names.")] = False,
    eval_tokens: Annotated[int, typer.Option(help="Held-out activations to judge on.")] = 65_536,
    ce_tokens: Annotated[int, typer.Option(help="Held-out tokens for cross-entropy and KL.")] = 8_192,
    out: Annotated[Path | None, typer.Option("--out", help="Write the comparison as one HTML page with plots.")] = None,
    same_model: SameModelOption = False,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, or auto (CUDA if there is one).")] = "auto",
    json_: JsonOption = False,
) -> None:
    """Put SAEs side by side: FVU, L0, dead latents, cross-entropy recovered, decoder overlap.

    All are judged on the same held-out text: the one named, else the one that the first SAE was trained on.
    """
    from sae import comparing
    from sae.comparison_page import comparison_page
    from sae.formats import load
    from undertow.core.errors import ArtifactError, UserError
    from undertow.core.storage import write_text

    sources = comparing.expand(saes)
    if len(sources) < 2:
        raise UserError(f"nothing to compare: only {sources[0]}", "name at least two SAEs, or a grid's folder")
    if out is not None and out.exists():
        raise ArtifactError(f"{out} exists", f"choose another --out, or remove it: rm {out}")
    dictionaries: list[Dictionary] = [load(source) for source in sources]
    if recorded:
        figures = [comparing.recorded(source) for source in sources]
    else:
        figures = _judge(sources, dictionaries, (Place(model, None, same_model), text, column, chat),
                         (eval_tokens, ce_tokens), device)
    named = zip(comparing.short_names(sources), dictionaries, figures, strict=True)
    found = comparing.compare([comparing.Entry(*one) for one in named])
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, comparison_page(found))
        found["page"] = str(out)
    if json_:
        emit(found, as_json=True)
        return
    print_table(found["saes"], "SAEs side by side" if not recorded else "SAEs side by side, by their own cards")
    _print_overlap(found)
    if out is not None:
        console().print(f"plots: {out}", markup=False)


def _judge(sources: Sequence[str], dictionaries: Sequence[Dictionary], where: tuple[Place, str | None, str | None, bool],
           sizes: tuple[int, int], device: str) -> list[dict[str, Any]]:
    """Figures of every SAE on the same held-out tokens; the site of each is its own."""
    from sae.evaluation import evaluate
    from sae.harvesting import Source
    from sae.plan import open_held_out
    from undertow.cli.progress import Phases
    from undertow.core.storage import cache_dir

    place, text, column, chat = where
    figures: list[dict[str, Any]] = []
    with Phases() as phases:
        for source, dictionary in zip(sources, dictionaries, strict=True):
            subject, site = open_place(source, dictionary, place, device)
            corpus = open_held_out(dictionaries[0].provenance, subject, text, column, chat)
            judged = evaluate(dictionary.to(subject.device), Source(subject, site, corpus), sizes, cache_dir(),
                              lambda done, total: phases("harvest", done, total))
            figures.append(judged.summary())
            phases("judge", len(figures), len(sources))
    return figures


def print_table(lines: Sequence[dict[str, Any]], title: str) -> None:
    """One line an SAE."""
    from rich.table import Table

    from sae.comparison_page import COLUMNS, cell

    columns = [name for name in COLUMNS if any(name in line for line in lines)]
    table = Table("", *(COLUMNS[name] for name in columns), title=title, box=None)
    for line in lines:
        table.add_row(line["name"], *(cell(name, line) for name in columns))
    console().print(table)


def _print_overlap(found: dict[str, Any]) -> None:
    from rich.table import Table

    names = [line["name"] for line in found["saes"]]
    table = Table("largest cosine of", *(f"in {name}" for name in names), box=None)
    for name, row in zip(names, found["overlap"], strict=True):
        table.add_row(name, *("–" if one is None else f"{one['cosine']:.3f} (chance {one['chance']:.3f})" for one in row))
    console().print(table)
