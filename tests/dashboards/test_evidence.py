"""What searches found, beside the store's columns: read from real artifacts, filtered, sorted, shown and exported as it is."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from starlette.testclient import TestClient

from dashboards.evidence import EvidenceShelf, read_evidence
from dashboards.guard import Access
from dashboards.notes import Marks
from dashboards.server import create_app
from dashboards.table import Query, select
from features.contrast import FeatureTable, Origin
from features.selection import FeatureSet, Rule, Step
from tests.cli.answers import runner
from tests.dashboards.conftest import D_SAE, HOST, SITE, Made, dashboard_of
from tests.dashboards.test_runs import write_run
from undertow.core.errors import ArtifactError, SpecError

S = "/s/toy-1"
NOTHING = Marks({}, frozenset())
EVIDENCE = {7: {"effect": 2.0, "p": 0.001, "effect_on_d": 0.5, "act_writer_share": 0.1, "logit_p": 0.4, "contexts_p": 0.2},
            9: {"effect": -1.0, "p": 0.002, "effect_on_d": 0.9, "act_writer_share": 0.8, "logit_p": 0.01, "contexts_p": 0.6},
            3: {"effect_on_d": 0.1}}


def write_searches(made: Made, folder: Path, sae: str = "") -> None:
    """A scan and a selection of the same pairs."""
    origin = Origin(sae or made.store.dictionary, made.subject.digest, SITE, "pairs", 40, 20, 1)
    ramp = np.arange(D_SAE, dtype=np.float32)
    table = FeatureTable(origin, ramp, ramp, ramp / D_SAE, ramp / D_SAE, ramp / 10, ramp, (ramp.astype(float) + 1) / 100)
    table.save(folder / "scan", {"concept": "care"})
    chosen = FeatureSet(origin, "care", Rule(), (Step(9, 0.9), Step(7, 1.2)), {9: 1.0, 7: 2.0}, {9: 0.0, 7: 0.0}, (), 0.2,
                        EVIDENCE, {})
    chosen.save(folder / "set")


@pytest.fixture
def folder(made: Made, tmp_path: Path) -> Path:
    write_searches(made, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def client(made: Made, folder: Path, tmp_path: Path) -> Iterator[TestClient]:
    dashboard = replace(dashboard_of(made, tmp_path / "notes.sqlite"), evidence=EvidenceShelf(folder))
    with TestClient(create_app(dashboard, Access(frozenset({HOST}))), base_url=f"http://{HOST}") as made_client:
        yield made_client


def found(made: Made, folder: Path, **words: str) -> list[int]:
    query = Query.read(words)
    evidence = EvidenceShelf(folder).of(made.store).named(query.sought.evidence)
    return select(made.store, NOTHING, query, evidence).window(0, D_SAE).tolist()


def test_the_set_comes_first_and_stands_on_the_scan(made: Made, folder: Path) -> None:
    findings = EvidenceShelf(folder).of(made.store)
    assert (list(findings.found), findings.trouble) == (["set", "scan"], ())
    first = findings.found["set"]
    assert first.chosen == (9, 7) and (first.rank(9), first.rank(7), first.rank(3)) == (1, 2, None)
    assert first.of(7)["effect"] == 2.0 and first.of(7)["naming_p"] == 0.2, "its own figures are kept"
    assert first.of(30)["effect"] == 3.0, "what it did not measure comes from the scan of the same pairs"
    assert "effect_on_d" not in first.of(30) and "logit_p" not in first.of(3), "what was not taken is absent"
    assert findings.found["scan"].of(7)["effect"] == pytest.approx(0.7)


@pytest.mark.parametrize(("words", "expected"), [
    ({"chosen": "yes"}, [7, 9]), ({"d_from": "0.4"}, [7, 9]), ({"writer_to": "0.5"}, [7]), ({"naming_from": "0.05"}, [7]),
    ({"effect_to": "0"}, [0, 9]), ({"p_to": "0.0015"}, [7]), ({"evidence": "scan", "p_to": "0.03"}, [0, 1, 2]),
    ({"sort": "chosen", "chosen": "yes"}, [9, 7]), ({"evidence": "scan", "chosen": "yes"}, []),
    ({"evidence": "scan", "d_from": "-9"}, []),
])
def test_filters(made: Made, folder: Path, words: dict[str, str], expected: list[int]) -> None:
    assert found(made, folder, **words) == expected


def test_what_was_not_measured_sorts_last_either_way(made: Made, folder: Path) -> None:
    rest = [i for i in range(D_SAE) if i not in (3, 7, 9)]
    assert found(made, folder, sort="effect_on_d") == [3, 7, 9, *rest]
    assert found(made, folder, sort="effect_on_d", order="down") == [9, 7, 3, *rest]


def test_the_demo_is_evidence_too_and_another_sae_is_none(made: Made, tmp_path: Path) -> None:
    write_run(made, tmp_path / "demo")
    demo = EvidenceShelf(tmp_path).of(made.store).found["demo"]
    assert (demo.chosen, demo.concept, demo.of(7)) == ((7,), "care", {"attribution": 1.25, "rank": 1.0})
    write_searches(made, tmp_path / "foreign", sae="0" * 16)
    assert list(EvidenceShelf(tmp_path).of(made.store).found) == ["demo"]
    with pytest.raises(ArtifactError, match="another SAE"):
        read_evidence(tmp_path / "foreign" / "set", made.store)
    with pytest.raises(ArtifactError, match="holds no evidence"):
        read_evidence(made.folder / "store", made.store)


def test_damage_is_said_and_new_searches_appear(made: Made, folder: Path) -> None:
    shelf = EvidenceShelf(folder)
    assert len(shelf.of(made.store).found) == 2
    write_searches(made, folder / "more")
    assert list(shelf.of(made.store).found) == ["set", "set-2", "scan", "scan-2"]
    (folder / "more" / "set" / "features.json").write_text("{}")
    fresh = EvidenceShelf(folder).of(made.store)
    assert len(fresh.trouble) == 1 and "set" in fresh.trouble[0] and len(fresh.found) == 3
    with pytest.raises(SpecError, match="evidence = 'x'"):
        fresh.named("x")


def test_pages_and_files(client: TestClient) -> None:
    page = client.get(f"{S}/features?sort=effect_on_d&order=down&chosen=yes").text
    assert "set: features select, care" in page and 'aria-sort="descending"' in page and ">0.9<" in page.replace("\n", "")
    assert "✗" in page, "feature 9 fails a naming screen"
    for words in ("evidence=x", "p_to=2", "effect_from=nan"):
        assert client.get(f"{S}/features?{words}").status_code == 400
    feature = client.get(f"{S}/f/9?sort=chosen&chosen=yes").text
    assert "selected, 1 of 2" in feature and "exact effect on D" in feature and "fails" in feature and "1 of 2</a>" in feature
    assert "No search here" not in feature
    assert [one["key"] for one in client.get(f"{S}/f/9.json").json()["findings"]] == ["set", "scan"]
    rows = list(csv.DictReader(io.StringIO(client.get(f"{S}/export/features.csv?sort=chosen").text)))
    assert [(row["feature"], row["chosen"], row["effect_on_d"]) for row in rows[:3]] == [
        ("9", "1", "0.9"), ("7", "2", "0.5"), ("0", "", "")]


def test_without_a_search_the_page_says_what_to_type(made: Made, tmp_path: Path) -> None:
    app = create_app(dashboard_of(made, tmp_path / "n.sqlite"), Access(frozenset({HOST})))
    with TestClient(app, base_url=f"http://{HOST}") as client:
        assert "undertow features select" in client.get(f"{S}/features").text
        assert "undertow features select" in client.get(f"{S}/f/7").text


def test_the_command_prints_the_same(made: Made, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("UNDERTOW_DATA", str(tmp_path / "data"))
    run = runner(capsys, "dashboard")
    words = ["--evidence", folder / "set", "--sort", "chosen", "--chosen", "yes"]
    answer = run("list", made.folder / "store", *words, "--json")
    assert answer.code == 0, answer.err
    assert [(row["feature"], row["chosen"]) for row in answer.json["rows"]] == [(9, 1), (7, 2)]
    assert answer.json["rows"][0]["evidence"]["effect_on_d"] == 0.9
    shown = run("list", made.folder / "store", *words)
    assert shown.code == 0 and "selected" in shown.out and "naming_p" in shown.out
