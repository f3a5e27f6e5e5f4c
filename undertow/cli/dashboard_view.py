"""The features table and an operation for a terminal. All text goes through `rich.text.Text`: no markup counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dashboards.store import FeatureStore
    from dashboards.table_page import TablePage

_EVIDENCE = ("effect", "p", "effect_on_d", "attribution", "act_writer_share", "naming_p")


def table_view(found: TablePage, store: FeatureStore, page: int) -> RenderableType:
    """One page of the table, with the size of the whole above it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    measured = any(row.rank or row.found for row in found.rows)
    for title, justify in (("no.", "right"), ("label", "left"), ("density", "right"), ("max", "right"), ("promotes", "left"),
                           *((("selected", "right"), ("evidence", "left")) if measured else ()), ("strongest context", "left")):
        table.add_column(title, justify="right" if justify == "right" else "left", overflow="fold")
    for row in found.rows:
        label = f"{'★ ' if row.starred else ''}{row.label}"
        evidence = ", ".join(f"{name} {row.found[name]:.3g}" for name in _EVIDENCE if name in row.found)
        search = [str(row.rank or ""), evidence] if measured else []
        table.add_row(str(row.latent), Text(label), f"{row.density:.3%}", f"{row.maximum:.3g}", Text(f"'{row.promoted}'"),
                      *search, Text(row.passage.text if row.passage else "never fired"))
    head = Text(f"{found.n_passing:,} of {store.d_sae:,} features, measured on {store.n_tokens:,} tokens; "
                f"page {page:,} of {found.n_pages:,}")
    return Group(head, table)


def operated_view(summary: dict[str, Any], tokens: list[dict[str, Any]]) -> RenderableType:
    """Both texts with the changed words marked, the figures of the run, and the operated text token by token."""
    sides = []
    for side, title in (("base", "untouched"), ("operated", "operated")):
        line = Text(f"{title:<10} ")
        for text, changed in summary["pieces"][side]:
            line.append(text, "bold underline" if changed else "")
        sides.append(line)
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for title in ("token", "KL", "hazard", "untouched", "acted", "guard"):
        table.add_column(title, justify="left" if title == "token" else "right")
    for token in tokens:
        if token["side"] == "operated":
            acted = "–" if token["fired"] is None else "yes" if token["fired"] else "no"
            figures = [f"{token[name]:.3g}" for name in ("kl", "hazard", "base_hazard")]
            table.add_row(Text(repr(token["spelling"])), *figures, acted, "refuses" if token["refused"] else "")
    said = ", ".join(summary["words"]["operated"]) or "none"
    foot = Text(f"\nforms of the word in the operated text: {said}; the guard would have refused "
                f"{summary['refused']['operated']} of {summary['n']['operated']} tokens\nKL mean {summary['kl_mean']:.3g}, at "
                f"most {summary['kl_max']:.3g} nats; hazard {summary['hazard']:.3g} in all, {summary['hazard_base']:.3g} "
                f"untouched on the same text; acted on {summary['firings']} of {summary['positions']} tokens")
    return Group(*sides, Text(), table, foot)
