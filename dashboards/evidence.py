"""What searches found of an SAE's features: read from what `features scan`, `features select` and `demo` wrote.

A feature store is of an SAE and a text; evidence is of an SAE, a subject and a concept. So it stays in artifacts of its own,
and is laid beside the store's columns when a page asks for it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Bool, Float64
from numpy import ndarray

from dashboards.finding import folders, kind_of
from dashboards.store import FeatureStore, slug
from features.contrast import KIND as TABLE
from features.contrast import load_table
from features.selection import KIND as SET
from features.selection import FeatureSet
from interventions.recipe import Recipe
from undertow.core.errors import ArtifactError, SpecError, UserError
from undertow.core.storage import MANIFEST, open_artifact
from undertow.studies.running import KIND as DEMO

NAMING = ("logit_p", "contexts_p", "output_p")
FAILS = 0.05
"""A feature whose smallest naming p lies below this has to do with the word."""
MEASURES = {
    "effect": "contrast: mean activation where the state is, less where it is not",
    "t": "the same over its standard error across families",
    "p": "family-wise p of the contrast",
    "mean_positive": "mean activation where the state is", "mean_negative": "mean activation where it is not",
    "rate_positive": "share of pairs in which it fires where the state is",
    "rate_negative": "share of pairs in which it fires where it is not",
    "effect_on_d": "exact effect on D, alone, nats", "attribution": "first-order effect on D, nats",
    "act_writer_share": "share of its effect that only writes the act's words",
    "logit": "what it writes into the word's logits", "logit_matched": "the same, median of matched features",
    "logit_p": "naming screen: logits, p",
    "contexts": "how often the word stands where it fires", "contexts_matched": "the same, median of matched features",
    "contexts_p": "naming screen: contexts, p",
    "output": "what adding it does to the word's probability", "output_matched": "the same, median of matched features",
    "output_p": "naming screen: output, p",
    "naming_p": "smallest p of the naming screens; below 0.05 it has to do with the word",
    "rank": "rank by first-order effect", "rate": "share of decisions at which it fires",
    "typical_activation": "typical activation at a decision", "floor": "floor that it was held at",
}
_TITLES = {"effect": "Effect", "p": "p", "effect_on_d": "On D", "attribution": "Attribution",
           "act_writer_share": "Writer share", "naming_p": "Naming p"}
_ORDER = (SET, DEMO, TABLE)
_COMMANDS = {SET: "features select", DEMO: "demo", TABLE: "features scan"}


@final
@dataclass(frozen=True, eq=False)
class Evidence:
    """What one search found.

    Attributes:
        key: its name in addresses.
        path: the artifact.
        kind: the artifact's kind.
        concept: what was looked for.
        pairs: digest of the pairs; "" where none is recorded.
        chosen: the selected features, in order of choice.
        columns: measures by the names of MEASURES; NaN where one was not taken.
    """

    key: str
    path: Path
    kind: str
    concept: str
    pairs: str
    chosen: tuple[int, ...]
    columns: Mapping[str, Float64[ndarray, "d_sae"]]

    @property
    def title(self) -> str:
        """The search in words."""
        return f"{self.key}: {_COMMANDS[self.kind]}{f', {self.concept}' if self.concept else ''}"

    @property
    def shown(self) -> list[tuple[str, str, str]]:
        """Its columns in the table: name, title and meaning; the first-order effect only where there is no exact one."""
        exact = "effect_on_d" in self.columns
        return [(name, title, MEASURES[name]) for name, title in _TITLES.items()
                if name in self.columns and not (exact and name == "attribution")]

    @property
    def sorts(self) -> list[tuple[str, str]]:
        """What the table can be sorted by because of it: name and words."""
        return [("chosen", "selected"), *((name, title.lower()) for name, title, _ in self.shown)]

    def rank(self, latent: int) -> int | None:
        """Place of a feature among the chosen, from 1; None if it was not."""
        return self.chosen.index(latent) + 1 if latent in self.chosen else None

    def of(self, latent: int) -> dict[str, float]:
        """What was measured of a feature."""
        values = {name: float(values[latent]) for name, values in self.columns.items()}
        return {name: values[name] for name in MEASURES if name in values and not np.isnan(values[name])}

    def column(self, name: str, d_sae: int) -> Float64[ndarray, "d_sae"]:
        """A measure of all features; NaN where it was not taken. "chosen" is the order of choice, from 1."""
        if name == "chosen":
            return _column(d_sae, {latent: float(rank) for rank, latent in enumerate(self.chosen, start=1)})
        return self.columns[name] if name in self.columns else np.full(d_sae, np.nan)

    def selected(self, d_sae: int) -> Bool[ndarray, "d_sae"]:
        """Whether each feature was chosen."""
        return ~np.isnan(self.column("chosen", d_sae))


class Findings(NamedTuple):
    """The searches of one SAE by name, those with the most to say first, and what could not be opened."""

    found: dict[str, Evidence]
    trouble: tuple[str, ...] = ()

    @property
    def names(self) -> list[tuple[str, str]]:
        """To choose from: name in addresses, and title."""
        return [("", "the first"), *((key, one.title) for key, one in self.found.items())]

    def named(self, key: str) -> Evidence | None:
        """The search of that name; of "" the first, if there is one. Raises SpecError if there is none of that name."""
        if not key:
            return next(iter(self.found.values()), None)
        if key not in self.found:
            raise SpecError(f"evidence = {key!r}: there is no such search of this SAE",
                            f"choose from: {', '.join(self.found) or 'none'}")
        return self.found[key]


@final
class EvidenceShelf:
    """Searches in `folder` and `depth` levels below it; looked for at every question, read once."""

    def __init__(self, folder: Path | None, depth: int = 3) -> None:
        self._folder, self._depth = folder, depth
        self._read: dict[tuple[Path, str], tuple[int, Evidence | str | None]] = {}

    def of(self, store: FeatureStore) -> Findings:
        """Every search of the store's SAE."""
        paths = [] if self._folder is None else [path for path in folders(self._folder, self._depth) if kind_of(path) in _ORDER]
        answers = [self._once(path, store) for path in paths]
        found: dict[str, Evidence] = {}
        for one in joined([answer for answer in answers if isinstance(answer, Evidence)]):
            names = (one.key if number == 1 else f"{one.key}-{number}" for number in range(1, len(found) + 2))
            key = next(free for free in names if free not in found)
            found[key] = replace(one, key=key)
        return Findings(found, tuple(answer for answer in answers if isinstance(answer, str)))

    def _once(self, path: Path, store: FeatureStore) -> Evidence | str | None:
        """The evidence, what is wrong with it, or None if it is another SAE's; again only where the manifest changed."""
        known, stamp = self._read.get((path, store.dictionary)), (path / MANIFEST).stat().st_mtime_ns
        if known is None or known[0] != stamp:
            try:
                answer: Evidence | str | None = _read(path, store)
            except UserError as error:
                answer = str(error)
            known = self._read[path, store.dictionary] = (stamp, answer)
        return known[1]


