"""`undertow bench`: speed, beside peers in the same run. Medians of interleaved rounds; ratios; the floor beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from undertow.cli.common import JsonOption, console, emit

if TYPE_CHECKING:
    from sae.bench import Row

app = typer.Typer(no_args_is_help=True, help="Speed, against peers in the same run: harvest, sae.")
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds; medians are reported.")]


@app.command()
def sae(
    d_in: Annotated[int, typer.Option("--d", help="Width of the activations.")] = 576,
    width: Annotated[int, typer.Option("--width", help="Number of latents.")] = 4096,
    k: Annotated[int, typer.Option("--k", help="Active latents a token.")] = 32,
    batch_size: Annotated[int, typer.Option(help="Activations a step.")] = 2048,
    architecture: Annotated[str, typer.Option(help="topk, batchtopk, matryoshka, jumprelu, standard or gated.")] = "topk",
    rounds: RoundsOption = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    json_: JsonOption = False,
) -> None:
    """One training step with all bookkeeping: ours, sae-lens' own trainer, and the encoder product alone."""
    import torch

    from sae.bench import StepSize, floor_note, race, step_contestants

    size = StepSize(d_in, width, k, batch_size)
    rows = race(step_contestants(size, architecture, device), rounds, "ms", f"undertow {architecture} step")
    _show(rows, f"one step, d = {d_in}, F = {width}, k = {k}, B = {batch_size}, float32, {device}, "
                f"{torch.get_num_threads()} threads", json_)
    if not json_:
        console().print(floor_note(size), markup=False)


@app.command()
def harvest(
    model: Annotated[str, typer.Option("--model", help="The subject.")] = "smollm2",
    site: Annotated[str, typer.Option("--site", help="Where to read.")] = "blocks.12.hook_resid_post",
    text: Annotated[str, typer.Option("--text", help="The text.")] = "brown",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens a round and contestant.")] = 8_192,
    rounds: RoundsOption = 5,
    json_: JsonOption = False,
) -> None:
    """Activations from text: ours, sae-lens' ActivationsStore by both its routes, and the bare truncated forward."""
    from sae.bench import describe_subject, harvest_contestants, race
    from sae.corpus import TextSpec, open_corpus
    from sae.harvesting import Source
    from undertow.subjects.load import load_subject

    subject = load_subject(model)
    spec = TextSpec.checked({"source": text}, "--text")
    source = Source(subject, subject.site(site), open_corpus(spec, "train", subject.tokenizer, subject.bos_id))
    rows = race(harvest_contestants(source, max(1, tokens // spec.context)), rounds, "tokens/s", "undertow, stored and checked")
    _show(rows, f"harvest at {site} of {describe_subject(subject)}, {text}, {tokens:,} tokens a round", json_)


def _show(rows: list[Row], title: str, json_: bool) -> None:
    if json_:
        emit({"title": title, "rows": [row._asdict() for row in rows]}, as_json=True)
        return
    from rich.table import Table

    table = Table("", "median", "min", "max", "unit", "ratio", title=title, box=None)
    for row in rows:
        table.add_row(row.name, *(f"{value:,.1f}" for value in row[1:4]), row.unit, f"{row.ratio:.2f}")
    console().print(table)
