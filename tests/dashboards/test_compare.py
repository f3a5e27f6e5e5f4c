"""SAEs side by side: figures as the cards have them, the right one called better, overlaps by brute force, what is refused."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

import dashboards.saes as saes_module
from dashboards.compare_page import Cell, compare_page
from dashboards.finding import Collection
from dashboards.guard import Access
from dashboards.saes import MOST, SaeShelf
from dashboards.server import create_app
from sae.dictionary import LinearDictionary, TopK
from sae.formats import save_folder
from tests.cli.answers import runner
from tests.dashboards.conftest import D_SAE, HOST, SCRIPT, Made, dashboard_of

CARD = {"fvu": 0.2, "l0": 4.0, "ce_recovered": 0.9, "ce_base": 1.0, "dead_share": 0.0, "kl_recon": 0.1, "tokens": 500,
        "density_histogram": {"1e-1..1e0": 6, "1e-2..1e-1": 3, "dead": 0}}
OTHER = {**CARD, "fvu": 0.25, "l0": 8.0, "ce_recovered": 0.95, "dead_share": 0.1,
         "density_histogram": {"1e-1..1e0": 2, "1e-2..1e-1": 0, "dead": 1}}
WIDTH = 20


def write_sae(made: Made, folder: Path, card: dict[str, Any] | None = None, seed: int = 1) -> None:
    """An SAE beside the store's, of fewer latents, with a card."""
    d_in = made.dictionary.d_in
    rows = torch.nn.functional.normalize(torch.randn(WIDTH, d_in, generator=torch.Generator().manual_seed(seed)))
    save_folder(LinearDictionary(rows.T.contiguous(), torch.zeros(WIDTH), rows, torch.zeros(d_in), TopK(8),
                                 made.dictionary.provenance), folder)
    if card is not None:
        (folder / "evaluation.json").write_text(json.dumps(card), encoding="utf-8")


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    write_sae(made, tmp_path / "runs" / "k4", CARD)
    write_sae(made, tmp_path / "runs" / "k8", OTHER, seed=2)
    write_sae(made, tmp_path / "runs" / "deeper" / "k8")
    return tmp_path / "runs"


@pytest.fixture
def client(made: Made, folder: Path, tmp_path: Path) -> Iterator[TestClient]:
    dashboard = dashboard_of(made, tmp_path / "notes.sqlite", runs=folder)
    with TestClient(create_app(dashboard, Access(frozenset({HOST}))), base_url=f"http://{HOST}") as made_client:
        yield made_client


def test_every_sae_has_a_name_and_a_store_lends_its_own(made: Made, folder: Path) -> None:
    found = SaeShelf(folder).all({"toy-1": made.store})
    assert {key: Path(sae.source).relative_to(folder).as_posix() for key, sae in found.items() if not sae.store} == {
        "k4": "k4", "k8-2": "k8", "k8": "deeper/k8"}
    assert next(iter(found)) == "toy-1" and found["toy-1"].shape == (D_SAE, made.dictionary.d_in)
    assert found["k4"].figures["fvu"] == 0.2 and found["k8"].figures == {}
    twice = SaeShelf(made.folder).all({"a": made.store, "b": made.store})
    assert list(twice) == ["a"], "two stores of one SAE, and its folder, are one"


def test_better_and_worse(made: Made, folder: Path) -> None:
    """FVU and dead: lower is better; CE recovered: higher; L0 and the untouched subject: neither."""
    found = SaeShelf(folder).all({})
    page = compare_page([found["k4"], found["k8-2"]], None)
    lines = {line.title: line.cells for line in page.figures}
    assert lines["FVU"] == (Cell("0.2", "first"), Cell("0.25", "worse", "+0.05"))
    assert lines["CE recovered"][1] == Cell("0.95", "better", "+0.05")
    assert (lines["Dead"][1].cue, lines["L0"][1].cue, lines["CE, untouched"][1].cue) == ("worse", "more", "same")
    turned = {line.title: line.cells for line in compare_page([found["k8-2"], found["k4"]], None).figures}
    assert (turned["FVU"][1].cue, turned["CE recovered"][1].cue, turned["L0"][1].cue) == ("better", "worse", "less")
    assert "CE, reconstructed" not in lines, "what no card has is absent"
    facts = {line.title: [cell.cue for cell in line.cells] for line in page.facts}
    assert facts["Width"] == ["first", "same"] and facts["Opened by"] == ["first", "differs"]
    assert page.densities == (("1e-1..1e0", ((6, 100.0), (2, 33.3))), ("1e-2..1e-1", ((3, 50.0), (0, 0.0))),
                              ("dead", ((0, 0.0), (1, 16.7))))


