"""`undertow features scan | rank | select`: from pairs of situations to a set of features, without a name for any of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from undertow.cli.common import (
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
    from features.concepts import Concept, Pair
    from features.contrast import FeatureTable
    from features.examples import ExampleTable
    from features.finding import Bench, Gates
    from features.selection import FeatureSet
    from undertow.cli.progress import Phases

app = typer.Typer()

ConceptOption = Annotated[str, typer.Option("--concept", help="A packaged concept (care, care-said), or a YAML file.")]
PairsOption = Annotated[int, typer.Option("--pairs", min=2, help="Discovery pairs for the gates and the scan.")]
RankedOption = Annotated[int, typer.Option("--ranked", min=2, help="Of these, the pairs on which causes are measured.")]
ShortlistOption = Annotated[int, typer.Option("--shortlist", min=1, help="Features whose effect is measured exactly.")]
AlphaOption = Annotated[float, typer.Option("--alpha", min=1e-6, max=1.0, help="Family-wise level of the scan.")]
TopOption = Annotated[int, typer.Option("--top", min=1, help="Features to list.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Go on although the pairs are lexical; the result records it.")]


class _Opened(NamedTuple):
    """What every command here begins with."""

    bench: Bench
    concept: Concept
    pairs: list[Pair]


@app.command()
def scan(
    sae: SaeArgument,
    concept: ConceptOption = "care",
    pairs: PairsOption = 200,
    alpha: AlphaOption = 0.01,
    top: TopOption = 20,
    force: ForceOption = False,
    model: OptionalModelOption = None,
    site: SiteOption = None,
    same_model: SameModelOption = False,
    seed: SeedOption = 0,
    out: OptionalOutOption = None,
    json_: JsonOption = False,
) -> None:
    """List the features that differ, family-wise, between the two situations of a concept's pairs.

    First the pairs themselves are tested: where words alone tell them apart the command stops.
    """
    from features.cards import feature_id
    from undertow.cli.progress import Phases
    from undertow.core.storage import refuse_existing

    began = time.perf_counter()
    if out is not None:
        refuse_existing(out)
    opened = _open(sae, concept, pairs, seed, Place(model, site, same_model))
    with Phases() as phases:
        gates, table = _scanned(opened, force, phases)
    if out is not None:
        table.save(out, {"sae": sae, "concept": concept, "pairs": pairs, "gates": gates.to_json()})
    found = table.significant(alpha)
    rows = [{"id": feature_id(table.origin.sae[:4], i), "latent": i, **table.row(i)} for i in found[:top]]
    facts = {"sae": sae, "concept": concept, "site": table.origin.site, "families": table.origin.n_families,
             "significant": len(found), "raised": len(table.raised(alpha)), "gates": gates.to_json(), **_where(out),
             **_wall(began)}
    _show(facts, rows, ("id", "effect", "mean_positive", "mean_negative", "t", "p"), json_)


@app.command()
def rank(
    sae: SaeArgument,
    concept: ConceptOption = "care",
    pairs: PairsOption = 200,
    ranked: RankedOption = 32,
    shortlist: ShortlistOption = 64,
    alpha: AlphaOption = 0.01,
    top: TopOption = 20,
    force: ForceOption = False,
    model: OptionalModelOption = None,
    site: SiteOption = None,
    same_model: SameModelOption = False,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Rank features by what they do to the decision: first-order effect of all, exact effect of a shortlist, on D in nats.

    Also says how much of the causal direction (the difference of means) the SAE carries.
    """
    from features.cards import feature_id
    from features.finding import Plan, evidence
    from features.finding import rank as run
    from features.selection import EFFECT, Rule
    from undertow.cli.progress import Phases

    began = time.perf_counter()
    plan = Plan(discovery=pairs, ranked=ranked, shortlist=shortlist, force=force, rule=Rule(alpha=alpha))
    opened = _open(sae, concept, pairs, seed, Place(model, site, same_model))
    with Phases() as phases:
        gates, table = _scanned(opened, force, phases)
        ranking = run(opened.bench, table, opened.pairs[:ranked], plan, phases)
    known = evidence(table, ranking, {})
    order = sorted(known, key=lambda latent: -known[latent][EFFECT])
    rows = [{"id": feature_id(table.origin.sae[:4], i), "latent": i, **known[i]} for i in order[:top]]
    facts = {"sae": sae, "concept": concept, "site": table.origin.site, "significant": len(table.significant(alpha)),
             "gates": gates.to_json(), **ranking.facts(), **_wall(began)}
    _show(facts, rows, ("id", EFFECT, "attribution", "act_writer_share", "effect", "p"), json_)


