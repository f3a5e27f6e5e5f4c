"""The page of a comparison: one HTML file with its plot inside as SVG, nothing loaded from elsewhere."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = {"architecture": "architecture", "site": "site", "width": "width", "fvu": "FVU", "l0": "L0", "dead_share": "dead",
           "ce_recovered": "CE recovered"}
HEADINGS = "FVU: fraction of variance unexplained. L0: active latents a token. Dead: share that never fired. " \
           "CE recovered: share of the cross-entropy lost under mean ablation that the reconstruction wins back."
_INK, _FAINT = "#b5542f", "#999999"
_STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}svg{max-width:100%;height:auto}p{color:#555}
@media (prefers-color-scheme:dark){body{background:#161616;color:#ddd}td,th{border-color:#444}p{color:#aaa}
svg{background:#fff}}"""


def cell(name: str, line: Mapping[str, Any]) -> str:
    """A figure as the tables show it; a dash where it is absent."""
    value = line.get(name)
    if value is None or value == "":
        return "–"
    formats = {"fvu": ".4f", "l0": ".1f", "ce_recovered": ".4f", "width": ",d", "dead_share": ".2%"}
    return format(value, formats[name]) if name in formats else str(value)


def comparison_page(found: Mapping[str, Any]) -> str:
    """The comparison as one self-contained HTML page."""
    saes, table = found["saes"], found["overlap"]
    names = [line["name"] for line in saes]
    figures = _table(["", *COLUMNS.values()], [[line["name"], *(cell(name, line) for name in COLUMNS)] for line in saes])
    overlaps = _table(["of", *names], [[name, *(_overlap(one) for one in row)] for name, row in zip(names, table, strict=True)])
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>SAEs side by side</title>
<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>
<h1>SAEs side by side</h1>{figures}<p>{escape(HEADINGS)}</p>{comparison_svg(found)}
<h2>Decoder overlap</h2>{overlaps}<p>Mean over the latents of the SAE on the left of the largest cosine with a latent of the one
above; in brackets, what as many random directions would give; then the share of latents with a partner of cosine at least
0.7.</p></body></html>
"""


def _overlap(one: Mapping[str, float] | None) -> str:
    return "–" if one is None else f"{one['cosine']:.3f} [{one['chance']:.3f}], {one['matched']:.0%}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{escape(text)}</th>" for text in head)
    lines = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in rows)
    return f"<table><tr>{first}</tr>{lines}</table>"


def comparison_svg(found: Mapping[str, Any]) -> str:
    """FVU and CE recovered by L0, dead latents, and the decoder overlap, as one SVG element."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    saes, table = found["saes"], found["overlap"]
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots(2, 2).flatten()
    _scatter(axes[0], saes, "fvu", "FVU (lower is better)")
    _scatter(axes[1], saes, "ce_recovered", "CE recovered (higher is better)")
    names = [line["name"] for line in saes]
    axes[2].barh(range(len(saes)), [line.get("dead_share", 0.0) for line in saes], color=_INK)
    axes[2].set_yticks(range(len(saes)), names)
    axes[2].invert_yaxis()
    axes[2].set_xlabel("share of latents that never fired")
    image = axes[3].imshow([[float("nan") if one is None else one["cosine"] for one in row] for row in table], vmin=0, vmax=1,
                           cmap="cividis")
    axes[3].set_xticks(range(len(saes)), names, rotation=45, ha="right")
    axes[3].set_yticks(range(len(saes)), names)
    figure.colorbar(image, ax=axes[3], label="mean of the largest cosine")
    out = io.StringIO()
    with rc_context({"svg.hashsalt": "undertow", "svg.fonttype": "none"}):  # the same page for the same figures
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg"):]


def _scatter(axis: Axes, saes: Sequence[Mapping[str, Any]], figure: str, label: str) -> None:
    shown = [line for line in saes if "l0" in line and figure in line]
    axis.scatter([line["l0"] for line in shown], [line[figure] for line in shown], color=_INK)
    for line in shown:
        axis.annotate(line["name"], (line["l0"], line[figure]), xytext=(4, 4), textcoords="offset points", fontsize=8,
                      color=_FAINT)
    axis.set_xlabel("L0 (active latents a token)")
    axis.set_ylabel(label)