def test_plots_hold_every_sae_that_has_the_figures(made: Made, folder: Path) -> None:
    found = SaeShelf(folder).all({})
    plots = compare_page([found["k8-2"], found["k8"], found["k4"]], None).plots
    assert [[(mark.letter, mark.x, mark.y) for mark in plot.marks] for plot in plots] == [
        [("A", 8.0, 0.25), ("C", 4.0, 0.2)], [("A", 8.0, 0.95), ("C", 4.0, 0.9)]]
    high, low = plots[0].marks
    assert high.left > low.left and high.top < low.top, "a larger figure stands higher"
    assert compare_page([found["k8"], found["k4"]], None).plots == ()


def test_what_hardly_differs_does_not_fill_the_axis(made: Made, folder: Path) -> None:
    """Two figures that read the same stand at almost one height, with one tick; control: a large difference fills it."""
    write_sae(made, folder / "near", {**CARD, "ce_recovered": 0.9001, "l0": 4.0})
    found = SaeShelf(folder).all({})
    fvu, recovered = compare_page([found["k4"], found["near"]], None).plots
    assert abs(recovered.marks[0].top - recovered.marks[1].top) < 1 and [tick.text for tick in recovered.up] == ["0.9"]
    assert fvu.marks[0][3:] == fvu.marks[1][3:] and [tick.text for tick in fvu.across] == ["4"]
    wide = compare_page([found["k4"], found["k8-2"]], None).plots[0]
    assert abs(wide.marks[0].top - wide.marks[1].top) == pytest.approx(76)


def test_overlap_by_brute_force(made: Made, folder: Path) -> None:
    shelf = SaeShelf(folder)
    found = shelf.all({"toy-1": made.store})
    table = shelf.overlap([found["toy-1"], found["k4"]])
    a = made.dictionary.W_dec
    b = torch.nn.functional.normalize(torch.randn(WIDTH, made.dictionary.d_in, generator=torch.Generator().manual_seed(1)))
    best = [max(float(x @ y / x.norm() / y.norm()) for y in b) for x in a]
    assert table[0][1]["cosine"] == pytest.approx(sum(best) / len(best), abs=1e-5)
    assert table[0][1]["matched"] == pytest.approx(sum(cosine >= 0.7 for cosine in best) / len(best))
    assert table[0][0]["cosine"] == pytest.approx(1, abs=1e-5) and table[1][0] != table[0][1]
    assert shelf.overlap([found["toy-1"], found["k4"]]) is table, "once"


