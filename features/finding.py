"""The search from pairs to a set: gates, scan, causal rank, naming screens, selection. Each part can also be used alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float64
from numpy import ndarray
from pydantic import Field

from features.causal import (
    Attribution,
    CausalDirection,
    attribution,
    causal_direction,
    patch_effects,
    rank_correlation,
    read_baseline,
    writer_shares,
)
from features.concepts import Concept, Pair, refuse_said
from features.contrast import FeatureTable, scan
from features.examples import ExampleTable
from features.lexical import LexicalGate, bag_of_words_gate, refuse_lexical, shuffled_gate
from features.naming import Names, Screen, named, screens
from features.selection import EFFECT, FeatureSet, Rule, Search, select
from sae.dictionary import Dictionary
from undertow.core.errors import TextError
from undertow.core.seeds import derive_seed
from undertow.core.spec import Spec
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject

log = logging.getLogger(__name__)
Phases = Callable[[str, int, int], None]
"""Called with (phase, units done, units in all)."""


def unseen(phase: str, done: int, total: int) -> None:
    """Progress that is shown nowhere."""


class Plan(Spec):
    """How much is measured.

    Attributes:
        discovery: pairs for the gates and the scan.
        ranked: of these, the pairs on which causes are measured.
        development: pairs on which the set is chosen.
        shortlist: latents whose single effect is measured exactly.
        matches: matched latents behind every naming screen.
        prompts: prompts of the output screen.
        force: go on although the pairs are lexical; recorded in the result.
        rule: how the set is chosen.
    """

    discovery: int = Field(default=200, ge=2)
    ranked: int = Field(default=32, ge=2)
    development: int = Field(default=32, ge=2)
    shortlist: int = Field(default=64, ge=1)
    matches: int = Field(default=100, ge=1)
    prompts: int = Field(default=8, ge=1)
    force: bool = False
    rule: Rule = Rule()


@final
class Bench(NamedTuple):
    """An SAE beside the subject and the site that it belongs to."""

    subject: Subject
    dictionary: Dictionary
    site: Site


@final
class Gates(NamedTuple):
    """What the gates said; `forced` is why they would have stopped the search, "" if they would not."""

    measured: dict[str, LexicalGate]
    forced: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `forced` only where it says something."""
        values: dict[str, Any] = {name: gate._asdict() for name, gate in self.measured.items()}
        return values | ({"forced": self.forced} if self.forced else {})


def gate(bench: Bench, concept: Concept, pairs: Sequence[Pair], force: bool, phases: Phases = unseen) -> Gates:
    """Are the pairs lexical? Raises TextError if they are, unless `force`d."""
    seed = derive_seed(concept.seed, "gates")
    measured = {"bag_of_words": bag_of_words_gate(pairs, seed),
                "shuffled": shuffled_gate(bench.subject, bench.site, pairs, seed, lambda d, t: phases("gates", d, t))}
    try:
        refuse_said(pairs, concept.lexicon)
        refuse_lexical(measured)
    except TextError as error:
        if not force:
            raise
        log.warning("%s; going on, as --force asks", error.what)
        return Gates(measured, error.what)
    return Gates(measured, "")


@final
class Ranking(NamedTuple):
    """Causes of D on some discovery pairs.

    Attributes:
        latents: the shortlist, largest first-order effect first.
        exact: exact effect on D of each alone, in nats.
        writers: act-writer share of each, None where its effect is too small to say.
        correlation: rank correlation of first-order and exact effects, None where there is none to speak of.
        first_order: attribution of all latents, and of the SAE's error.
        direction: the difference of means, and what the SAE carries of it.
    """

    latents: tuple[int, ...]
    exact: Float64[ndarray, "k"]
    writers: tuple[float | None, ...]
    correlation: float | None
    first_order: Attribution
    direction: CausalDirection

    def facts(self) -> dict[str, Any]:
        """Figures of the ranking as a whole, as JSON values; what could not be said is absent."""
        facts = {"rank_correlation": self.correlation, "cosine": self.direction.cosine, "explained": self.direction.explained,
                 "direction_effect": self.direction.effect, "carried_effect": self.direction.carried_effect,
                 "causal_share": self.direction.causal_share, "error_attribution": self.first_order.error,
                 "whole_attribution": self.first_order.whole, "whole_effect": self.first_order.exact}
        return {name: value for name, value in facts.items() if value is not None}


