"""The SAEs that can be put side by side: those of the stores and those that lie in the folder, each with its own card."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, final

from dashboards.finding import folders
from dashboards.store import FeatureStore, build_command, slug, title_of
from features.codes import dictionary_digest
from sae.comparing import Entry, compare, recorded
from sae.dictionary import Dictionary
from sae.formats import CFG, PACKAGED, WEIGHTS, load
from undertow.core.errors import DictionaryError, UserError

MOST = 8
"""SAEs in one comparison, at most: a column each."""
MOST_FLOP = 4e12
"""Multiply-adds that an overlap may cost here, one to four minutes on two cores; the command line has no such bound."""


class Sae(NamedTuple):
    """One SAE.

    Attributes:
        key: its name in addresses; that of its feature store where it has one.
        source: what opens it: a folder, or a packaged name.
        cfg: its settings, as in cfg.json; {} if that cannot be read.
        figures: what its card measured on held-out text; {} without a card.
        store: its feature store; None without one.
    """

    key: str
    source: str
    cfg: dict[str, Any]
    figures: dict[str, Any]
    store: FeatureStore | None

    @property
    def name(self) -> str:
        """How it is called: the last part of its folder, or its packaged name."""
        return title_of(self.source)

    @property
    def shape(self) -> tuple[int, int]:
        """Its width and that of the activations it reads; 0 where it does not say."""
        said = self.store.record if self.store else self.cfg
        return _whole(said.get("d_sae")), _whole(said.get("d_in"))

    def told(self, *names: str) -> Any:
        """A setting by the path to it; None where it is absent."""
        found: Any = self.cfg
        for name in names:
            found = found.get(name) if isinstance(found, dict) else None
        return found


@final
class SaeShelf:
    """SAEs in `folder` and `depth` levels below it; looked through at every question, so that a new one appears by itself."""

    def __init__(self, folder: Path | None, depth: int = 3) -> None:
        self._folder, self._depth = folder, depth
        self._lock = threading.Lock()
        self._overlaps: dict[tuple[str, ...], list[list[Any]]] = {}

    def all(self, stores: Mapping[str, FeatureStore]) -> dict[str, Sae]:
        """Every SAE by its name in addresses: those of the stores first, then those without one, by path."""
        found: dict[str, Sae] = {}
        for key, store in stores.items():
            if all(store.dictionary != sae.store.dictionary for sae in found.values() if sae.store):
                found[key] = _sae(key, str(store.record["spec"]["sae"]), store)
        shown = {Path(sae.source).resolve() for sae in found.values()}
        bare = [inside.resolve() for inside in (() if self._folder is None else folders(self._folder, self._depth))
                if (inside / CFG).is_file() and (inside / WEIGHTS).is_file()]
        for path in bare:
            if path not in shown:
                name = slug(path.name)
                key = next(free for number in count(1) if (free := name if number == 1 else f"{name}-{number}") not in found)
                found[key] = _sae(key, str(path), None)
        return found

    def overlap(self, saes: Sequence[Sae]) -> list[list[Any]]:
        """How much of each decoder lies in each other one, as `sae.comparing.compare` has it; worked out once.

        Raises DictionaryError if an SAE cannot be opened, is another than its store was built from, or costs too much here.
        """
        if flop(saes) > MOST_FLOP:
            raise DictionaryError("the overlap of SAEs this wide takes many minutes", "type the command of this page instead")
        with self._lock:
            opened = [open_sae(sae.store) if sae.store else load(sae.source) for sae in saes]
            digests = tuple(dictionary_digest(dictionary) for dictionary in opened)
            if digests not in self._overlaps:
                entries = [Entry(sae.key, dictionary, {}) for sae, dictionary in zip(saes, opened, strict=True)]
                self._overlaps[digests] = compare(entries)["overlap"]
            return self._overlaps[digests]


def open_sae(store: FeatureStore) -> Dictionary:
    """The SAE of a store. Raises DictionaryError if it cannot be opened or is no longer the one the store was built from."""
    source = str(store.record["spec"]["sae"])
    dictionary = load(source)
    if (digest := dictionary_digest(dictionary)) != store.dictionary:
        raise DictionaryError(f"the store of {store.title} is of SAE {store.dictionary}, and {source} is now {digest}",
                              f"build it again: {build_command(store.record)}")
    return dictionary


def flop(saes: Sequence[Sae]) -> float:
    """Multiply-adds of an overlap: every SAE against every one, and against as many random directions."""
    return 2.0 * sum(a.shape[0] * b.shape[0] * a.shape[1] for a in saes for b in saes)


def _sae(key: str, source: str, store: FeatureStore | None) -> Sae:
    return Sae(key, source, _settings(source), _figures(source), store)


def _settings(source: str) -> dict[str, Any]:
    for folder in (Path(source), PACKAGED / source):
        try:
            found = json.loads((folder / CFG).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return found if isinstance(found, dict) else {}
    return {}


def _figures(source: str) -> dict[str, Any]:
    try:
        found = recorded(source)
    except (UserError, OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0
