"""The features table for a terminal. All text goes through `rich.text.Text`: no markup counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dashboards.store import FeatureStore
    from dashboards.table_page import TablePage


def table_view(found: TablePage, store: FeatureStore, page: int) -> RenderableType:
    """One page of the table, with the size of the whole above it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for title, justify in (("no.", "right"), ("label", "left"), ("density", "right"), ("max", "right"), ("promotes", "left"),
                           ("strongest context", "left")):
        table.add_column(title, justify="right" if justify == "right" else "left", overflow="fold")
    for row in found.rows:
        label = f"{'★ ' if row.starred else ''}{row.label}"
        table.add_row(str(row.latent), Text(label), f"{row.density:.3%}", f"{row.maximum:.3g}", Text(f"'{row.promoted}'"),
                      Text(row.passage.text if row.passage else "never fired"))
    head = Text(f"{found.n_passing:,} of {store.d_sae:,} features, measured on {store.n_tokens:,} tokens; "
                f"page {page:,} of {found.n_pages:,}")
    return Group(head, table)
