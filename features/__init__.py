"""Features: sparse codes over a text, contexts, logit effects, cards, search; concepts, contrast, causes, naming, selection."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undertow.core.lazy import lazy_names

if TYPE_CHECKING:
    from features.cards import FeatureCard, Lens, card
    from features.codes import scan_codes
    from features.concepts import Concept, Pair, Situation, load_concept
    from features.contrast import FeatureTable, load_table, scan
    from features.examples import ExampleTable, cached_examples, collect_examples, load_examples, save_examples
    from features.finding import Bench, Plan, find
    from features.logit_lens import logit_effect, promoted, suppressed
    from features.searching import Query, SearchResult, search
    from features.selection import FeatureSet, Rule, Search, select

__all__ = ["Bench", "Concept", "ExampleTable", "FeatureCard", "FeatureSet", "FeatureTable", "Lens", "Pair", "Plan", "Query",
           "Rule", "Search", "SearchResult", "Situation", "cached_examples", "card", "collect_examples", "find", "load_concept",
           "load_examples", "load_table", "logit_effect", "promoted", "save_examples", "scan", "scan_codes", "search", "select",
           "suppressed"]
__getattr__ = lazy_names(__name__, {
    "FeatureCard": "cards", "Lens": "cards", "card": "cards", "scan_codes": "codes",
    "Concept": "concepts", "Pair": "concepts", "Situation": "concepts", "load_concept": "concepts",
    "FeatureTable": "contrast", "load_table": "contrast", "scan": "contrast",
    "ExampleTable": "examples", "cached_examples": "examples", "collect_examples": "examples",
    "load_examples": "examples", "save_examples": "examples",
    "Bench": "finding", "Plan": "finding", "find": "finding",
    "logit_effect": "logit_lens", "promoted": "logit_lens", "suppressed": "logit_lens",
    "Query": "searching", "SearchResult": "searching", "search": "searching",
    "FeatureSet": "selection", "Rule": "selection", "Search": "selection", "select": "selection",
})
