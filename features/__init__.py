"""Features: sparse codes over a text, contexts, logit effects, cards, search."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undertow.core.lazy import lazy_names

if TYPE_CHECKING:
    from features import card, logit_effect, search
    from features.card import FeatureCard, Lens
    from features.codes import scan_codes
    from features.examples import ExampleTable, cached_examples, collect_examples, load_examples, save_examples
    from features.search import Query, SearchResult

__all__ = ["ExampleTable", "FeatureCard", "Lens", "Query", "SearchResult", "cached_examples", "card",
           "collect_examples", "load_examples", "logit_effect", "save_examples", "scan_codes", "search"]
__getattr__ = lazy_names(__name__, {
    "FeatureCard": "card", "Lens": "card", "scan_codes": "codes",
    "ExampleTable": "examples", "cached_examples": "examples", "collect_examples": "examples",
    "load_examples": "examples", "save_examples": "examples",
    "Query": "search", "SearchResult": "search",
}, modules=("card", "logit_effect", "search"))
