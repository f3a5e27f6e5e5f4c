"""The report: one page that loads nothing, escapes everything, and shows what was not measured as not measured."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from interventions.verdict import ROWS
from undertow.core.errors import SpecError
from undertow.studies.charts import HEIGHT, WIDTH, Bar, Point, interval_chart, line_chart
from undertow.studies.report import Dose, report_html
from undertow.studies.stories import Example

SUMMARY: dict[str, Any] = {
    "title": "hearth: care", "verdict": "said", "verdict_reason": "KL mean 0.5 is above 0.01", "verdict_row": 4, "seed": 7,
    "recovery": 0.8, "recovery_low": 0.7, "recovery_high": 0.9, "hazard_ratio": 1.04, "hazard_ratio_upper": 1.12,
    "arms": {"stranger": {"n": 400, "act_rate": 0.1, "act_rate_low": 0.08, "act_rate_high": 0.14, "kl_mean": 0.0},
             "L4": {"n": 400, "act_rate": 0.7125, "act_rate_low": 0.66, "act_rate_high": 0.75, "kl_mean": 0.5},
             "random": {"D": -2.05}},
    "versions": {"torch": "2.13"}, "competence": {"D_falls_with_cost": True}}
STORIES = [Example("The keeper", 3, {"stranger": " kept it.", "L4": " gave it.", "bonded": " gave it."})]
FEATURES = [{"id": "8d2a-12", "joint_effect": 0.5, "contexts": ["the <last> cup"]}, {"id": "8d2a-7", "p": 0.0123}]
CURVE = [Dose(0, 0.0, -0.1, 0.1, 0.0), Dose(2, 0.5, 0.4, 0.6, 0.02), Dose(4, 0.4)]
VOID = {"meta", "line", "polygon", "polyline"}


class Page(HTMLParser):
    """Reads a page; tags must close in order. Keeps attributes and the text by tag."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing() -> None:
    page = report_html(SUMMARY, STORIES, FEATURES, CURVE)
    read = Page(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(read.tags) and read.tags.count("svg") == 4
    assert not {"src", "href", "srcset", "data", "action"} & {name for name, _ in read.attributes}
    assert "url(" not in page and "@import" not in page and "://" not in page and "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert page == report_html(SUMMARY, STORIES, FEATURES, CURVE)


def test_the_row_that_decided_is_marked() -> None:
    page = report_html(SUMMARY)
    assert re.findall(r"<li class=decided>(.*?) →", page) == [ROWS[3][0]] and page.count("</li>") == len(ROWS)
    assert '<section class="verdict said">' in page and "KL mean 0.5 is above 0.01" in page
    assert "decided" not in report_html({"verdict": "unsaid", "verdict_reason": "r"}).split("<body>")[1]


def cells(page: str) -> dict[str, list[str]]:
    rows = re.findall(r'<tr[^>]*><td title="[^"]*">([^<]*)</td>(.*?)</tr>', page)
    return {name: re.findall(r"<td>(.*?)</td>", rest) for name, rest in rows}


def test_absent_measures_are_shown_as_absent_and_zero_as_zero() -> None:
    page = report_html(SUMMARY)
    assert cells(page) == {"stranger": ["400", "0.1 [0.08, 0.14]", "–", "0"], "L4": ["400", "0.713 [0.66, 0.75]", "–", "0.5"],
                           "random": ["–", "–", "-2.05", "–"]}
    assert "word docs" not in page and "<b>0.8</b> [0.7, 0.9]" in page and "<b>1.04</b> (≤ 1.12)" in page
    assert "unsaid ratio:" not in page and "<dt>D_falls_with_cost</dt>" in page and "hazard_ratio_upper" not in page


def test_stories_and_features() -> None:
    page = report_html(SUMMARY, STORIES, FEATURES, CURVE)
    assert re.findall(r"<mark>(.*?)</mark>", page) == ["kept", "gave", "gave"]
    assert "33% marked" in page and "seed 3" in page
    assert "<td>8d2a-7</td><td>–</td><td>–</td><td>0.0123</td>" in page and "the &lt;last&gt; cup" in page
    assert "<td>4</td><td>0.4</td><td>–</td>" in page and "hazard_ratio</th>" not in page


@settings(max_examples=25)
@given(st.text(alphabet=st.sampled_from("<>&\"'/ab="), min_size=1))
def test_everything_is_escaped(text: str) -> None:
    evil = f"</style></script><b onload={text}>"
    summary = {"title": evil, "verdict": evil, "verdict_reason": evil, evil: {evil: [evil]}, "recovery": evil,
               "recovery_low": evil, "arms": {evil: {"act_rate": 0.5, "n": evil}, "L4": {"D": evil}}}
    page = report_html(summary, [Example(evil, 1, {evil: evil, "L4": text})], [{evil: evil, "id": evil, "c": [evil]}], CURVE)
    read = Page(page)
    assert "<b onload" not in page and "onload" not in {name for name, _ in read.attributes}
    assert read.tags.count("style") == 1


@pytest.mark.parametrize("missing", ["verdict", "verdict_reason"])
def test_no_report_without_a_verdict(missing: str) -> None:
    with pytest.raises(SpecError, match=f"no '{missing}'"):
        report_html({name: value for name, value in SUMMARY.items() if name != missing})


def test_a_chart_stands_where_its_figures_are() -> None:
    """x from 44 to 328 over 0 … 4; y from 170 to 12 over 0 … 1.05."""
    drawn = line_chart([Point(4, 1.0), Point(0, 0.0), Point(2, 0.5, 0.25, 0.75)], "dose", "effect", limit=0.5)
    assert 'points="44.0,170.0 186.0,94.8 328.0,19.5"' in drawn and 'y1="94.8" y2="94.8"/><polyline' in drawn
    assert "2: 0.5 [0.25, 0.75]" in drawn and "polygon" not in drawn
    bars = interval_chart([Bar("a", 1.0, 0.0, 2.0), Bar("b", 0.0), Bar("c", float("nan"))], "acts")
    assert re.findall(r'class="own" x1="([\d.]+)" x2="([\d.]+)"', bars) == [("84.0", "316.4")] and ">c<" not in bars
    assert line_chart([Point(1, 1.0)], "x", "y") == "" and interval_chart([Bar("a", float("inf"))], "x") == ""


@given(st.lists(st.builds(Point, *[st.floats(-1e6, 1e6)] * 2), min_size=1, max_size=8))
def test_dots_stay_inside_the_chart(points: list[Point]) -> None:
    drawn = line_chart(points, "x", "y")
    Page(drawn)
    for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', drawn):
        assert 0 <= float(x) <= WIDTH and 0 <= float(y) <= HEIGHT
