"""The models behind the stores, opened at first use and kept: every page that needs none reads without them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, final

from dashboards.store import FeatureStore, build_command
from features.codes import dictionary_digest
from features.searching import Query
from undertow.core.errors import DictionaryError

Opener = Callable[[Mapping[str, Any]], Query]
"""Opens SAE, subject and site from the record of a store."""


@final
class Models:
    """Subject, site and SAE of every store."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._lock = threading.Lock()
        self._opened: dict[str, Query] = {}

    def opened(self, store: FeatureStore) -> Query | None:
        """The model of a store if it is open already."""
        return self._opened.get(store.dictionary)

    def open(self, store: FeatureStore) -> Query:
        """The model of a store; one is opened at a time.

        Raises DictionaryError if the SAE is no longer the one that the store was built from; any UserError of opening it.
        """
        with self._lock:
            known = self._opened.get(store.dictionary)
            if known is None:
                known = self._opener(store.record)
                digest = dictionary_digest(known.dictionary)
                if digest != store.dictionary:
                    sae = store.record["spec"]["sae"]
                    raise DictionaryError(f"the store is of SAE {store.dictionary}, and {sae} is now {digest}",
                                          f"build it again: {build_command(store.record)}")
                self._opened[store.dictionary] = known
            return known

    def has_chat(self, store: FeatureStore) -> bool | None:
        """Whether the subject has a chat template; None if neither the store nor an open model says so."""
        if (known := self._opened.get(store.dictionary)) is not None:
            return bool(known.subject.tokenizer.chat_template)
        said = store.record.get("chat_template")
        return said if isinstance(said, bool) else None
