"""`undertow bench`: speed, beside peers in the same run. Medians of interleaved rounds; ratios; the floor beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undertow.cli import bench_dashboard
from undertow.cli.common import JsonOption, console, emit

if TYPE_CHECKING:
    from sae.architectures import Architecture
    from sae.bench import Row
    from sae.bench_quality import QualitySize
    from sae.bench_steps import StepSize

app = typer.Typer(no_args_is_help=True, help="Speed, against peers in the same run: harvest, sae, dashboard.")
app.add_typer(bench_dashboard.app)
RoundsOption = Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds; medians are reported.")]


@app.command()
def sae(
    d_in: Annotated[int, typer.Option("--d", help="Width of the activations.")] = 576,
    width: Annotated[int | None, typer.Option("--width", help="Number of latents: 4096 if absent, 512 with --quality.")] = None,
    k: Annotated[int | None, typer.Option("--k", help="Active latents a token: 32 if absent, 16 with --quality.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Activations a step: 2048 if absent, 512 with --quality.")] = None,
    architecture: Annotated[str, typer.Option(help="topk, batchtopk, matryoshka, jumprelu, standard or gated; several with "
                                                   "commas, or all.")] = "topk",
    rounds: RoundsOption = 9,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    memory: Annotated[bool, typer.Option("--memory/--no-memory", help="Peak memory too, each in a process of its own.")] = True,
    quality: Annotated[bool, typer.Option("--quality", help="Whole trainings instead: what both reach from the same start.")]
    = False,
    truth: Annotated[bool, typer.Option("--truth", help="Whole trainings instead: which known features both recover.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Of a training with --quality.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each with --quality or --truth; medians are reported.")] = 1,
    json_: JsonOption = False,
) -> None:
    """One training step with all bookkeeping: ours, sae-lens' own trainer, and the encoder product alone; then peak memory.

    sparsify (PyPI: eai-sparsify) and dictionary_learning (PyPI: dictionary-learning) take part where they are installed.
    With --quality: held-out FVU of ours and of sae-lens' trainer, from the same weights and batches, on activations of hearth.
    With --truth: F1, MCC and uniqueness of both, on a synthetic model whose features are known.
    """
    from sae.bench_quality import QualitySize
    from sae.bench_steps import StepSize

    names = _architectures(architecture)
    if truth:
        _truth(names, seeds, json_)
    elif quality:
        _quality(names, QualitySize(width or 512, k or 16, batch_size or 512, steps), seeds, json_)
    else:
        _speed(names, StepSize(d_in, width or 4096, k or 32, batch_size or 2048), (device, rounds, memory), json_)


def _speed(names: list[Architecture], size: StepSize, how: tuple[str, int, bool], json_: bool) -> None:
    import torch

    from sae.bench import race, ratios
    from sae.bench_steps import floor_note, job_of, peak_memory, step_contestants

    device, rounds, memory = how
    rows: list[Row] = []
    remarks: list[str] = []
    for name in names:
        job = job_of(size, name, device)
        contestants, notes = step_contestants(job)
        rows += race(contestants, rounds, "ms", f"undertow {name} step")
        contestants.clear()  # their memory is free before that of each is measured
        if memory:
            peaks = {f"{who.removesuffix(' step')}, peak memory": [peak] for who, peak in peak_memory(job).items()}
            rows += ratios(peaks, "MB", f"undertow {name}, peak memory")
        remarks += [floor_note(job), *notes]
    _show(rows, f"one step, d = {size.d_in}, F = {size.d_sae}, k = {size.k}, B = {size.batch}, float32, {device}, "
                f"{torch.get_num_threads()} threads", json_, list(dict.fromkeys(remarks)))


def _quality(names: list[Architecture], size: QualitySize, seeds: int, json_: bool) -> None:
    import statistics

    from sae.bench_quality import DATA, load_activations, quality
    from undertow.cli.progress import Phases
    from undertow.core.storage import cache_dir

    rows: list[Row] = []
    remarks: list[str] = []
    with Phases() as phases:
        data = load_activations(size, cache_dir(), lambda done, total: phases("harvest", done, total))
        for name in names:
            pairs = quality(name, size, seeds, data, lambda done, total, name=name: phases(name, done, total))
            rows += _sides(name, pairs, ("fvu", "l0"))
            remarks.append(f"{name}: FVU {100 * statistics.median(pair.difference for pair in pairs):+.2f} % against sae-lens")
    _show(rows, f"held-out FVU and L0 on {DATA}: F = {size.d_sae}, B = {size.batch}, {size.steps} steps, {seeds} seeds",
          json_, remarks)


def _truth(names: list[Architecture], seeds: int, json_: bool) -> None:
    from sae.bench_truth import DATA, TRAINING, truth_pairs
    from undertow.cli.progress import Phases

    rows: list[Row] = []
    with Phases() as phases:
        for name in names:
            pairs = truth_pairs(name, seeds, lambda done, total, name=name: phases(name, done, total))
            rows += _sides(name, pairs, ("f1", "mcc", "uniqueness"))
    _show(rows, f"recovery of {DATA}: F = {TRAINING.d_sae}, k = {TRAINING.k}, {TRAINING.steps} steps, {seeds} seeds", json_)


def _sides(name: str, pairs: Sequence[tuple[Any, Any]], figures: Sequence[str]) -> list[Row]:
    """Rows of ours and of sae-lens' for every figure of a comparison."""
    from sae.bench import ratios

    rows: list[Row] = []
    for figure in figures:
        found = {f"{who} {name}": [getattr(side, figure) for side in sides]
                 for who, sides in zip(("undertow", "sae-lens"), zip(*pairs, strict=True), strict=True)}
        rows += ratios(found, figure if figure == "uniqueness" else figure.upper(), f"undertow {name}")
    return rows


def _architectures(text: str) -> list[Architecture]:
    """Architectures by name, with commas between them, or all. Raises SpecError that names an unknown one."""
    from typing import get_args

    from sae.architectures import Architecture
    from undertow.core.errors import SpecError, near_matches

    known = get_args(Architecture)
    wanted = list(known) if text == "all" else [part.strip() for part in text.split(",")]
    for name in wanted:
        if name not in known:
            raise SpecError(f"unknown --architecture {name!r}",
                            near_matches(name, known) or f"choose from {', '.join(known)}, or all")
    return [name for name in known if name in wanted]


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


def _show(rows: list[Row], title: str, json_: bool, remarks: Sequence[str] = ()) -> None:
    if json_:
        emit({"title": title, "rows": [row._asdict() for row in rows], **({"notes": remarks} if remarks else {})}, as_json=True)
        return
    from rich.table import Table

    table = Table("", "median", "min", "max", "unit", "ratio", title=title, box=None)
    for row in rows:
        digits, of_ratio = (4, 3) if row.unit in ("FVU", "F1", "MCC", "uniqueness") else (1, 2)
        table.add_row(row.name, *(f"{value:,.{digits}f}" for value in row[1:4]), row.unit, f"{row.ratio:.{of_ratio}f}")
    console().print(table)
    for remark in remarks:
        console().print(remark, markup=False)
