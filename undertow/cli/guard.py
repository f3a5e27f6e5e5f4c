"""`undertow guard`: is the word in a text, does a recipe make it likelier, and text in which it cannot be said."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from undertow.cli import auditing
from undertow.cli.common import (
    ChatOption,
    ColumnOption,
    JsonOption,
    OptionalModelOption,
    OptionalOutOption,
    SeedOption,
    TextOption,
    console,
    emit,
)
from undertow.cli.lexicons import LanguageOption, LexiconOption, TierOption, forms_of, open_lexicon
from undertow.cli.opening import SameModelOption
from undertow.cli.surgery import (
    AT_ONCE,
    MARKS,
    RecipeOption,
    SaeOption,
    Surgery,
    open_subject,
    safe,
    write_on,
    write_result,
)
from undertow.core.errors import EditError, TextError

if TYPE_CHECKING:
    from interventions.guard import LexiconProcessor
    from interventions.guarding import GuardedChoice
    from sae.text import Document
    from undertow.lexicon import Lexicon
    from undertow.subjects.sampling import Generated, Sampling
    from undertow.subjects.subject import Subject

log = logging.getLogger(__name__)
app = typer.Typer(no_args_is_help=True, help="The forbidden word: scan a text for it, audit what a recipe does to its "
                  "probability, generate text that cannot say it, show a lexicon.")
app.add_typer(auditing.app)

_AROUND = 40  # characters of an excerpt on each side
_PLAIN_INTERVAL_S = 10.0
_LISTED = 20  # forms in a table


class _Place(NamedTuple):
    """An occurrence in a document; `offset` counts characters of the document's text."""

    document: str
    offset: int
    text: str
    form: str
    tier: str
    language: str
    excerpt: str


class _Found(NamedTuple):
    """What a scan has seen: matches counted by (form, tier, language), and the first places."""

    documents: int
    characters: int
    word_docs: int
    counts: Counter[tuple[str, str, str]]
    places: list[_Place]


@app.command()
def scan(
    text: TextOption,
    lexicon: LexiconOption = "love",
    tier: TierOption = None,
    language: LanguageOption = None,
    column: ColumnOption = None,
    places: Annotated[int, typer.Option("--places", min=0, help="Occurrences to show.")] = 10,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 2 if the word is found.")] = False,
    json_: JsonOption = False,
) -> None:
    """Does the word stand in the inputs? Counts its forms in a text, by the reference matcher, and shows the first places.

    Case, width, accents and invisible characters make no difference; innocent words that hold a form do not count.
    """
    from sae.text import read_documents

    began = time.perf_counter()
    tiers = list(dict.fromkeys(tier or ["T0"]))
    known = open_lexicon(lexicon, tiers, language)
    console().print(f"{text}: looking for {forms_of(known, tiers)}", markup=False)
    found = _scanned(read_documents(text, column), known, places)
    languages = Counter[str]()
    for (_, _, spoken), n in found.counts.items():
        languages[spoken] += n
    forms = [{"form": form, "tier": level, "language": spoken, "matches": n}
             for (form, level, spoken), n in found.counts.most_common()]
    result = {"text": text, "lexicon": known.name, "tiers": tiers, "documents": found.documents,
              "characters": found.characters, "word_docs": found.word_docs, "matches": found.counts.total(), "forms": forms,
              "languages": dict(languages.most_common()), "places": [place._asdict() for place in found.places[:places]],
              "wall_s": round(time.perf_counter() - began, 2)}
    if not json_ or strict:
        _show_scan(result, found.places[:places])
    if strict and found.places:
        first = found.places[0]
        raise TextError(f"{text} holds {result['matches']} forms of {known.name!r} in {found.word_docs} of {found.documents} "
                        f"documents, the first at character {first.offset} of {safe(first.document)}: {safe(first.text)!r}",
                        "remove or reword these documents, or choose another --text")
    if json_:
        emit(result, as_json=True)


def _scanned(documents: Iterator[Document], lexicon: Lexicon, n_places: int) -> _Found:
    n = characters = word_docs = 0
    counts: Counter[tuple[str, str, str]] = Counter()
    places: list[_Place] = []
    spoke = time.monotonic()
    for document in documents:
        matches = lexicon.find(document.text)
        n, characters, word_docs = n + 1, characters + len(document.text), word_docs + bool(matches)
        counts.update((match.form, match.tier, match.language) for match in matches)
        places += [_Place(document.id, m.start, document.text[m.start:m.end], m.form, m.tier, m.language,
                          _excerpt(document.text, m.start, m.end)) for m in matches[: max(n_places, 1) - len(places)]]
        if time.monotonic() - spoke >= _PLAIN_INTERVAL_S:
            spoke = time.monotonic()
            log.info("%s documents, %.1f million characters so far; found in %s", f"{n:,}", characters / 1e6, f"{word_docs:,}")
    return _Found(n, characters, word_docs, counts, places)