def rank(bench: Bench, table: FeatureTable, pairs: Sequence[Pair], plan: Plan, phases: Phases = unseen) -> Ranking:
    """Attribution of every latent, then the exact effect of a shortlist of those that meet the contrast."""
    baseline = read_baseline(*bench[:2], bench.site, pairs, table.mean_positive, lambda d, t: phases("negatives", d, t))
    first = attribution(baseline, pairs, progress=lambda d, t: phases("attribution", d, t))
    met = table.raised(plan.rule.alpha) if plan.rule.sign == "raised" else table.significant(plan.rule.alpha)
    latents = sorted(met, key=lambda latent: -first.latents[latent])[: plan.shortlist]
    direction = causal_direction(baseline, pairs)
    if not latents:
        return Ranking((), np.zeros(0), (), None, first, direction)
    exact = patch_effects(baseline, latents, lambda d, t: phases("patching", d, t))
    return Ranking(tuple(latents), exact, tuple(writer_shares(baseline, latents, exact)),
                   rank_correlation(first.latents[latents], exact), first, direction)


def evidence(table: FeatureTable, ranking: Ranking, measured: dict[int, dict[str, Screen]]) -> dict[int, dict[str, float]]:
    """All that is known of every latent of the shortlist, one row each."""
    rows: dict[int, dict[str, float]] = {}
    for latent, exact, writer in zip(ranking.latents, ranking.exact, ranking.writers, strict=True):
        row = table.row(latent) | {"attribution": float(ranking.first_order.latents[latent]), EFFECT: float(exact)}
        if writer is not None:
            row["act_writer_share"] = writer
        for name, screen in measured.get(latent, {}).items():
            row |= {name: screen.value, f"{name}_matched": screen.matched, f"{name}_p": screen.p}
        rows[latent] = row
    return rows


def find(bench: Bench, concept: Concept, plan: Plan, examples: ExampleTable | None = None,
         phases: Phases = unseen) -> FeatureSet:
    """The whole search.

    Args:
        bench: subject, SAE and site.
        concept: its pairs, its lexicon and its seed.
        plan: how much is measured, and the rule of the selection.
        examples: firing statistics and contexts on ordinary text, for the naming screens; without them no screen is applied.
        phases: called with the progress of every phase.

    Raises TextError if the pairs are lexical (and not forced), and what the parts raise.
    """
    discovery, development = concept.pairs("discovery", plan.discovery), concept.pairs("development", plan.development)
    gates = gate(bench, concept, discovery, plan.force, phases)
    table = scan(*bench, discovery, concept.seed, lambda d, t: phases("scan", d, t))
    ranking = rank(bench, table, discovery[: plan.ranked], plan, phases)
    measured: dict[int, dict[str, Screen]] = {}
    if examples is not None:
        moving = [latent for latent, exact in zip(ranking.latents, ranking.exact, strict=True) if exact > 0]
        names = Names(*bench, examples, concept.lexicon, openings(development, plan.prompts))
        measured = screens(names, moving, plan.matches, lambda d, t: phases("naming", d, t))
    facts = {"gates": gates.to_json(), **ranking.facts(), "significant": len(table.significant(plan.rule.alpha)),
             "named": len(named(measured)), "screened": examples is not None, "concept": concept.digest}
    search = Search(concept.name, table, evidence(table, ranking, measured), named(measured), facts)
    baseline = read_baseline(*bench[:2], bench.site, development, table.mean_positive)
    return select(search, baseline, plan.rule, lambda d, t: phases("selection", d, t))


def openings(pairs: Sequence[Pair], n: int) -> list[str]:
    """The beginnings of at most `n` negative prompts, each cut at another word, so that not all end where an act follows."""
    cut = []
    for i, pair in enumerate(pairs[:n]):
        words = pair.negative.prompt.split(" ")
        cut.append(" ".join(words[: max(2, round(len(words) * (i + 1) / (min(n, len(pairs)) + 1)))]))
    return cut
