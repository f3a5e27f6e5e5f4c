"""Plots that only studies have: the ladder (effect over cost, with names), heat maps by block and token, and any chart as a
file of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple, final

WIDTH, HEIGHT = 400, 280  # units of the view box
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 78, 14, 42
_LINE = 11.5  # between labels
_SHADES = ((255, 246, 233), (253, 212, 158), (252, 141, 89), (215, 48, 31), (110, 10, 6))  # light to dark, at even steps
_DECADES = 3  # below the largest value, that the shades tell apart
_ACROSS, _PANEL, _MARGIN, _CAPTION = 2, 162, 30, 17  # panels side by side; units of one, of its numbers, of a line of words
_COLOURS = {"--ink": "#1d2329", "--faint": "#5d6873", "--line": "#dcdad3", "--own": "#b5542f", "--second": "#2f6f8f"}
_STYLE = ("svg{background:#fff;font:11px sans-serif}text{fill:var(--ink)}.faint{fill:var(--faint);font-size:10px}"
          ".axis{stroke:var(--line);fill:none}.own{stroke:var(--own);stroke-width:2;fill:none}.dot{fill:var(--own)}"
          ".band{fill:var(--own);opacity:.18}.limit{stroke:var(--second);stroke-dasharray:4 3;fill:none}")


@final
class Level(NamedTuple):
    """An arm on the ladder: its cost (0 or more, drawn as log10(1 + cost)) and its effect with its interval."""

    label: str
    cost: float
    value: float
    low: float | None = None
    high: float | None = None


def ladder_chart(levels: Sequence[Level], x_label: str, y_label: str, limits: Sequence[float] = ()) -> str:
    """Effect over log10 of the cost, every dot with its name, `limits` as dashed lines; "" without a finite figure."""
    drawn = [level for level in levels if math.isfinite(level.value) and math.isfinite(level.cost)]
    if not drawn:
        return ""
    places = [math.log10(1 + level.cost) for level in drawn]
    heights = [v for level in drawn for v in (level.value, level.low, level.high) if v is not None and math.isfinite(v)]
    top, bottom = max([*heights, *limits, 0.0]), min([*heights, *limits, 0.0])
    room = 0.06 * (top - bottom) or 0.5
    x_span, y_low, y_span = max(places) * 1.05 or 1.0, bottom - room, top - bottom + 2 * room

    def x(place: float) -> float:
        return _LEFT + place / x_span * (WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return HEIGHT - _BOTTOM - (value - y_low) / y_span * (HEIGHT - _BOTTOM - _TOP)

    parts = _axes(x, y, (x_span, y_low, y_low + y_span))
    parts += [f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(limit):.1f}" y2="{y(limit):.1f}"/>'
              for limit in limits]
    parts += [_words((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 8, x_label),
              f'<g transform="translate(11 {(HEIGHT - _BOTTOM + _TOP) / 2:.0f}) rotate(-90)">{_words(0, 0, y_label)}</g>']
    order = sorted(range(len(drawn)), key=lambda i: y(drawn[i].value))
    at = dict(zip(order, apart([y(drawn[i].value) for i in order]), strict=True))
    for i, (level, place) in enumerate(zip(drawn, places, strict=True)):
        parts.append(_dot(level, x(place), y, at[i]))
    return (f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)} by {escape(x_label)}">'
            f"<title>{escape(y_label)} by {escape(x_label)}</title>{''.join(parts)}</svg>")


@final
class Panel(NamedTuple):
    """A matrix of figures, 0 or more: one row a block, block 0 first; one column a token, that of the decision last."""

    label: str
    values: Sequence[Sequence[float]]


def heatmap(panels: Sequence[Panel], what: str) -> str:
    """Small multiples on one colour scale, logarithmic over _DECADES decades below the largest value, 0 being white; block 0 is
    the lowest row. "" without a panel of finite figures."""
    drawn = [panel for panel in panels if panel.values and all(row and all(map(math.isfinite, row)) for row in panel.values)]
    if not drawn:
        return ""
    top = max(value for panel in drawn for row in panel.values for value in row)
    cell = max(3.0, min(12.0, 110 / max(len(panel.values) for panel in drawn)))
    pitch = cell * max(len(panel.values) for panel in drawn) + 2 * _CAPTION + 6
    parts = []
    for i, panel in enumerate(drawn):
        across, down = (_MARGIN + (i % _ACROSS) * (_PANEL + _MARGIN + 8), _CAPTION + (i // _ACROSS) * pitch)
        parts.append(f'<g transform="translate({across} {down:.1f})">{_panel(panel, cell, top)}</g>')
    below = math.ceil(len(drawn) / _ACROSS) * pitch
    title = f"{what}, by block (up) and token before the decision (0: the decision)"
    parts += [_words(WIDTH / 2, below + 12, "block, upwards; token before the decision, 0 being the decision"),
              _legend(top, below + 24, what)]
    return (f'<svg viewBox="0 0 {WIDTH} {below + 58:.0f}" role="img" aria-label="{escape(title)}">'
            f"<title>{escape(title)}</title>{''.join(parts)}</svg>")


def shade(value: float, top: float) -> str:
    """The colour of a value where `top` is the largest: white for 0, lightest for a thousandth of `top` and less."""
    if value <= 0 or top <= 0:
        return "#ffffff"
    place = max(0.0, min(1.0, 1 + math.log10(value / top) / _DECADES)) * (len(_SHADES) - 1)
    first = min(int(place), len(_SHADES) - 2)
    mixed = (round(a + (b - a) * (place - first)) for a, b in zip(_SHADES[first], _SHADES[first + 1], strict=True))
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _panel(panel: Panel, cell: float, top: float) -> str:
    n = len(panel.values)
    high = n * cell
    parts = [f'<text x="0" y="-4">{escape(panel.label)}</text>',
             f'<text class="faint" x="-4" y="{high - cell / 2 + 3:.1f}" text-anchor="end">0</text>']
    if n > 1:
        parts.append(f'<text class="faint" x="-4" y="{cell / 2 + 3:.1f}" text-anchor="end">{n - 1}</text>')
    for block, row in enumerate(panel.values):
        wide, y = _PANEL / len(row), high - (block + 1) * cell
        for place, value in enumerate(row):
            told = f"{panel.label}, block {block}, token {place - len(row) + 1}: {value:.3g}"
            parts.append(f'<rect x="{place * wide:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{cell:.1f}" '
                         f'fill="{shade(value, top)}"><title>{escape(told)}</title></rect>')
    first = 1 - len(panel.values[0])
    parts.append(f'<rect class="axis" x="0" y="0" width="{_PANEL}" height="{high:.1f}"/>'
                 f'<text class="faint" x="0" y="{high + 11:.1f}">{str(first).replace("-", "−")}</text>'
                 f'<text class="faint" x="{_PANEL}" y="{high + 11:.1f}" text-anchor="end">0</text>')
    return "".join(parts)


def _legend(top: float, y: float, what: str) -> str:
    """A swatch for 0 and for every decade down from the largest value, with what it stands for."""
    values = [0.0, *(top / 10 ** power for power in reversed(range(_DECADES + 1)))] if top > 0 else [0.0]
    parts = [f'<text class="faint" x="{_MARGIN}" y="{y + 8:.0f}">{escape(what)}</text>']
    for i, value in enumerate(values):
        x = _MARGIN + i * 72
        told = f"≤ {value:.2g}" if i == 1 else f"{value:.2g}"
        parts.append(f'<rect class="swatch" x="{x}" y="{y + 14:.0f}" width="14" height="10" fill="{shade(value, top)}" '
                     f'stroke="#8a8f94" stroke-width=".5"/><text class="faint" x="{x + 18}" y="{y + 23:.0f}">{told}</text>')
    return "".join(parts)


def apart(heights: Sequence[float]) -> list[float]:
    """Ascending heights moved so that neighbours are a line apart and the last is inside: pushed down, then up from below."""
    moved: list[float] = []
    for height in heights:
        moved.append(max(height, moved[-1] + _LINE) if moved else height)
    limit = float(HEIGHT - _BOTTOM)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - _LINE
    return moved


def standalone(svg: str) -> str:
    """A chart as a file that needs no page around it."""
    if not svg:
        return ""
    style = _STYLE
    for name, colour in _COLOURS.items():
        style = style.replace(f"var({name})", colour)
    named = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    return named.replace("<title>", f"<style>{style}</style><title>", 1)


def _dot(level: Level, x: float, y: Callable[[float], float], label: float) -> str:
    told = f"{level.label}: {level.value:.3g}"
    parts = ""
    if level.low is not None and level.high is not None and math.isfinite(level.low) and math.isfinite(level.high):
        parts = f'<line class="own" x1="{x:.1f}" x2="{x:.1f}" y1="{y(level.low):.1f}" y2="{y(level.high):.1f}"/>'
        told += f" [{level.low:.3g}, {level.high:.3g}]"
    at = y(level.value)
    return (f'{parts}<circle class="dot" cx="{x:.1f}" cy="{at:.1f}" r="3.5"><title>{escape(told)}</title></circle>'
            f'<line class="axis" x1="{x + 4:.1f}" x2="{WIDTH - _RIGHT + 6}" y1="{at:.1f}" y2="{label:.1f}"/>'
            f'<text x="{WIDTH - _RIGHT + 9}" y="{label + 4:.1f}">{escape(level.label)}</text>')


def _axes(x: Callable[[float], float], y: Callable[[float], float], ends: tuple[float, float, float]) -> list[str]:
    x_end, low, high = ends
    parts = []
    step = max(1, round(x_end / 6))
    for power in range(0, int(x_end) + 1, step):
        parts.append(f'<line class="axis" x1="{x(power):.1f}" x2="{x(power):.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}"/>'
                     f'<text class="faint" x="{x(power):.1f}" y="{HEIGHT - _BOTTOM + 14}" text-anchor="middle">{power}</text>')
    rise = 10.0 ** math.floor(math.log10((high - low) / 4))
    rise = min((factor * rise for factor in (1, 2, 2.5, 5, 10)), key=lambda value: abs(value - (high - low) / 4))
    for i in range(math.ceil(low / rise), math.floor(high / rise) + 1):
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(i * rise):.1f}" y2="{y(i * rise):.1f}"/>'
                     f'<text class="faint" x="{_LEFT - 5}" y="{y(i * rise) + 3:.1f}" text-anchor="end">{i * rise:g}</text>')
    return parts


def _words(x: float, y: float, text: str) -> str:
    return f'<text class="faint" x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{escape(text)}</text>'