def _excerpt(text: str, start: int, end: int) -> str:
    from features.wording import printable

    before, after = text[max(0, start - _AROUND):start], text[end:end + _AROUND]
    return f"{printable(before)}{printable(text[start:end]).join(MARKS)}{printable(after)}"


def _show_scan(result: dict[str, Any], places: Sequence[_Place]) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = console()
    screen.print(f"{result['documents']:,} documents, {result['characters']:,} characters: {result['matches']:,} matches in "
                 f"{result['word_docs']:,} documents", markup=False)
    if not result["matches"]:
        return
    table = Table("form", "language", "tier", "matches", box=None, pad_edge=False)
    for row in result["forms"][:_LISTED]:
        table.add_row(Text(row["form"]), row["language"], row["tier"], f"{row['matches']:,}")
    screen.print(table)
    if len(result["forms"]) > _LISTED:
        screen.print(f"and {len(result['forms']) - _LISTED} more forms")
    for place in places:
        screen.print(Text.assemble((f"{safe(place.document)} +{place.offset}", "dim"), f"  {place.excerpt}"))


@app.command("lexicon")
def show_lexicon(
    lexicon: Annotated[str, typer.Argument(metavar="[NAME_OR_PATH]", help="A packaged lexicon, or a YAML file.")] = "love",
    tier: TierOption = None,
    language: LanguageOption = None,
    model: OptionalModelOption = None,
    json_: JsonOption = False,
) -> None:
    """Show a lexicon's forms by tier and language; with --model, the innocent words that the strict guard blocks for it."""
    from undertow.lexicon.forms import TIERS

    whole = open_lexicon(lexicon, TIERS, language)
    tiers = list(dict.fromkeys(tier or ())) or [name for name in TIERS if whole.forms(name)]
    known = whole.only(tiers)
    listed = {name: _by_language(known, name, language) for name in (*tiers, "innocent")}
    result: dict[str, Any] = {"lexicon": known.name, "digest": known.digest, "forms": listed}
    if model is not None:
        from interventions.guard import blocked_innocents
        from undertow.subjects.load import load_subject

        result |= {"model": model, "blocked": blocked_innocents(load_subject(model).tokenizer, whole.only(("T0",)))}
    if json_:
        emit(result, as_json=True)
        return
    screen = console()
    for name, words in listed.items():
        screen.print(f"{name}  {sum(map(len, words.values()))} forms", style="bold", markup=False)
        for spoken, forms in words.items():
            screen.print(f"  {spoken}  {len(forms):>3}  {', '.join(forms)}", markup=False)
    if model is not None:
        _show_blocked(known.name, model, result["blocked"])


