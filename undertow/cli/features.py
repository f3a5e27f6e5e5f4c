"""`undertow features`: look at the latents of an SAE, and at what a text sets off. Finding them: `undertow.cli.selection`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from undertow.cli import selection
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
from undertow.cli.opening import Place, SaeArgument, SameModelOption, SiteOption, open_place

if TYPE_CHECKING:
    from features.cards import FeatureCard
    from features.examples import ExampleTable
    from sae.dictionary import Dictionary
    from undertow.subjects.sites import Site
    from undertow.subjects.subject import Subject

app = typer.Typer(no_args_is_help=True, help="The latents of an SAE: find those that move a decision, show them, search what a "
                  "text sets off.")
app.add_typer(selection.app)


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
    bench = _open(sae, dictionary, Place(model, site, same_model))
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
    bench = _open(sae, load(sae), Place(model, site, same_model))
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


def _open(sae: str, dictionary: Dictionary, place: Place) -> _Bench:
    from features.codes import dictionary_name

    return _Bench(dictionary, *open_place(sae, dictionary, place), dictionary_name(sae, dictionary))


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


def _table(bench: _Bench, choice: _TextChoice, seed: int) -> ExampleTable:
    """Statistics and examples of every latent; from the cache after the first time."""
    from features.examples import cached_examples
    from sae.harvesting import harvest
    from sae.plan import open_held_out
    from undertow.cli.progress import Phases
    from undertow.core.storage import cache_dir

    subject = bench.subject
    corpus = open_held_out(bench.dictionary.provenance, subject, choice.source, choice.column, choice.chat)
    with Phases() as phases:
        reading = f"reading {corpus.spec.source} with {subject.name}"
        store = harvest(subject, bench.site, corpus, choice.tokens, cache_dir(), lambda d, t: phases(reading, d, t))
        return cached_examples(bench.dictionary, store, seed, cache_dir(),
                               lambda d, t: phases(f"examples of {bench.dictionary.d_sae:,} latents", d, t))


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
