"""Features: sparse codes over a text, contexts, logit effects, cards, search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undertow.core.lazy import lazy_names

if TYPE_CHECKING:
    from features.cards import FeatureCard, Lens, card
    from features.codes import scan_codes
    from features.examples import ExampleTable, cached_examples, collect_examples, load_examples, save_examples
    from features.logit_lens import logit_effect, promoted, suppressed
    from features.searching import Query, SearchResult, search

__all__ = ["ExampleTable", "FeatureCard", "Lens", "Query", "SearchResult", "cached_examples", "card",
           "collect_examples", "load_examples", "logit_effect", "promoted", "save_examples", "scan_codes", "search",
           "suppressed"]
__getattr__ = lazy_names(__name__, {
    "FeatureCard": "cards", "Lens": "cards", "card": "cards", "scan_codes": "codes",
    "ExampleTable": "examples", "cached_examples": "examples", "collect_examples": "examples",
    "load_examples": "examples", "save_examples": "examples",
    "logit_effect": "logit_lens", "promoted": "logit_lens", "suppressed": "logit_lens",
    "Query": "searching", "SearchResult": "searching", "search": "searching",
})