def read_evidence(path: Path, store: FeatureStore) -> Evidence:
    """The evidence in one artifact. Raises ArtifactError if it holds none, is damaged, or is of another SAE."""
    if kind_of(path) not in _ORDER:
        raise ArtifactError(f"{path} holds no evidence", "name what undertow features scan, features select or demo wrote")
    found = _read(path, store)
    if found is None:
        raise ArtifactError(f"{path} is of another SAE than {store.name}", f"search this one: {search_command(store)}")
    return found


def search_command(store: FeatureStore) -> str:
    """The command that looks for features of this SAE that carry a concept."""
    return shlex.join(["undertow", "features", "select", store.record["spec"]["sae"], "--concept", "care", "--out",
                       f"runs/{slug(store.title)}-care"])


def joined(found: Iterable[Evidence]) -> list[Evidence]:
    """Sets first; a set stands on the scan of the same pairs where that was kept: it measures all features, not a shortlist."""
    ordered = sorted(found, key=lambda one: _ORDER.index(one.kind))
    scans = {one.pairs: one for one in ordered if one.kind == TABLE}
    return [replace(one, columns=_over(one.columns, scans[one.pairs].columns))
            if one.kind == SET and one.pairs in scans else one for one in ordered]


def _over(upper: Mapping[str, Float64[ndarray, "d_sae"]], lower: Mapping[str, Float64[ndarray, "d_sae"]]
          ) -> dict[str, Float64[ndarray, "d_sae"]]:
    filled = {name: np.where(np.isnan(values), lower[name], values) if name in lower else values
              for name, values in upper.items()}
    return {**lower, **filled}


