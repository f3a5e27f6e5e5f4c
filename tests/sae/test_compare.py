"""Side by side: overlap by hand and against chance, the table's figures, and a page that loads nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor

from sae.comparing import Entry, compare, expand, overlap, recorded, short_names, unit_directions
from sae.comparison_page import cell, comparison_page, comparison_svg
from sae.dictionary import LinearDictionary, Provenance, TopK
from sae.normed import NormedDictionary
from undertow.core.errors import ArtifactError, DictionaryError


def random_rows(n: int, d: int, seed: int) -> Tensor:
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return rows / rows.norm(dim=1, keepdim=True)


def made(rows: Tensor, rescale: bool = False) -> LinearDictionary:
    return LinearDictionary(rows.T.contiguous(), torch.zeros(len(rows)), rows, torch.zeros(rows.shape[1]), TopK(2, rescale),
                            Provenance("llama", "blocks.1.hook_resid_post", 32, True))


def test_overlap_by_hand() -> None:
    a = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    b = torch.tensor([[0.6, 0.8], [-1.0, 0.0]])
    got = overlap(a, b)
    assert got.cosine == pytest.approx((0.6 + 0.8) / 2)
    assert got.matched == 0.5  # 0.8 is above 0.7, 0.6 is not
    assert overlap(b, a).cosine == pytest.approx((0.8 + 0.0) / 2)  # not symmetric; opposite is not the same


def test_overlap_knows_itself_a_subset_and_chance() -> None:
    rows = random_rows(2000, 24, 0)
    itself, subset = overlap(rows, rows.flip(0)), overlap(rows[:500], rows)
    assert itself.cosine == pytest.approx(1, abs=1e-5) and subset.matched == 1
    stranger = overlap(rows, random_rows(2000, 24, 1))
    assert stranger.cosine == pytest.approx(stranger.chance, abs=0.01)  # negative control
    assert stranger.cosine < 0.9


def test_directions_do_not_depend_on_how_the_decoder_is_scaled() -> None:
    rows = random_rows(20, 6, 0)
    plain = unit_directions(made(rows))
    for other in (made(5 * rows), made(5 * rows, rescale=True), NormedDictionary(made(3 * rows), "layer_norm")):
        torch.testing.assert_close(unit_directions(other), plain)


FIGURES = {"fvu": 0.25, "l0": 12.0, "dead_share": 0.125, "ce_recovered": 0.9, "tokens": 100}


def entries() -> list[Entry]:
    other = {**FIGURES, "fvu": 0.2, "l0": 20.0}
    del other["ce_recovered"]  # an ablation that costs nothing recovers nothing
    return [Entry("one", made(random_rows(20, 6, 0)), FIGURES), Entry("<two & three>", made(random_rows(30, 6, 1)), other),
            Entry("narrow", made(random_rows(9, 4, 2)), FIGURES)]


def test_the_comparison() -> None:
    found = compare(entries())
    assert [line["width"] for line in found["saes"]] == [20, 30, 9]
    assert found["saes"][0] == {"name": "one", "architecture": "topk", "site": "blocks.1.hook_resid_post", "width": 20,
                                **FIGURES}
    assert "ce_recovered" not in found["saes"][1]
    for i in range(3):
        assert found["overlap"][i][i]["cosine"] == pytest.approx(1, abs=1e-5)
    assert found["overlap"][0][2] is None and found["overlap"][2][1] is None
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_page_is_whole_and_loads_nothing() -> None:
    found = compare(entries())
    page = comparison_page(found)
    assert "&lt;two &amp; three&gt;" in page and "<two" not in page
    assert page.count("<svg") == 1
    body = page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace("http://creativecommons.org", "")
    for foreign in ("http://", "https://", "<script", "<link", "@import", "src="):
        assert foreign not in body.replace("https://matplotlib.org/", "")
    svg = ElementTree.fromstring(comparison_svg(found))
    texts = {"".join(node.itertext()).strip() for node in svg.iter() if node.tag.endswith("text")}
    assert {"one", "<two & three>", "narrow", "FVU (lower is better)", "CE recovered (higher is better)"} <= texts
    assert comparison_svg(found) == comparison_svg(found)


def test_cells() -> None:
    line = {"fvu": 0.123, "l0": 31.96, "dead_share": 0.0125, "width": 16384, "site": ""}
    assert [cell(name, line) for name in ("fvu", "l0", "dead_share", "width", "site", "ce_recovered")] == [
        "0.1230", "32.0", "1.25%", "16,384", "–", "–"]


def test_names() -> None:
    assert short_names(["runs/a", "runs/b/"]) == ["a", "b"]
    assert short_names(["x/12", "y/12"]) == ["x/12", "y/12"]
    assert short_names(["x/12", "x/12"]) == ["x/12 (1)", "x/12 (2)"]


def test_a_grid_stands_for_its_runs(tmp_path: Path) -> None:
    (tmp_path / "grid").mkdir()
    (tmp_path / "grid" / "grid.json").write_text("{}")
    with pytest.raises(ArtifactError, match="is not finished") as caught:
        expand(["smollm2/12", str(tmp_path / "grid")])
    assert "undertow sae resume" in caught.value.hint
    index: dict[str, Any] = {"runs": [{"name": "w64-k4-s0"}, {"name": "w64-k8-s0"}]}
    (tmp_path / "grid" / "index.json").write_text(json.dumps(index))
    assert expand(["smollm2/12", str(tmp_path / "grid")]) == [
        "smollm2/12", str(tmp_path / "grid" / "w64-k4-s0"), str(tmp_path / "grid" / "w64-k8-s0")]


def test_recorded_figures(tmp_path: Path) -> None:
    assert recorded("smollm2/12")["fvu"] <= 0.22
    with pytest.raises(DictionaryError, match="no figures of its own"):
        recorded(str(tmp_path))
