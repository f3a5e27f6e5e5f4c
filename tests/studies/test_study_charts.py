"""The ladder plot: what is drawn where, by hand arithmetic; labels that do not lie on each other."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from undertow.studies.study_charts import HEIGHT, Level, apart, ladder_chart, standalone


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle[^>]*cx="([\d.]+)" cy="([\d.]+)"', svg)]


def test_cost_is_on_a_log_axis_and_effect_goes_up() -> None:
    levels = [Level("a", 0.0, 0.0), Level("b", 9.0, 0.5, 0.4, 0.6), Level("c", 99.0, 1.0)]
    drawn = circles(ladder_chart(levels, "bits", "recovery"))
    assert len(drawn) == 3
    (ax, ay), (bx, by), (cx, cy) = drawn
    assert bx - ax == pytest.approx(cx - bx, abs=0.2)  # log10(1), log10(10), log10(100)
    assert ay - by == pytest.approx(by - cy, abs=0.2)
    assert ay > cy


def test_text_is_escaped_and_empty_charts_are_empty() -> None:
    assert "<b>" not in ladder_chart([Level("<b>", 1.0, 0.5)], "x<", "y")
    assert ladder_chart([], "x", "y") == standalone("") == ""
    assert ladder_chart([Level("a", 1.0, float("nan"))], "x", "y") == ""


def test_labels_are_apart_and_inside() -> None:
    crowded = apart([100.0] * 12)
    gaps = [b - a for a, b in pairwise(crowded)]
    assert min(gaps) >= 11.4
    assert max(crowded) <= HEIGHT
    assert apart([10.0, 100.0]) == [10.0, 100.0]
    low = apart([10.0, 235.0, 236.0, 237.0])
    assert low[0] == 10.0  # those that have room stay where they are
    assert low[-1] <= HEIGHT - 42


def test_a_file_of_its_own_carries_its_styles() -> None:
    svg = standalone(ladder_chart([Level("a", 10.0, 0.5, 0.4, 0.6)], "bits", "recovery", (0.7,)))
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "<style>" in svg
    assert "var(" not in svg
    assert 'class="limit"' in svg
