"""The features table: filter, sort and page any number of features, by whole-column arithmetic on memory-mapped columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy import ndarray
from pydantic import Field

from dashboards.evidence import Evidence
from dashboards.notes import Marks
from dashboards.store import FeatureStore
from undertow.core.spec import Spec

PAGE = 100
DENSE = 0.01
"""A feature is called dense if it fires on more than this share of tokens."""
RARE = 1e-4
_SMALL = 4096  # below this a full sort costs nothing

Sort = Literal["id", "density", "maximum", "mean", "variance", "kurtosis", "nearest", "norm", "label",
               "chosen", "effect", "p", "effect_on_d", "attribution", "act_writer_share", "naming_p"]
_FOUND = ("chosen", "effect", "p", "effect_on_d", "attribution", "act_writer_share", "naming_p")
State = Literal["any", "live", "dead", "rare", "dense"]
YesNo = Literal["any", "yes", "no"]


class Sought(Spec):
    """Filters by what a search found. A feature of which a measure was not taken passes no bound on it.

    Attributes:
        evidence: name of the search; "" is the first.
        chosen: selected by it, not selected, or any.
        effect_from, effect_to: contrast, in units of the feature's activation.
        p_to: family-wise p of the contrast, at most.
        d_from: exact effect on D, at least, nats; first-order where the search took no exact one.
        writer_to: act-writer share, at most.
        naming_from: smallest p of the naming screens, at least.
    """

    evidence: str = Field(default="", max_length=200)
    chosen: YesNo = "any"
    effect_from: float | None = Field(default=None, ge=-1e9, le=1e9)
    effect_to: float | None = Field(default=None, ge=-1e9, le=1e9)
    p_to: float | None = Field(default=None, ge=0, le=1)
    d_from: float | None = Field(default=None, ge=-1e9, le=1e9)
    writer_to: float | None = Field(default=None, ge=-1e9, le=1e9)
    naming_from: float | None = Field(default=None, ge=0, le=1)


class Query(Spec):
    """Which features, in which order. Every field is a word of the address, so that a view has a permalink.

    Attributes:
        q: words looked for in labels, and in the tokens a feature peaks on and promotes.
        sort: column to sort by.
        order: "up" from the smallest, "down" from the largest.
        density_from, density_to: share of tokens on which the feature fires, in percent.
        maximum_from, maximum_to: largest activation.
        state: live (fires at all), dead (never), rare (fires on less than 0.01 % of tokens), dense (more than 1 %).
        labelled: with a label, without, or any.
        starred: with a star, without, or any.
        page: from 1; PAGE features each.
        sought: filters by what a search found; its fields are words of the address too.
    """

    q: str = Field(default="", max_length=200)
    sort: Sort = "id"
    order: Literal["up", "down"] = "up"
    density_from: float | None = Field(default=None, ge=0, le=100)
    density_to: float | None = Field(default=None, ge=0, le=100)
    maximum_from: float | None = Field(default=None, ge=0)
    maximum_to: float | None = Field(default=None, ge=0)
    state: State = "any"
    labelled: YesNo = "any"
    starred: YesNo = "any"
    page: int = Field(default=1, ge=1, le=10**7)
    sought: Sought = Sought()

    @classmethod
    def read(cls, params: Mapping[str, str]) -> Query:
        """From an address; empty fields and other views' words are passed over. Raises SpecError that names the field."""
        own, found = ({name: params[name].strip() for name in kind.model_fields if params.get(name, "").strip()}
                      for kind in (cls, Sought))
        own.pop("sought", None)
        return cls.checked({**own, "sought": Sought.checked(found, "the address")}, "the address")

    def words(self) -> dict[str, Any]:
        """Every word of the address and its value."""
        return {**self.model_dump(exclude={"sought"}), **self.sought.model_dump()}

    def params(self, **changes: Any) -> dict[str, str]:
        """Words of the address, without those at their default; `changes` replace fields (and go to page 1)."""
        moved = {**self.words(), **({"page": 1} if changes else {}), **changes}
        fields = {**Query.model_fields, **Sought.model_fields}
        return {name: _word(value) for name, value in moved.items() if value is not None and value != fields[name].default}


