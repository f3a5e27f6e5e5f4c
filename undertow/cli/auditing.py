"""`undertow guard audit`: what a recipe does to a model's words, with the guard off."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from undertow.cli.common import (
    ColumnOption,
    JsonOption,
    OptionalModelOption,
    OptionalOutOption,
    SeedOption,
    TextOption,
    console,
    emit,
)
from undertow.cli.lexicons import LanguageOption, LexiconOption, forms_of, open_lexicon
from undertow.cli.opening import SameModelOption
from undertow.cli.surgery import AT_ONCE, RecipeOption, SaeOption, Surgery, open_subject, write_on, write_result
from undertow.core.errors import EditError, SpecError, TextError

if TYPE_CHECKING:
    from interventions.audit import Audit, AuditSpec, WordCount
    from undertow.lexicon import Lexicon
    from undertow.lexicon.trie import TokenTrie
    from undertow.subjects.sampling import Generated
    from undertow.subjects.subject import Subject

app = typer.Typer()
BASE, ARM = "base", "L4"  # the names of these arms in every result: the untouched subject, and feature surgery
_LONG_S = 120.0
PROMPT_TOKENS = 32  # of each text that the sampled documents go on from


class _Job(NamedTuple):
    """What is audited, on what, and how."""

    subject: Subject
    surgery: Surgery
    lexicon: Lexicon
    trie: TokenTrie
    rows: list[list[int]]
    spec: AuditSpec
    seed: int


@app.command("audit")
def audit_recipe(
    text: TextOption,
    recipe: RecipeOption = None,
    sae: SaeOption = None,
    model: OptionalModelOption = None,
    same_model: SameModelOption = False,
    column: ColumnOption = None,
    lexicon: LexiconOption = "love",
    language: LanguageOption = None,
    texts: Annotated[int, typer.Option("--texts", min=1, help="Documents to audit, from the start of the text.")] = 32,
    context: Annotated[int, typer.Option("--context", min=2, help="Tokens of each that are read, at most.")] = 256,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Mean hazard a token that need not be followed.")] = 1e-4,
    quick: Annotated[bool, typer.Option("--quick", help="Take hazard's upper bound, from one forward pass a text.")] = False,
    canonical: Annotated[bool, typer.Option("--canonical", help="Follow only the spellings that the tokenizer itself writes."
                                            )] = False,
    max_new_tokens: Annotated[int, typer.Option(
        "--max-new-tokens", min=0, help="Tokens sampled after the start of each text, to count words; 0 samples none.")] = 64,
    seed: SeedOption = 0,
    out: OptionalOutOption = None,
    json_: JsonOption = False,
) -> None:
    """Measure, guard off, what a recipe does to a model's words: hazard and KL on given texts, words in sampled ones.

    Hazard is the probability that a form of the word starts next. The ratio's interval is a bootstrap over documents.
    """
    from interventions.audit import AuditSpec, spellings
    from sae.text import read_documents
    from undertow.core.record import package_versions
    from undertow.core.storage import refuse_existing

    began = time.perf_counter()
    if out is not None:
        refuse_existing(out)
    if recipe is None:
        raise SpecError("there is no recipe to audit", "add --recipe FILE --sae FOLDER")
    spec = AuditSpec.checked({"tolerance": None if quick else tolerance}, "guard audit")
    known = open_lexicon(lexicon, ("T0",), language)
    subject, surgery = open_subject(model, recipe, sae, same_model)
    assert surgery is not None  # a recipe was named
    rows = encoded((document.text for document in read_documents(text, column)), subject, text, texts, context)
    job = _Job(subject, surgery, known, spellings(subject, known, canonical), rows, spec, seed)
    console().print(f"{surgery.recipe.name} on {len(rows)} texts of {text}, {sum(map(len, rows)):,} tokens, looking for "
                    f"{forms_of(known, ('T0',))}", markup=False)
    result = _summary(job, _audited(job), *_counted(job, max_new_tokens)) | {
        "model": subject.name, "text": text, "versions": package_versions(), "seed": seed,
        "wall_s": round(time.perf_counter() - began, 2)}
    if out is not None:
        write_result(out, "audit", surgery, result, {"sae": sae, "lexicon": known.digest, "texts": texts, "context": context,
                                                     "canonical": canonical, **spec.model_dump()})
    if json_:
        emit(result, as_json=True)
        return
    _show_audit(result)


def encoded(documents: Iterable[str], subject: Subject, source: str, n: int, context: int) -> list[list[int]]:
    """The first `n` documents as token ids. Raises TextError if there are too few of them for an interval.

    Args:
        documents: their texts.
        subject: whose tokens.
        source: what the user called them.
        n: documents, at most.
        context: tokens of each, at most.
    """
    from interventions.audit import MIN_CLUSTERS

    if n < MIN_CLUSTERS:
        raise SpecError(f"--texts {n} is too few: no interval can be had of fewer than {MIN_CLUSTERS} documents", "--texts 64")
    known = (subject.encode(document)[:context] for document in documents)
    rows = list(islice((row for row in known if len(row) > 1), n))
    if len(rows) < MIN_CLUSTERS:
        raise TextError(f"{source} has {len(rows)} documents, and no interval can be had of fewer than {MIN_CLUSTERS}",
                        "give a folder, one record a line (.jsonl), or a .txt of more than 20,000 characters a document")
    return rows


def _audited(job: _Job) -> Audit:
    """Hazard and KL at every token; says beforehand how long it takes, by the time that the second text takes."""
    from interventions.applying import apply
    from interventions.audit import audit
    from undertow.cli.progress import Phases
    from undertow.subjects.splicing import Window

    def seconds_of(row: list[int]) -> float:
        began = time.perf_counter()
        audit(job.subject, contextlib.nullcontext(job.subject), [row], job.trie, job.spec)
        return time.perf_counter() - began

    seconds_of(job.rows[0])  # also explores the spellings, which is done once
    seconds = seconds_of(job.rows[1]) / len(job.rows[1]) * sum(map(len, job.rows))
    console().print(f"this takes about {seconds:.0f} s" + (
        "; --language en, --canonical, --quick or fewer --texts make it shorter" if seconds > _LONG_S else ""), markup=False)
    if job.surgery.recipe.window != "everywhere":
        console().print(f"the recipe's window is {job.surgery.recipe.window}; given texts have no decision, so it acts at "
                        "every token of them", markup=False)
    arm = apply(job.surgery.recipe, job.subject, job.surgery.dictionary, Window())
    with Phases() as phases:
        try:
            return audit(job.subject, arm, job.rows, job.trie, job.spec, progress=lambda d, t: phases("texts", d, t))
        except EditError as error:
            raise EditError(error.what, "choose a --text in which the recipe's trigger fires, or more --texts") from None


def _counted(job: _Job, max_new_tokens: int) -> tuple[dict[str, WordCount], dict[str, int]]:
    """Words in documents that each arm samples from the same prompts and seeds, guard off, and where the recipe fired."""
    from interventions.audit import count_words
    from interventions.guard_automaton import GuardMasks
    from undertow.cli.progress import Phases
    from undertow.core.seeds import derive_seed
    from undertow.lexicon.vocabulary import read_vocabulary
    from undertow.subjects.sampling import Sampling

    if not max_new_tokens:
        return {}, {}
    prompts = [row[: max(1, min(PROMPT_TOKENS, len(row) // 2))] for row in job.rows]
    seeds = [derive_seed(job.seed, "guard audit", i) for i in range(len(prompts))]
    vocabulary, sampling = read_vocabulary(job.subject.tokenizer), Sampling(max_new_tokens=max_new_tokens)
    masks = GuardMasks(vocabulary, job.lexicon)
    counts: dict[str, WordCount] = {}
    fired = {"firings": 0, "positions": 0}
    with Phases() as phases:
        for arm, surgery in ((BASE, None), (ARM, job.surgery)):
            documents: list[Generated] = []
            for start in range(0, len(prompts), AT_ONCE):
                part = slice(start, start + AT_ONCE)
                written = write_on(job.subject, surgery, prompts[part], sampling, seeds[part])
                documents += written.texts
                fired = {"firings": fired["firings"] + written.firings, "positions": fired["positions"] + written.positions}
                phases(f"documents of {arm}", len(documents), len(prompts))
            counts[arm] = count_words(documents, vocabulary, job.lexicon, masks)
    return counts, fired


def _summary(job: _Job, audit: Audit, counts: dict[str, WordCount], fired: dict[str, int]) -> dict[str, Any]:
    """The figures under the names that all results use."""
    import numpy as np

    figures = audit.figures(job.seed)
    arms: dict[str, dict[str, float]] = {
        BASE: {"hazard_mean": float(audit.hazard_base.mean()), "hazard_p999": float(np.quantile(audit.hazard_base, 0.999)),
               "hazard_max": float(audit.hazard_base.max())},
        ARM: {name: value for name, value in figures.items() if name.startswith(("hazard_m", "hazard_p", "kl_"))}}
    for arm, count in counts.items():
        arms[arm] |= {"n": count.n, "guard_hits": count.guard_hits, "word_docs": count.word_docs,
                      "word_docs_upper": count.rate_upper}
    recipe, ratio = job.surgery.recipe, {name: value for name, value in figures.items() if name.startswith("hazard_ratio")}
    return {"recipe": recipe.name, "digest": recipe.digest(), "lexicon": job.lexicon.name, "texts": len(job.rows),
            "tokens": len(audit.kl), "arms": arms, **ratio, "hazard_exact": audit.exact, "hazard_slack": audit.slack, **fired}


def _show_audit(result: dict[str, Any]) -> None:
    from rich.table import Table

    screen = console()
    names = {"hazard_mean": "hazard mean", "hazard_p999": "p99.9", "hazard_max": "max", "kl_mean": "KL mean",
             "kl_median": "median", "kl_p99": "p99", "guard_hits": "guard hits", "word_docs": "word docs"}
    table = Table("arm", box=None, pad_edge=False)
    for title in names.values():
        table.add_column(title, justify="right")
    for arm, row in result["arms"].items():
        table.add_row(arm, *(f"{row[name]:.3g}" if name in row else "–" for name in names))
    screen.print(table)
    screen.print(f"hazard ratio {result['hazard_ratio']:.4g} [{result['hazard_ratio_lower']:.4g}, "
                 f"{result['hazard_ratio_upper']:.4g}], 95 % bootstrap over {result['texts']} documents", markup=False)
    low = min(row["hazard_mean"] for row in result["arms"].values())
    if not result["hazard_exact"]:
        screen.print("hazard is the upper bound of one forward pass a text; without --quick it is followed to the words' ends")
    elif result["hazard_slack"] > low:
        screen.print(f"{result['hazard_slack']:.2g} a token was not followed, more than the mean itself: the ratio says "
                     f"little; --tolerance {low / 10:.0e} follows more", style="yellow", markup=False)
    if "firings" in result:
        n = result["arms"][ARM]["n"]
        screen.print(f"{n} documents of each arm were sampled, guard off; {result['recipe']} fired at {result['firings']:,} of "
                     f"{result['positions']:,} tokens", markup=False)
