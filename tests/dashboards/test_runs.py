"""Runs and verdicts: what a finished run wrote is shown as it is; damage, absence and hostile text are handled."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from dashboards.answering import Dashboard
from dashboards.guard import Access
from dashboards.runs import RunShelf, run_page
from dashboards.server import create_app
from interventions.recipe import Recipe
from interventions.tune import Trial
from interventions.verdict import ROWS, Verdict
from tests.dashboards.conftest import HOST, SCRIPT, SITE, Made, dashboard_of
from undertow.core.storage import create_artifact, write_json
from undertow.studies.demo import Outcome
from undertow.studies.running import KIND, write
from undertow.studies.stories import Example

ARMS: dict[str, Any] = {
    "L4": {"n": 400, "act_rate": 0.7, "act_rate_low": 0.66, "act_rate_high": 0.75, "D": 1.5, "kl_mean": 0.004, "guard_hits": 0},
    "stranger": {"n": 400, "act_rate": 0.1, "act_rate_low": 0.08, "act_rate_high": 0.14, "D": -2.5, "guard_hits": 0},
    "random": {"n": 40}}
TRIALS = [Trial(latents=(3,), trigger=(), dose=0.3, kl_mean=0.002, kl_p99=0.03, d=-1.0),
          Trial(latents=(3, 7), trigger=(12,), dose=0.25, kl_mean=0.001, kl_p99=0.02, d=0.5),
          Trial(latents=(3, 7), trigger=(12,), dose=0.5, kl_mean=0.004, kl_p99=0.05, d=1.25)]


def write_run(made: Made, out: Path, **summary: Any) -> None:
    """A run as `undertow demo` writes it."""
    edits = [{"latent": 7, "operator": {"kind": "floor", "value": 1.5}}]
    recipe = Recipe.checked({"name": "L4", "subject": made.subject.digest, "sae": made.store.dictionary, "site": SITE,
                             "edits": edits}, "test")
    judged = Verdict("said", "KL mean 0.5 is above 0.01", 4)
    figures = {"arms": ARMS, "recovery": 0.8, "recovery_low": 0.7, "recovery_high": 0.9, "hazard_ratio": 1.04,
               "hazard_ratio_upper": 1.12, "competence": {"met": True, "p": 0.0001}}
    examples = [Example("The keeper", 3, {"stranger": " kept it.", "L4": " gave it.", "bonded": " gave it."})]
    features = [{"id": "8d2a-7", "latent": 7, "attribution": 1.25, "rank": 1}]
    outcome = Outcome(figures, judged, recipe, examples, features, TRIALS)
    whole = {"title": "Feature surgery on hearth", "verdict": judged.verdict, "verdict_reason": judged.reason,
             "verdict_row": judged.row, **figures, "features": features, "model": "hearth", "concept": "care", "seed": 11,
             "sae": {"path": "runs/demo-sae"}, **summary}
    write(outcome, whole, out)


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    write_run(made, tmp_path / "runs" / "demo")
    return tmp_path / "runs"


@pytest.fixture
def dashboard(made: Made, folder: Path, tmp_path: Path) -> Dashboard:
    return dashboard_of(made, tmp_path / "notes.sqlite", runs=folder)


@pytest.fixture
def client(dashboard: Dashboard) -> Iterator[TestClient]:
    with TestClient(create_app(dashboard, Access(frozenset({HOST}))), base_url=f"http://{HOST}") as made_client:
        yield made_client


def test_the_list(client: TestClient, made: Made, folder: Path) -> None:
    page = client.get("/runs").text
    assert 'href="/runs/demo"' in page and "KL mean 0.5 is above 0.01" in page and "0.8" in page and "1.12" in page
    write_run(made, folder / "more" / "demo")
    assert 'href="/runs/demo-2"' in client.get("/runs").text, "a new run appears by itself"


def test_the_verdict_page(client: TestClient, made: Made) -> None:
    page = client.get("/runs/demo").text
    decided = re.findall(r'<li class="decided"[^>]*>(.*?) → <b>(.*?)</b>', page)
    assert decided == [(ROWS[3][0], "said")] and page.count("</li>") == len(ROWS)
    arms = re.findall(r'<tr(?: class="own")?><th scope="row">([^<]*)</th>((?:<td class="number">[^<]*</td>)+)</tr>', page)
    cells = {arm: re.findall(r">([^<]*)</td>", row) for arm, row in arms}
    assert list(cells)[:3] == ["stranger", "L4", "random"], "the untouched subject first, though files keep no order"
    assert cells["L4"] == ["400", "0.7 [0.66, 0.75]", "1.5", "0.004", "0"] and cells["random"] == ["40", "–", "–", "–", "–"]
    columns = re.findall(r"<h3>(\w+) <span[^>]*>([^<]*)</span></h3><p[^>]*>(.*?)</p>", page)
    assert [arm for arm, _, _ in columns] == ["stranger", "bonded", "L4"]
    assert '<mark class="changed">kept</mark>' in columns[0][2] and '<mark class="changed">gave</mark>' in columns[2][2]
    assert page.count("<svg") == 4 and "competence.met" in page and '<a href="/s/toy-1/f/7">8d2a-7</a>' in page
    for trial in TRIALS:
        assert f'<td class="number">{trial.kl_p99:g}</td>' in page, "the table behind the plot"
    assert '<a href="/s/toy-1/f/3">3</a>, <a href="/s/toy-1/f/7">7</a>' in page
    assert "where these fire" in page and "<td>12</td>" in page and "<td>everywhere</td>" in page
    assert 'style="' not in page and "<style" not in page


def test_it_opens_on_the_operating_table(client: TestClient, made: Made) -> None:
    link = re.search(r'href="(/s/toy-1/surgery\?load=run.demo[^"]*)"', client.get("/runs/demo").text)[1]  # type: ignore[index]
    page = client.get(link.replace("&amp;", "&"))
    assert page.status_code == 200 and "feature 7 is raised to 1.5 where it is lower" in page.text
    assert ">\nThe keeper</textarea>" in page.text and 'value="3"' in page.text
    assert '<option value="run.demo">' in page.text


def test_files_to_keep(client: TestClient, folder: Path) -> None:
    report = client.get("/runs/demo/report.html")
    assert report.content == (folder / "demo" / "report.html").read_bytes()
    assert report.headers["content-disposition"] == 'attachment; filename="demo-report.html"', "never shown as a page of ours"
    assert client.get("/runs/demo/summary.json").json()["seed"] == 11


@pytest.mark.parametrize("path", ["/runs/nothing", "/runs/../demo", "/runs/..%2Fdemo", "/runs/demo/manifest.json",
                                  "/runs/demo/..%2Fx", "/runs/DEMO"])
def test_a_name_is_never_a_path(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_nothing_there_says_what_to_type(made: Made, tmp_path: Path) -> None:
    for runs in (None, tmp_path / "empty", tmp_path / "nowhere"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        app = create_app(dashboard_of(made, tmp_path / "n", runs=runs), Access(frozenset({HOST})))
        with TestClient(app, base_url=f"http://{HOST}") as client:
            assert "undertow demo --out runs/demo" in client.get("/runs").text


def test_a_run_of_another_sae_says_what_to_build(client: TestClient, dashboard: Dashboard, made: Made) -> None:
    other = dataclasses.replace(made.store, record={**made.store.record, "dictionary": "0" * 16})
    there = dataclasses.replace(dashboard, collection=dashboard.collection._replace(stores={"other": other}))
    with TestClient(create_app(there, Access(frozenset({HOST}))), base_url=f"http://{HOST}") as elsewhere:
        page = elsewhere.get("/runs/demo").text
        assert "undertow dashboard build runs/demo-sae --out runs/demo-sae-dashboard" in page and "/f/7" not in page
        assert "run.demo" not in elsewhere.get("/s/other/surgery").text
        assert elsewhere.get("/s/other/surgery?load=run.demo").status_code == 404


def test_damage_is_reported(client: TestClient, made: Made, folder: Path) -> None:
    write_run(made, folder / "torn")
    (folder / "torn" / "summary.json").write_text("{}")
    page = client.get("/runs").text
    assert "Not opened." in page and "has changed since it was written" in page and 'href="/runs/demo"' in page
    for name, files in (("a", {"summary.json": []}), ("d", {"summary.json": {}}),
                        ("b", {"summary.json": {"arms": 5}, "stories.json": [], "trials.json": []}),
                        ("c", {"summary.json": {}, "stories.json": [{}], "trials.json": []})):
        with create_artifact(folder / name, KIND, {}) as work:
            for file, content in files.items():
                write_json(work / file, content)
    assert client.get("/runs").status_code == 200
    found = RunShelf(folder).list().found
    assert set(found) == {"demo", "b", "c", "d"}
    for name in "bcd":
        assert client.get(f"/runs/{name}").status_code == 409
    assert run_page(found["demo"]).decided == 4


def test_everything_is_escaped(client: TestClient, made: Made, folder: Path) -> None:
    names = dict.fromkeys(("title", "verdict", "verdict_reason", "seed", "recovery", SCRIPT), SCRIPT)
    write_run(made, folder / "evil", **names, arms={SCRIPT: {"D": 1.0, "n": SCRIPT}},
              features=[{"id": SCRIPT, "latent": SCRIPT, SCRIPT: [SCRIPT]}])
    for path in ("/runs", "/runs/evil"):
        page = client.get(path)
        assert page.status_code == 200 and SCRIPT not in page.text and "&lt;script&gt;" in page.text
        assert json.dumps(page.text).count("<script") == 2