def _word(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


class Selection(NamedTuple):
    """Features that pass the filters (ascending), and the number that each is sorted by, smallest first."""

    latents: Int64[ndarray, "n"]
    keys: Float64[ndarray, "n"]

    def window(self, start: int, stop: int) -> Int64[ndarray, "window"]:
        """Features `start` up to `stop` of the sorted order; of equal keys the lower feature comes first.

        Without sorting all: the `stop` smallest keys are found in linear time.
        """
        stop = min(stop, len(self.keys))
        if start >= stop:
            return self.latents[:0]
        near = np.arange(len(self.keys))
        if len(self.keys) > _SMALL:
            near = np.flatnonzero(self.keys <= np.partition(self.keys, stop - 1)[stop - 1])
        order = near[np.argsort(self.keys[near], kind="stable")]
        return self.latents[order[start:stop]]

    def around(self, latent: int) -> Around:
        """Place of `latent` in the sorted order and its neighbours there; for one that is not in it, those by number."""
        at = int(np.searchsorted(self.latents, latent))
        if at >= len(self.latents) or self.latents[at] != latent:
            return Around(None, int(self.latents[at - 1]) if at else None,
                          int(self.latents[at]) if at < len(self.latents) else None)
        key = self.keys[at]
        before, after = self.keys < key, self.keys > key
        ties = np.flatnonzero(self.keys == key)
        tie = int(np.searchsorted(ties, at))
        rank = int(before.sum()) + tie
        previous = int(self.latents[ties[tie - 1]]) if tie else _last(self, before)
        following = int(self.latents[ties[tie + 1]]) if tie + 1 < len(ties) else _first(self, after)
        return Around(rank, previous, following)


class Around(NamedTuple):
    """Rank of a feature among those selected (from 0; None if it is not one), and the features before and after it."""

    rank: int | None
    previous: int | None
    following: int | None


def _last(selection: Selection, inside: Bool[ndarray, "n"]) -> int | None:
    """The last feature in sorted order of those `inside`."""
    if not inside.any():
        return None
    ties = np.flatnonzero(inside & (selection.keys == selection.keys[inside].max()))
    return int(selection.latents[ties[-1]])


def _first(selection: Selection, inside: Bool[ndarray, "n"]) -> int | None:
    if not inside.any():
        return None
    return int(selection.latents[np.flatnonzero(inside & (selection.keys == selection.keys[inside].min()))[0]])


def select(store: FeatureStore, marks: Marks, query: Query, evidence: Evidence | None = None) -> Selection:
    """Features of `store` that pass `query`, and their sort keys. Linear in the number of features.

    Those of which the measure that is sorted by was not taken come last either way.
    """
    latents = np.flatnonzero(_passing(store, marks, query) & _sought(store, query.sought, evidence))
    if query.sort in _FOUND:
        values = np.full(len(latents), np.nan) if evidence is None else evidence.column(query.sort, store.d_sae)[latents]
        return Selection(latents, np.where(np.isnan(values), np.inf, -values if query.order == "down" else values))
    keys = _keys(store, marks, query, latents)
    return Selection(latents, -keys if query.order == "down" else keys)


def _sought(store: FeatureStore, sought: Sought, evidence: Evidence | None) -> Bool[ndarray, "d_sae"]:
    d_sae, passing = store.d_sae, np.ones(store.d_sae, dtype=bool)
    on_d = "effect_on_d" if evidence and "effect_on_d" in evidence.columns else "attribution"
    for name, low, high in (("effect", sought.effect_from, sought.effect_to), ("p", None, sought.p_to),
                            (on_d, sought.d_from, None), ("act_writer_share", None, sought.writer_to),
                            ("naming_p", sought.naming_from, None)):
        if low is None and high is None:
            continue
        values = np.full(d_sae, np.nan) if evidence is None else evidence.column(name, d_sae)
        passing &= (values >= (-np.inf if low is None else low)) & (values <= (np.inf if high is None else high))
    if sought.chosen != "any":
        chosen = np.zeros(d_sae, dtype=bool) if evidence is None else evidence.selected(d_sae)
        passing &= chosen == (sought.chosen == "yes")
    return passing


def _passing(store: FeatureStore, marks: Marks, query: Query) -> Bool[ndarray, "d_sae"]:
    passing = np.ones(store.d_sae, dtype=bool)
    percent = store.density * 100
    for low, high, values in ((query.density_from, query.density_to, percent),
                              (query.maximum_from, query.maximum_to, store.columns["maximum"])):
        if low is not None:
            passing &= values >= low
        if high is not None:
            passing &= values <= high
    if query.state != "any":
        fires = store.columns["count"] > 0
        passing &= {"live": fires, "dead": ~fires, "rare": fires & (store.density < RARE),
                    "dense": store.density > DENSE}[query.state]
    for wanted, chosen in ((query.labelled, marks.labels), (query.starred, marks.starred)):
        if wanted != "any":
            passing &= _membership(store.d_sae, chosen) == (wanted == "yes")
    return passing & _mentions(store, marks, query.q) if query.q else passing


def _membership(d_sae: int, latents: Any) -> Bool[ndarray, "d_sae"]:
    found = np.zeros(d_sae, dtype=bool)
    found[[latent for latent in latents if latent < d_sae]] = True
    return found


def _mentions(store: FeatureStore, marks: Marks, words: str) -> Bool[ndarray, "d_sae"]:
    """Features whose label holds `words`, or whose peak or most promoted token does (spaces at its ends apart)."""
    wanted = words.casefold()
    if words.isdigit() and int(words) < store.d_sae:
        found = _membership(store.d_sae, [int(words)])
    else:
        found = np.zeros(store.d_sae, dtype=bool)
    found |= _membership(store.d_sae, [latent for latent, label in marks.labels.items() if wanted in label.casefold()])
    holds = np.char.find(store.folded_vocabulary, wanted) >= 0
    for column in ("peak_token", "promoted_token"):
        tokens = store.columns[column]
        found |= holds[np.clip(tokens, 0, len(holds) - 1)] & (tokens >= 0) & (tokens < len(holds))
    return found


def _keys(store: FeatureStore, marks: Marks, query: Query, latents: Int64[ndarray, "n"]) -> Float64[ndarray, "n"]:
    if query.sort == "id":
        return latents.astype(np.float64)
    if query.sort == "label":
        ranks = {text: rank for rank, text in enumerate(sorted(set(marks.labels.values()), key=str.casefold))}
        last = len(ranks) if query.order == "up" else -1  # those without a label come last either way
        keys = np.full(store.d_sae, last, dtype=np.float64)
        for latent, text in marks.labels.items():
            if latent < store.d_sae:
                keys[latent] = ranks[text]
        return keys[latents]
    return store.columns["count" if query.sort == "density" else query.sort][latents].astype(np.float64)