def _by_language(lexicon: Lexicon, tier: str, languages: Sequence[str] | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for form in lexicon.forms(tier):
        if not languages or form.language in languages:
            found.setdefault(form.language, []).append(form.text)
    return found


def _show_blocked(name: str, model: str, blocked: Sequence[str]) -> None:
    if not blocked:
        console().print(f"\n{model} spells no innocent word through a form of {name!r}", markup=False)
        return
    console().print(f"\n{model} spells these innocent words through a form of {name!r}, so that the strict guard blocks this "
                    "spelling; --mode look-ahead lets them pass", markup=False)
    console().print(f"  {', '.join(repr(word) for word in blocked)}", markup=False)


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="What the subject goes on from.")],
    model: OptionalModelOption = None,
    lexicon: LexiconOption = "love",
    language: LanguageOption = None,
    mode: Annotated[str, typer.Option(help="strict: the text is clean after every token; look-ahead: innocent words that are "
                                           "spelt through a form may be said.")] = "strict",
    force: Annotated[bool, typer.Option("--force", help="Go on although the prompt holds the word; only what comes after it is "
                                                        "guarded.")] = False,
    recipe: RecipeOption = None,
    sae: SaeOption = None,
    same_model: SameModelOption = False,
    chat: ChatOption = False,
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Texts, each from the next seed.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Longest text, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Nucleus mass; 1 switches it off.")] = 1.0,
    seed: SeedOption = 0,
    out: OptionalOutOption = None,
    json_: JsonOption = False,
) -> None:
    """Write text in which the word cannot be said; says how often the guard mattered.

    A guard hit is a token that was drawn and refused. Up to the first one the text is that of the same seed without the guard.
    """
    from interventions.guard import LexiconProcessor
    from undertow.core.storage import refuse_existing
    from undertow.subjects.chat import render
    from undertow.subjects.sampling import Sampling

    began = time.perf_counter()
    if out is not None:
        refuse_existing(out)
    sampling = Sampling.checked({"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}, "generate")
    known = open_lexicon(lexicon, ("T0",), language)
    if not force:
        _refuse_prompt(prompt, known)
    subject, surgery = open_subject(model, recipe, sae, same_model)
    ids = render(subject.tokenizer, [("user", prompt)], reply=True).ids if chat else subject.encode(prompt)
    guard = LexiconProcessor(subject.tokenizer, known, mode.replace("-", "_"), "record")
    rows, fired = _guarded(subject, surgery, ids, guard, (sampling, [seed + i for i in range(n)]))
    result = {"model": subject.name, "lexicon": known.name, "mode": mode, "prompt": prompt, "seed": seed, **fired,
              "generations": rows, "guard_hits": sum(row["guard_hits"] for row in rows),
              "word_docs": sum(row["matches"] > 0 for row in rows),
              "wall_s": round(time.perf_counter() - began, 2)}
    if out is not None:
        spec = {"sae": sae, "lexicon": known.digest, "chat": chat, "force": force, **sampling.model_dump()}
        write_result(out, "guarded-generations", surgery, result, spec)
    if json_:
        emit(result, as_json=True)
        return
    _show_generations(result, len(known.forms("T0")))


def _refuse_prompt(prompt: str, lexicon: Lexicon) -> None:
    said = [prompt[match.start:match.end] for match in lexicon.find(prompt)]
    if said:
        raise TextError(f"the prompt already holds a form of {lexicon.name!r}: {', '.join(repr(safe(word)) for word in said)}",
                        "reword it, or add --force to guard only what comes after it")


def _guarded(subject: Subject, surgery: Surgery | None, ids: list[int], guard: LexiconProcessor,
             how: tuple[Sampling, list[int]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """A row for every seed, and where the recipe fired. Raises EditError for a recipe that fired nowhere."""
    from interventions.guarding import GuardedChoice

    sampling, seeds = how
    rows: list[dict[str, Any]] = []
    firings = positions = 0
    for start in range(0, len(seeds), AT_ONCE):
        part = seeds[start:start + AT_ONCE]
        choice = GuardedChoice(guard, sampling)
        written = write_on(subject, surgery, [ids] * len(part), sampling, part, choice)
        firings, positions = firings + written.firings, positions + written.positions
        for row, (seed, got) in enumerate(zip(part, written.texts, strict=True)):
            rows.append(_generation(subject, guard, choice, row, got) | {"seed": seed})
    if surgery is None:
        return rows, {}
    if not firings:
        raise EditError(f"recipe {surgery.recipe.name!r} fired at none of {positions} tokens",
                        "choose a prompt on which its trigger fires, or more --max-new-tokens")
    return rows, {"recipe": surgery.recipe.name, "digest": surgery.recipe.digest(), "firings": firings, "positions": positions}


def _generation(subject: Subject, guard: LexiconProcessor, choice: GuardedChoice, row: int, got: Generated) -> dict[str, Any]:
    """One text: what may be shown of it, what the guard refused, and how many forms the reference matcher finds (0)."""
    refused = choice.refusals(row, len(got.token_ids))
    held = choice.held_back(got.prompt_ids, got.token_ids)
    tokens = got.token_ids[: len(got.token_ids) - held]
    begins = len(guard.vocabulary.text(got.prompt_ids))
    whole = guard.vocabulary.text([*got.prompt_ids, *tokens])
    matches = [match for match in guard.lexicon.find(whole) if match.tier == "T0" and match.end > begins]
    return {"text": str(subject.tokenizer.decode(tokens, skip_special_tokens=True)), "tokens": len(tokens), "held_back": held,
            "guard_hits": refused.hits, "masked_mass": round(refused.mass, 6), "matches": len(matches)}


def _show_generations(result: dict[str, Any], n_forms: int) -> None:
    screen = console()
    for row in result["generations"]:
        screen.print(f"── {safe(result['prompt'])} (seed {row['seed']})", style="bold", markup=False)
        screen.print(safe(row["text"].strip()), markup=False)
        held = f"; {row['held_back']} tokens held back at the end" if row["held_back"] else ""
        screen.print(f"{row['tokens']} tokens, guard hits {row['guard_hits']} ({row['masked_mass']:.2g} expected){held}\n",
                     style="dim", markup=False)
    if "recipe" in result:
        screen.print(f"{result['recipe']} fired at {result['firings']} of {result['positions']} tokens", markup=False)
    texts = len(result["generations"])
    screen.print(f"guard hits {result['guard_hits']} in {texts} texts; the reference matcher, which knows {n_forms} forms of "
                 f"{result['lexicon']!r}, finds one in {result['word_docs']} of them", markup=False)

