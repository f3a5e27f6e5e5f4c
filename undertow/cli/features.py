"""`undertow features`: look at the latents of an SAE, and at what a text sets off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from undertow.cli.common import (
    ChatOption,
    ColumnOption,
    JsonOption,
    OptionalModelOption,
    OptionalOutOption,
    OptionalTextOption,
    SeedOption,
    console,
    emit,
)

if TYPE_CHECKING:
    from features.cards import FeatureCard
    from features.examples import ExampleTable
    from sae.corpus import TextSpec
    from sae.dictionary import Dictionary
    from undertow.subjects.sites import Site
    from undertow.subjects.subject import Subject

app = typer.Typer(no_args_is_help=True, help="The latents of an SAE: show them, search what a text sets off.")

SaeArgument = Annotated[str, typer.Argument(metavar="SAE", help="A folder, or a packaged name such as smollm2/12.")]
SiteOption = Annotated[str | None, typer.Option("--site", help="Where to read, if the SAE does not say.")]
SameModelOption = Annotated[bool, typer.Option(
    "--same-model", help="Take the subject for the model of the SAE although its name differs.")]


class _Place(NamedTuple):
    """What the user said about the subject and the site; None means those that the SAE was trained on."""

    model: str | None
    site: str | None
    same_model: bool


class _Bench(NamedTuple):
    """An SAE beside the subject and the site that it belongs to."""

    dictionary: Dictionary
    subject: Subject
    site: Site
    name: str


class _TextChoice(NamedTuple):
    """What the user said about the text; `source` None means the one that the SAE was trained on."""

    source: str | None
    column: str | None
    chat: bool
    tokens: int


@app.command()
def show(
    sae: SaeArgument,
    latents: Annotated[list[int] | None, typer.Argument(metavar="LATENT...", help="Indices of latents.")] = None,
    random: Annotated[int, typer.Option("--random", min=0, help="Show this many more, drawn at random from all.")] = 0,
    contexts: Annotated[int, typer.Option("--contexts", min=1, max=8, help="Contexts of each kind on a card.")] = 6,
    model: OptionalModelOption = None,
    site: SiteOption = None,
    same_model: SameModelOption = False,
    text: OptionalTextOption = None,
    column: ColumnOption = None,
    chat: ChatOption = False,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of held-out text to measure on.")] = 65_536,
    seed: SeedOption = 0,
    out: OptionalOutOption = None,
    json_: JsonOption = False,
) -> None:
    """Print a card of each latent: when it fires, on which words, and what it writes into the logits.

    Model, site and text are those that the SAE was trained with; the figures are from the held-out part of the text.
    """
    from sae.formats import load
    from undertow.core.storage import refuse_existing

    began = time.perf_counter()
    if out is not None:
        refuse_existing(out)
    dictionary = load(sae)
    chosen = _choose(latents or [], random, seed, dictionary.d_sae)  # refused before the slow part
    bench = _open(sae, dictionary, _Place(model, site, same_model))
    table = _table(bench, _TextChoice(text, column, chat, tokens), seed)
    cards = _cards(bench, table, chosen)
    if out is not None:
        _write(out, cards, {"sae": sae, "latents": chosen, "tokens": tokens, "text": table.text}, seed)
    if json_:
        emit({"sae": sae, "tokens": table.n_tokens, "text": table.text, "cards": [card.to_json() for card in cards],
              "wall_s": round(time.perf_counter() - began, 2)}, as_json=True)
        return
    from undertow.cli.feature_view import card_view

    for card in cards:
        console().print(card_view(card, contexts))
        console().rule(style="dim")


@app.command()
def search(
    sae: SaeArgument,
    text: Annotated[str, typer.Argument(help="The text to run through the subject.")],
    top: Annotated[int, typer.Option("--top", min=1, help="Features to list.")] = 20,
    per_token: Annotated[int, typer.Option("--per-token", min=0, help="Features to list for each token.")] = 4,
    model: OptionalModelOption = None,
    site: SiteOption = None,
    same_model: SameModelOption = False,
    json_: JsonOption = False,
) -> None:
    """List the features that fire on a text, and for each token the strongest ones.

    How often a feature fires in general is known once `undertow features show` has measured this SAE.
    """
    from features.examples import find_examples
    from features.searching import Query
    from features.searching import search as run
    from sae.formats import load
    from undertow.cli.feature_view import search_view
    from undertow.core.storage import cache_dir

    began = time.perf_counter()
    bench = _open(sae, load(sae), _Place(model, site, same_model))
    table = find_examples(bench.dictionary, cache_dir())
    result = run(Query(bench.subject, bench.site, bench.dictionary, bench.name, table), text, per_token)
    if json_:
        listed = result._replace(features=result.features[:top]).to_json()
        emit({"sae": sae, "n_features": len(result.features), **listed,
              "wall_s": round(time.perf_counter() - began, 2)}, as_json=True)
        return
    console().print(search_view(result, top))
    if table is None:
        console().print(f"\nHow rare these are is not known yet: undertow features show {sae} --random 1", markup=False)


def _open(sae: str, dictionary: Dictionary, place: _Place) -> _Bench:
    from features.codes import dictionary_name
    from sae.formats import check_fits
    from undertow.core.errors import DictionaryError
    from undertow.subjects.load import load_subject

    model, site = place.model or dictionary.provenance.model_name, place.site or dictionary.provenance.hook_name
    for value, meaning, option in ((model, "model", "--model"), (site, "site", "--site")):
        if not value:
            raise DictionaryError(f"{sae} does not say which {meaning} it was trained on", f"name it with {option}")
    subject = load_subject(model)
    for warning in check_fits(dictionary, subject.name, subject.d_model, site, subject.digest, place.same_model):
        console().print(warning, style="yellow", markup=False)
    return _Bench(dictionary, subject, subject.site(site), dictionary_name(sae, dictionary))


def _choose(latents: list[int], n_random: int, seed: int, d_sae: int) -> list[int]:
    """The latents asked for, then `n_random` others drawn without replacement."""
    import torch

    from sae.dictionary import known_latents
    from undertow.core.errors import DictionaryError
    from undertow.core.seeds import generator

    known_latents(torch.tensor(latents, dtype=torch.long), d_sae)
    if not latents and not n_random:
        raise DictionaryError("no latent was named", "give one or more indices, or --random 5")
    rest = sorted(set(range(d_sae)) - set(latents))
    if n_random > len(rest):
        raise DictionaryError(f"--random {n_random} asks for more latents than there are ({len(rest)})",
                              f"choose at most {len(rest)}")
    order = torch.randperm(len(rest), generator=generator(seed, "features", "random"))
    return latents + [rest[int(i)] for i in order[:n_random]]


def _text_spec(bench: _Bench, choice: _TextChoice) -> TextSpec:
    from sae.corpus import TextSpec
    from undertow.core.errors import TextError

    provenance = bench.dictionary.provenance
    if choice.source is not None:
        return TextSpec.checked({"source": choice.source, "column": choice.column, "chat": choice.chat,
                                 "context": provenance.context_size}, "--text")
    recorded = provenance.extra.get("text")
    if not isinstance(recorded, dict):
        raise TextError(f"{bench.name} does not say which text it was trained on", "name one with --text")
    return TextSpec.checked(recorded, f"the SAE {bench.name}")


def _table(bench: _Bench, choice: _TextChoice, seed: int) -> ExampleTable:
    """Statistics and examples of every latent; from the cache after the first time."""
    from features.examples import cached_examples
    from sae.corpus import open_corpus
    from sae.harvesting import harvest
    from undertow.core.errors import TextError
    from undertow.core.storage import cache_dir

    spec = _text_spec(bench, choice)
    subject = bench.subject
    try:
        corpus = open_corpus(spec, "held_out", subject.tokenizer, subject.bos_id)
    except TextError as error:
        if choice.source is not None:
            raise
        raise TextError(f"the text that the SAE was trained on cannot be opened: {error.what}",
                        f"{error.hint}; or name another with --text".removeprefix("; or ")) from error
    with _progress(f"reading up to {choice.tokens:,} tokens of {spec.source} with {subject.name}") as report:
        store = harvest(subject, bench.site, corpus, choice.tokens, cache_dir(), report)
    with _progress(f"collecting examples of {bench.dictionary.d_sae:,} latents") as report:
        return cached_examples(bench.dictionary, store, seed, cache_dir(), report)


def _cards(bench: _Bench, table: ExampleTable, latents: list[int]) -> list[FeatureCard]:
    import torch

    from features.cards import Lens, card
    from undertow.subjects.unembed import final_norm_and_unembed

    lens = Lens(bench.subject.tokenizer, final_norm_and_unembed(bench.subject))
    measured_on = f"{table.n_tokens:,} held-out tokens of {table.text}"
    directions = bench.dictionary.directions(torch.tensor(latents, dtype=torch.long))
    return [card(bench.name, latent, direction, table, lens, measured_on)
            for latent, direction in zip(latents, directions, strict=True)]


def _write(out: Path, cards: list[FeatureCard], spec: dict[str, object], seed: int) -> None:
    from undertow.cli.feature_view import cards_text
    from undertow.core.record import run_record
    from undertow.core.storage import create_artifact, write_json, write_text

    with create_artifact(out, "feature-cards", run_record(spec, seed)) as folder:
        write_json(folder / "cards.json", [card.to_json() for card in cards])
        write_text(folder / "cards.txt", cards_text(cards, n_contexts=8))


@contextmanager
def _progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on a terminal; elsewhere one line as the work starts; nothing if there is no work."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    screen = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=screen, disable=not screen.is_terminal)
    task = bar.add_task(label, total=None)
    started = False

    def report(done: int, total: int) -> None:
        nonlocal started
        if not started:
            started = True
            bar.start()
            if not screen.is_terminal:
                screen.print(label, markup=False)
        bar.update(task, completed=done, total=total)

    try:
        yield report
    finally:
        if started:
            bar.stop()