def test_an_overlap_that_cannot_be(made: Made, folder: Path, client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too wide for a page; the store's SAE has changed; the weights have gone."""
    changed = folder / "changed"
    write_sae(made, changed)
    record = {**made.store.record, "spec": {**made.store.record["spec"], "sae": str(changed)}}
    shelf = SaeShelf(folder)
    found = shelf.all({"toy-1": replace(made.store, record=record)})
    with pytest.raises(saes_module.DictionaryError, match="is now"):
        shelf.overlap([found["toy-1"], found["k4"]])
    assert "Measure the overlap" in client.get("/compare?s=k4&s=k8").text
    monkeypatch.setattr(saes_module, "MOST_FLOP", 1.0)
    monkeypatch.setattr("dashboards.compare_page.MOST_FLOP", 1.0)
    refused = client.get("/compare?s=k4&s=k8&overlap=yes")
    assert refused.status_code == 404 and "many minutes" in refused.text
    assert "Measure the overlap" not in client.get("/compare?s=k4&s=k8").text


def test_the_page(client: TestClient) -> None:
    page = client.get("/compare?s=k4&s=k8-2").text
    assert "▼ worse" in page and "▲ better" in page and "≠ differs" in page, "words beside the colours"
    assert page.count("<svg viewBox") == 2 and page.count("As a table") == 2
    assert "--recorded" in page and "judges all" not in page, "one text: no warning"
    whole = client.get("/compare?s=toy-1&s=k4&overlap=yes").text
    assert "matched" in whole and 'href="/s/toy-1/features" data-row' in whole
    assert "No figures of its own" in whole and "--recorded" not in whole
    assert "compare with this one" in page and "/compare?s=k8-2&amp;s=k4" in page


def test_too_few_too_many_and_unknown(client: TestClient, made: Made, tmp_path: Path) -> None:
    assert client.get("/compare").text.count('type="checkbox"') == 4
    one = client.get("/compare?s=k4&s=k4&s=")
    assert one.status_code == 200 and "Only k4 is chosen" in one.text and one.text.count(" checked") == 1
    for key in ("nothing", "..", "../k4", "/etc/passwd", "%2e%2e%2fk4"):
        refused = client.get(f"/compare?s={key}&s=k4")
        assert refused.status_code == 404 and "those here: toy-1" in refused.text
    words = "&".join(f"s={key}" for key in ("toy-1", "k4", "k8", "k8-2"))
    assert client.get(f"/compare?{words}").status_code == 200 and len("ABCDEFGH") == MOST
    empty = replace(dashboard_of(made, tmp_path / "n.sqlite"), collection=Collection({}), saes=SaeShelf(tmp_path / "none"))
    with TestClient(create_app(empty, Access(frozenset({HOST}))), base_url=f"http://{HOST}") as nothing:
        assert "undertow sae train" in nothing.get("/compare").text


def test_more_than_fit_are_refused(client: TestClient, made: Made, folder: Path) -> None:
    for number in range(MOST):
        write_sae(made, folder / f"more-{number}", CARD)
    words = "&".join(f"s=more-{number}" for number in range(MOST))
    assert client.get(f"/compare?{words}").status_code == 200
    assert client.get(f"/compare?{words}&s=k4").status_code == 400


def test_hostile_and_damaged_folders(made: Made, folder: Path, client: TestClient) -> None:
    """A script in a name or in a setting is text; a card that is none is no card; NaN is no figure."""
    hostile = folder / "<script>x"
    write_sae(made, hostile, {**CARD, "fvu": float("nan"), "l0": "many", "density_histogram": [1]})
    cfg = json.loads((hostile / "cfg.json").read_text())
    cfg["metadata"]["model_name"] = cfg["metadata"]["undertow"]["text"]["source"] = SCRIPT
    (hostile / "cfg.json").write_text(json.dumps(cfg))
    write_sae(made, folder / "torn")
    (folder / "torn" / "evaluation.json").write_text("{")
    (folder / "torn" / "cfg.json").write_text("[]")
    page = client.get("/compare?s=script-x&s=torn&s=k4")
    assert page.status_code == 200 and "<script>x" not in page.text and SCRIPT not in page.text
    assert "&lt;script&gt;" in page.text and "different subjects" in page.text and "the texts differ" in page.text
    assert "▲ better" not in page.text and "▼ worse" not in page.text, "nothing is judged across subjects and texts"
    assert client.get("/compare?s=k4&s=torn&overlap=yes").status_code == 404


def test_the_command_prints_the_same(client: TestClient, capsys: pytest.CaptureFixture[str]) -> None:
    page = client.get("/compare?s=k4&s=k8-2&overlap=yes").text
    command = unescape(re.search(r"<code>(undertow sae compare [^<]*--recorded)</code>", page)[1])  # type: ignore[index]
    answer = runner(capsys, *shlex.split(command)[1:3])(*shlex.split(command)[3:], "--json")
    assert answer.code == 0, answer.err
    assert [line["fvu"] for line in answer.json["saes"]] == [0.2, 0.25]
    assert f"{answer.json['overlap'][0][1]['cosine']:.3g}" in page
