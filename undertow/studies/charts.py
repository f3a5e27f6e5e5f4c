"""Two plots as inline SVG. Colours come from the style sheet of the page, so that they follow its dark mode."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple, final

WIDTH, HEIGHT = 340, 210  # units of the view box: as wide as a telephone, so that text keeps its size there
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 12, 40


@final
class Point(NamedTuple):
    """A figure at `x`, with its 95 % interval where there is one."""

    x: float
    value: float
    low: float | None = None
    high: float | None = None


@final
class Bar(NamedTuple):
    """A labelled figure, with its 95 % interval where there is one."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None


@final
class _Scale(NamedTuple):
    """Maps [low, high] to view-box coordinates [start, end]."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Three to six round figures within the range."""
        raw = (self.high - self.low) / 4
        power = 10.0 ** math.floor(math.log10(raw))
        step = min((factor * power for factor in (1, 2, 2.5, 5, 10)), key=lambda s: abs(s - raw))
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(points: Sequence[Point], x_label: str, y_label: str, limit: float | None = None) -> str:
    """Figures joined by a line over x, intervals as a band, `limit` as a dashed line; "" without two finite points."""
    drawn = sorted((p for p in points if math.isfinite(p.x) and math.isfinite(p.value)), key=lambda p: p.x)
    if len({point.x for point in drawn}) < 2:
        return ""
    x = _Scale(drawn[0].x, drawn[-1].x, _LEFT, WIDTH - _RIGHT)
    y = _range([v for p in drawn for v in _finite(p.value, p.low, p.high)] + _finite(limit), HEIGHT - _BOTTOM, _TOP)
    bounded = [(p.x, *_finite(p.low, p.high)) for p in drawn if len(_finite(p.low, p.high)) == 2]
    parts = [_axes(x, y, x_label, y_label)]
    if len(bounded) > 1:
        upper, lower = ([f"{x(p[0]):.1f},{y(p[side]):.1f}" for p in bounded] for side in (2, 1))
        parts.append(f'<polygon class="band" points="{" ".join(upper + lower[::-1])}"/>')
    if limit is not None:
        parts.append(f'<line class="limit" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(limit):.1f}" y2="{y(limit):.1f}"/>')
    path = " ".join(f"{x(p.x):.1f},{y(p.value):.1f}" for p in drawn)
    parts.append(f'<polyline class="own" points="{path}"/>')
    parts += [_dot(x(p.x), y(p.value), f"{p.x:g}", p) for p in drawn]
    return _svg(HEIGHT, f"{y_label} by {x_label}", parts)


def interval_chart(bars: Sequence[Bar], x_label: str) -> str:
    """One line a label: a dot at its figure and a stroke over its interval; "" without a finite figure."""
    drawn = [bar for bar in bars if math.isfinite(bar.value)]
    if not drawn:
        return ""
    height, left = 22 * len(drawn) + _TOP + _BOTTOM, 84
    x = _range([v for b in drawn for v in _finite(b.value, b.low, b.high)], left, WIDTH - _RIGHT)
    base = height - _BOTTOM
    parts = [_ticks_below(x, base), f'<line class="axis" x1="{left}" x2="{WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>',
             _text((left + WIDTH - _RIGHT) / 2, height - 6, x_label)]
    for row, bar in enumerate(drawn):
        at = _TOP + 22 * row + 11
        parts.append(f'<text x="{left - 8}" y="{at + 4}" text-anchor="end">{escape(bar.label)}</text>')
        if len(bounds := _finite(bar.low, bar.high)) == 2:
            parts.append(f'<line class="own" x1="{x(bounds[0]):.1f}" x2="{x(bounds[1]):.1f}" y1="{at}" y2="{at}"/>')
        parts.append(_dot(x(bar.value), at, bar.label, bar))
    return _svg(height, x_label, parts)


def _dot(x: float, y: float, label: str, figure: Point | Bar) -> str:
    """A dot that tells its figure when it is pointed at."""
    bounds = _finite(figure.low, figure.high)
    told = f"{label}: {figure.value:.3g}" + (f" [{bounds[0]:.3g}, {bounds[1]:.3g}]" if len(bounds) == 2 else "")
    return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="3.5"><title>{escape(told)}</title></circle>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text class="faint" x="{x:.0f}" y="{y:.0f}" text-anchor="middle">{escape(text)}</text>'


def _finite(*values: float | None) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _range(values: Sequence[float], start: float, end: float) -> _Scale:
    """A scale that holds all values and 0."""
    low, high = min(0.0, *values), max(0.0, *values)
    margin = 0.05 * (high - low) or 0.5
    return _Scale(low - margin if low < 0 else low, high + margin, start, end)


def _ticks_below(x: _Scale, base: float) -> str:
    return "".join(f'<line class="axis" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{_TOP}" y2="{base}"/>'
                   f'<text class="faint" x="{x(t):.1f}" y="{base + 14}" text-anchor="middle">{t:g}</text>' for t in x.ticks())


def _axes(x: _Scale, y: _Scale, x_label: str, y_label: str) -> str:
    rows = "".join(f'<line class="axis" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>'
                   f'<text class="faint" x="{_LEFT - 5}" y="{y(t) + 3:.1f}" text-anchor="end">{t:g}</text>' for t in y.ticks())
    middle = (HEIGHT - _BOTTOM + _TOP) / 2
    side = f'<g transform="translate(10 {middle:.0f}) rotate(-90)">{_text(0, 0, y_label)}</g>'
    return _ticks_below(x, HEIGHT - _BOTTOM) + rows + _text((_LEFT + WIDTH - _RIGHT) / 2, HEIGHT - 6, x_label) + side


def _svg(height: int, title: str, parts: Sequence[str]) -> str:
    return (f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}"><title>{escape(title)}</title>'
            f'{"".join(parts)}</svg>')
