"""One page of the features table, as one value."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from dashboards.evidence import Evidence
from dashboards.notes import Marks
from dashboards.passages import Passage, passages
from dashboards.store import FeatureStore
from dashboards.table import PAGE, Query, select


class Row(NamedTuple):
    """One feature of the table; `passage` is its strongest context, none if it never fired.

    `rank` is its place among those that the search chose, from 1; `found` what the search measured."""

    latent: int
    label: str
    starred: bool
    n_firings: int
    density: float
    maximum: float
    mean: float
    nearest: float
    passage: Passage | None
    promoted: str
    rank: int | None
    found: dict[str, float]


class TablePage(NamedTuple):
    """Rows of one page, number of features that pass and of pages, and the command that prints the same."""

    rows: tuple[Row, ...]
    n_passing: int
    n_pages: int
    command: str


def table_page(store: FeatureStore, marks: Marks, query: Query, evidence: Evidence | None = None) -> TablePage:
    """The page of the table that `query` asks for; one past the end is empty."""
    selection = select(store, marks, query, evidence)
    shown = selection.window((query.page - 1) * PAGE, query.page * PAGE)
    rows = tuple(_row(store, marks, int(latent), evidence) for latent in shown)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in query.params().items() if name != "evidence"]
    words += [] if evidence is None else ["--evidence", str(evidence.path)]
    command = shlex.join(["undertow", "dashboard", "list", str(store.path), *words])
    return TablePage(rows, len(selection.latents), max(1, -(-len(selection.latents) // PAGE)), command)


def _row(store: FeatureStore, marks: Marks, latent: int, evidence: Evidence | None) -> Row:
    columns = {name: values[latent].item() for name, values in store.columns.items()}
    strongest = passages(store, latent, store.details[latent]["top"][:1], "short")
    return Row(latent, marks.labels.get(latent, ""), latent in marks.starred, columns["count"], float(store.density[latent]),
               columns["maximum"], columns["mean"], columns["nearest"], strongest[0] if strongest else None,
               store.token(columns["promoted_token"]), evidence.rank(latent) if evidence else None,
               evidence.of(latent) if evidence else {})