def _read(path: Path, store: FeatureStore) -> Evidence | None:
    kind = kind_of(path)
    try:
        return {TABLE: _of_table, SET: _of_set, DEMO: _of_demo}[kind](path, store)
    except (KeyError, TypeError, ValueError, AttributeError, OSError) as error:
        raise ArtifactError(f"{path} holds something that this version does not read: {error!r}",
                            f"search again: {search_command(store)}") from None


def _of_table(path: Path, store: FeatureStore) -> Evidence | None:
    record, table = open_artifact(path, TABLE).record, load_table(path)
    if table.origin.sae != store.dictionary:
        return None
    if table.d_sae != store.d_sae:
        raise ArtifactError(f"{path} has {table.d_sae:,} features, and the SAE {store.d_sae:,}")
    columns = {field.name: np.asarray(getattr(table, field.name), dtype=np.float64) for field in fields(table)
               if field.name in MEASURES}
    concept = str(record.get("spec", {}).get("concept", ""))
    return Evidence(slug(path.name), path, TABLE, concept, table.origin.pairs, (), columns)


def _of_set(path: Path, store: FeatureStore) -> Evidence | None:
    chosen = FeatureSet.load(path)
    if chosen.origin.sae != store.dictionary:
        return None
    return Evidence(slug(path.name), path, SET, chosen.concept, chosen.origin.pairs, _inside(chosen.latents, store),
                    _columns(chosen.evidence, store.d_sae))


def _of_demo(path: Path, store: FeatureStore) -> Evidence | None:
    """A run of the demo; one that found nothing to operate on has no recipe, and chose nothing."""
    folder = open_artifact(path, DEMO).path
    if not (folder / "recipe.yaml").is_file() or Recipe.load(folder / "recipe.yaml").sae != store.dictionary:
        return None
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = {int(feature["latent"]): feature for feature in summary["features"]}
    return Evidence(slug(path.resolve().name), path, DEMO, str(summary.get("concept", "")), "", _inside(rows, store),
                    _columns(rows, store.d_sae))


def _inside(latents: Iterable[int], store: FeatureStore) -> tuple[int, ...]:
    return tuple(store.known(latent) for latent in latents)


def _columns(rows: Mapping[int, Mapping[str, Any]], d_sae: int) -> dict[str, Float64[ndarray, "d_sae"]]:
    """Measures of some features as columns; what is no number is passed over."""
    known = {name: {latent: float(row[name]) for latent, row in rows.items()
                    if latent < d_sae and isinstance(row.get(name), (int, float))} for name in MEASURES}
    columns = {name: _column(d_sae, values) for name, values in known.items() if values}
    screens = [columns[name] for name in NAMING if name in columns]
    if screens:
        columns["naming_p"] = np.fmin.reduce(screens)
    return columns


def _column(d_sae: int, values: Mapping[int, float]) -> Float64[ndarray, "d_sae"]:
    column = np.full(d_sae, np.nan)
    column[list(values)] = list(values.values())
    return column