@app.command()
def select(
    sae: SaeArgument,
    concept: ConceptOption = "care",
    pairs: PairsOption = 200,
    ranked: RankedOption = 32,
    development: Annotated[int, typer.Option("--development", min=2, help="Pairs on which the set is chosen.")] = 32,
    shortlist: ShortlistOption = 64,
    size: Annotated[int, typer.Option("--size", min=1, help="Features in the set, at most.")] = 16,
    method: Annotated[str, typer.Option("--method", help="greedy (joint exact effect) or pursuit (first-order).")] = "greedy",
    alpha: AlphaOption = 0.01,
    matches: Annotated[int, typer.Option("--matches", min=1, help="Matched features behind every naming screen.")] = 100,
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens of held-out text for the naming screens.")] = 65_536,
    text: OptionalTextOption = None,
    column: ColumnOption = None,
    force: ForceOption = False,
    model: OptionalModelOption = None,
    site: SiteOption = None,
    same_model: SameModelOption = False,
    seed: SeedOption = 0,
    out: OptionalOutOption = None,
    json_: JsonOption = False,
) -> None:
    """Choose a set of features by its joint effect on the decision, without those that have to do with the word.

    The text of the naming screens is that of the SAE unless another is named.
    """
    from features.finding import Plan, find
    from features.selection import Rule
    from undertow.cli.progress import Phases
    from undertow.core.storage import refuse_existing

    began = time.perf_counter()
    if out is not None:
        refuse_existing(out)
    rule = Rule.checked({"method": method, "alpha": alpha, "size": size}, "--method")
    plan = Plan(discovery=pairs, ranked=ranked, development=development, shortlist=shortlist, matches=matches, force=force,
                rule=rule)
    opened = _open(sae, concept, pairs, seed, Place(model, site, same_model))
    with Phases() as phases:
        examples = _examples(opened.bench, text, column, tokens, seed, phases)
        chosen = find(opened.bench, opened.concept, plan, examples, phases)
    if out is not None:
        chosen.save(out, {"sae": sae, "concept": concept, "plan": plan.model_dump(mode="json")})
    _show_set(chosen, {"sae": sae, **_where(out), **_wall(began)}, json_)


def _open(sae: str, concept: str, n: int, seed: int, place: Place) -> _Opened:
    from features.concepts import load_concept
    from features.finding import Bench
    from sae.formats import load

    opened = load_concept(concept, seed)  # refused before the slow part
    pairs = opened.pairs("discovery", n)
    dictionary = load(sae)
    subject, site = open_place(sae, dictionary, place)
    return _Opened(Bench(subject, dictionary, site), opened, pairs)


def _scanned(opened: _Opened, force: bool, phases: Phases) -> tuple[Gates, FeatureTable]:
    """The gates, which stop lexical pairs, and the scan."""
    from features.contrast import scan as measure
    from features.finding import gate

    gates = gate(opened.bench, opened.concept, opened.pairs, force, phases)
    return gates, measure(*opened.bench, opened.pairs, opened.concept.seed, lambda d, t: phases("scan", d, t))


def _examples(bench: Bench, source: str | None, column: str | None, tokens: int, seed: int, phases: Any) -> ExampleTable:
    """Firing statistics and contexts of every latent on held-out text; from the cache after the first time."""
    from features.examples import cached_examples
    from sae.harvesting import harvest
    from sae.plan import open_held_out
    from undertow.core.storage import cache_dir

    corpus = open_held_out(bench.dictionary.provenance, bench.subject, source, column, False)
    store = harvest(bench.subject, bench.site, corpus, tokens, cache_dir(), lambda d, t: phases("reading text", d, t))
    return cached_examples(bench.dictionary, store, seed, cache_dir(), lambda d, t: phases("examples", d, t))


def _where(out: Any) -> dict[str, Any]:
    return {} if out is None else {"path": out}


def _wall(began: float) -> dict[str, float]:
    return {"wall_s": round(time.perf_counter() - began, 2)}


def _show_set(chosen: FeatureSet, facts: dict[str, Any], as_json: bool) -> None:
    rows = [{"id": name, "latent": step.latent, "joint_effect": step.effect, "target": chosen.targets[step.latent],
             **chosen.evidence.get(step.latent, {})} for name, step in zip(chosen.ids, chosen.steps, strict=True)]
    shares = {} if chosen.writer_share is None else {"act_writer_share": chosen.writer_share}
    whole = {"concept": chosen.concept, "site": chosen.origin.site, "chosen": len(rows), "effect": chosen.effect, **shares,
             "opposed": list(chosen.opposed[:8]), **chosen.facts, **facts}
    _show(whole, rows, ("id", "joint_effect", "effect_on_d", "target", "act_writer_share", "logit_p", "contexts_p", "output_p"),
          as_json)


def _show(facts: dict[str, Any], rows: Sequence[Mapping[str, Any]], columns: Sequence[str], as_json: bool) -> None:
    """A table and the figures of the whole, or one JSON object with the rows as `features`."""
    if as_json:
        emit({**facts, "features": list(rows)}, as_json=True)
        return
    from rich.table import Table

    shown = Table(box=None, pad_edge=False)
    for name in columns:
        shown.add_column(name, justify="left" if name == "id" else "right")
    for row in rows:
        shown.add_row(*(_cell(row.get(name)) for name in columns))
    if rows:
        console().print(shown)
    emit(facts, as_json=False)


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.3g}"
