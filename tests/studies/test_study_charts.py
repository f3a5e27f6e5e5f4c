"""The ladder plot and heat maps: what is drawn where, by hand arithmetic; labels that do not lie on each other."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from undertow.studies.study_charts import HEIGHT, WIDTH, Level, Panel, apart, heatmap, ladder_chart, shade, standalone


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


def cells(svg: str) -> list[tuple[float, float, str, str]]:
    """x, y, colour and what is told of every cell."""
    found = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)"[^>]*fill="(#\w+)"><title>([^<]*)</title>', svg)
    return [(float(x), float(y), colour, told) for x, y, colour, told in found]


def test_shades_are_logarithmic_and_zero_is_white() -> None:
    assert shade(0.0, 1.0) == shade(0.0, 0.0) == "#ffffff"
    assert shade(1.0, 1.0) == "#6e0a06"
    assert shade(1e-3, 1.0) == shade(1e-9, 1.0) == "#fff6e9"
    assert shade(10 ** -1.5, 1.0) == shade(2 * 10 ** -1.5, 2.0) == "#fc8d59"  # half way down three decades

    def light(value: float) -> int:
        return sum(int(shade(value, 1.0)[i: i + 2], 16) for i in (1, 3, 5))

    assert all(light(a) > light(b) for a, b in pairwise([0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0]))


def test_panels_share_one_scale_and_tell_their_figures() -> None:
    svg = heatmap([Panel("L1", [[0.0, 0.01], [0.1, 1.0]]), Panel("sham", [[0.0, 0.0], [0.0, 0.0]]),
                   Panel("L4", [[0.0, 0.0], [0.0, 0.1]])], "change")
    drawn = cells(svg)
    assert [told for *_, told in drawn[:4]] == ["L1, block 0, token -1: 0", "L1, block 0, token 0: 0.01",
                                                "L1, block 1, token -1: 0.1", "L1, block 1, token 0: 1"]
    assert len(drawn) == 12
    assert {colour for *_, colour, _ in drawn[4:8]} == {"#ffffff"}
    assert drawn[2][2] == drawn[11][2] != drawn[3][2]  # 0.1 is one colour in every panel
    assert drawn[0][1] > drawn[2][1] and drawn[0][0] < drawn[1][0]  # block 0 is the lowest row, the decision the last column
    places = [(float(x), float(y)) for x, y in re.findall(r"translate\((\d+) ([\d.]+)\)", svg)]
    assert places[0][1] == places[1][1] < places[2][1] and places[0][0] == places[2][0] < places[1][0] < WIDTH / 2 + 60
    label = re.search(r'aria-label="([^"]*)"><title>([^<]*)<', svg)
    assert label is not None and label[1] == label[2]
    assert "change, by block (up) and token before the decision" in label[1]
    for legend in ("≤ 0.001", "0.01", "0.1", ">1<"):
        assert legend in svg


def test_heat_maps_are_escaped_whole_and_empty_without_figures() -> None:
    nasty = heatmap([Panel("<b>&", [[0.5]])], 'a"<i>')
    assert "<b>" not in nasty and "<i>" not in nasty and "&lt;b&gt;&amp;" in nasty
    assert heatmap([], "x") == heatmap([Panel("a", [])], "x") == heatmap([Panel("a", [[float("nan")]])], "x") == ""
    many = heatmap([Panel(str(i), [[0.1] * 24] * 40) for i in range(7)], "x")
    height = float(re.findall(r'viewBox="0 0 400 (\d+)"', many)[0])
    assert len(cells(many)) == 7 * 24 * 40 and height < 1000
    alone = standalone(nasty)
    assert alone.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "var(" not in alone
    assert alone.index("<style>") < alone.index("<title>")
