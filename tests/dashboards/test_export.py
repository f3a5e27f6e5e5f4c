"""Files that leave the dashboard: the table, one HTML page, Neuronpedia's upload; and the commands that a page shows."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pyarrow.parquet
import pytest
from starlette.testclient import TestClient

from dashboards.answering import Dashboard
from dashboards.export import (
    MOST_PAGES,
    NEURONPEDIA_BATCH,
    html_page,
    known_latents,
    neuronpedia,
    neuronpedia_vectors,
    source_id,
)
from dashboards.guard import HEADER
from dashboards.notes import Marks
from tests.cli.answers import Run, runner
from tests.dashboards.conftest import D_SAE, DEAD, HOST, SCRIPT, Made
from undertow.cli.main import main
from undertow.core.errors import DictionaryError, SpecError

S = "/s/toy-1"
NOTHING = Marks({}, frozenset())


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "dashboard")


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("UNDERTOW_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def test_the_table_as_csv_and_parquet(client: TestClient, dashboard: Dashboard, made: Made) -> None:
    """The filtered set, in the order of the page, with the figures of the store."""
    dashboard.notes.add_label(made.store.dictionary, 3, 'oil, "lamps"\n<b>')
    dashboard.notes.star(made.store.dictionary, 3, True)
    words = {"state": "live", "sort": "density", "order": "down"}
    answer = client.get(f"{S}/export/features.csv", params=words)
    assert answer.headers["content-disposition"] == 'attachment; filename="toy-1-features.csv"'
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    counts = made.store.columns["count"]
    live = [i for i in range(D_SAE) if counts[i]]
    assert [int(row["feature"]) for row in rows] == sorted(live, key=lambda i: (-counts[i], i))
    for row in rows:
        latent = int(row["feature"])
        assert int(row["count"]) == counts[latent]
        for name in ("maximum", "mean", "norm"):
            assert np.float32(row[name]) == made.store.columns[name][latent]
        assert row["peak_token"] == made.store.token(int(made.store.columns["peak_token"][latent]))
    assert {row["feature"]: row["label"] for row in rows if row["label"]} == {"3": 'oil, "lamps" <b>'}
    table = pyarrow.parquet.read_table(io.BytesIO(client.get(f"{S}/export/features.parquet").content))
    assert table.num_rows == D_SAE and table.column("feature").to_pylist() == list(range(D_SAE))
    assert table.column("starred").to_pylist().index(True) == 3
    assert table.column("peak_token").to_pylist()[DEAD] == "" and table.column("density").to_pylist()[DEAD] == 0
    assert table.schema.metadata[b"dictionary"].decode() == made.store.dictionary


class _Page(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [str(value) for name, value in attrs if name in ("src", "href", "action") or name.startswith("on")]


def test_one_html_file(client: TestClient, dashboard: Dashboard, made: Made) -> None:
    dashboard.notes.add_label(made.store.dictionary, 7, SCRIPT)
    dashboard.notes.add_note(made.store.dictionary, 7, SCRIPT)
    answer = client.get(f"{S}/export/features.html", params={"latents": f"7, 9,{DEAD},7"})
    assert answer.headers["content-disposition"].startswith("attachment")
    read = _Page(answer.text)
    assert "script" not in read.tags and "link" not in read.tags and "img" not in read.tags
    assert read.links == ["#f7", "#f9", f"#f{DEAD}"], "it points nowhere but into itself"
    assert "default-src 'none'" in answer.text and SCRIPT not in answer.text and "&lt;script&gt;" in answer.text
    assert ".passages > li" in answer.text, "the sheet is not escaped"
    assert answer.text.count("<article") == 3 and "Never fired on this text" in answer.text
    assert "heed its licence" in answer.text
    assert "<mark class=" in answer.text and answer.text.count("<svg") == 4 and "://" not in answer.text
    by_page = client.get(f"{S}/export/features.html", params={"state": "dead"})
    assert by_page.text.count("<article") == 1, "without numbers: those of the table's page"


def test_neuronpedia(made: Made) -> None:
    """The limits of its upload, and figures of the store; contexts hold the very tokens and their activations."""
    made_upload = neuronpedia(made.store, Marks({7: "lamps"}, frozenset()), range(D_SAE), "undertow-res")
    [batch] = made_upload.batches
    assert made_upload.dead == tuple(i for i in range(D_SAE) if not made.store.columns["count"][i]) and DEAD in made_upload.dead
    assert re.fullmatch(r"[a-zA-Z0-9_-]+", batch["modelId"]) and batch["source"] == "1-undertow-res"
    assert len(batch["features"]) == D_SAE - len(made_upload.dead)
    for feature in batch["features"]:
        assert 0 <= feature["density"] <= 1 and feature["activations"]
        assert len(feature["topLogits"]) <= 20 and len(feature["bottomLogits"]) <= 20
        for context in feature["activations"]:
            assert 1 <= len(context["tokens"]) == len(context["values"]) <= 1024
            assert all(isinstance(token, str) for token in context["tokens"])
        strongest = feature["activations"][0]
        assert max(strongest["values"]) == pytest.approx(float(made.store.columns["maximum"][feature["index"]]), abs=1e-5)
        assert (strongest["quantileMin"], strongest["quantileFraction"]) == (-1, -1)
    seventh = next(feature for feature in batch["features"] if feature["index"] == 7)
    assert seventh["explanations"] == [{"text": "lamps", "methodName": None, "modelName": None}]
    example = made.store.details[7]["top"][0]
    text = "".join(seventh["activations"][0]["tokens"])
    assert text in "".join(made.store.row_texts(int(example["row"])))
    json.dumps(batch, allow_nan=False)


def test_neuronpedia_vectors(made: Made, client: TestClient) -> None:
    """The very directions of the SAE, under the words that its route for new vectors takes."""
    bodies = neuronpedia_vectors(made.store, Marks({7: "lamps"}, frozenset()), [7, 9])
    assert {name for body in bodies for name in body} == {"modelId", "layerNumber", "hookType", "vector",
                                                          "vectorDefaultSteerStrength", "vectorLabel"}
    for body, latent in zip(bodies, (7, 9), strict=True):
        assert body["vector"] == pytest.approx(made.dictionary.W_dec[latent].tolist(), abs=1e-5)
        assert (body["layerNumber"], body["hookType"]) == (1, "resid-post")
        assert -100 <= body["vectorDefaultSteerStrength"] <= 100
        assert body["vectorDefaultSteerStrength"] == pytest.approx(float(made.store.columns["maximum"][latent]), abs=0.01)
    assert [body["vectorLabel"] for body in bodies] == ["lamps", "toy/1:9"]
    assert client.get(f"{S}/export/neuronpedia-vectors.json?latents=7,9").json()[0]["vector"] == bodies[0]["vector"]
    with pytest.raises(SpecError, match="1 to 128"):
        neuronpedia_vectors(made.store, NOTHING, [])
    elsewhere = dataclasses.replace(made.store, record={**made.store.record, "site": "blocks.1.hook_mlp_out"})
    with pytest.raises(SpecError, match="resid_pre and resid_post"):
        neuronpedia_vectors(elsewhere, NOTHING, [7])
    changed = dataclasses.replace(made.store, record={**made.store.record, "dictionary": "0" * 16})
    with pytest.raises(DictionaryError, match="is now"):
        neuronpedia_vectors(changed, NOTHING, [7])


def test_batches_are_small_enough(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    assert NEURONPEDIA_BATCH == 128
    monkeypatch.setattr("dashboards.export.NEURONPEDIA_BATCH", 10)
    sizes = [len(batch["features"]) for batch in neuronpedia(made.store, NOTHING, range(D_SAE), "x").batches]
    assert set(sizes[:-1]) == {10} and 0 < sizes[-1] <= 10


def test_refusals(client: TestClient, made: Made) -> None:
    with pytest.raises(SpecError, match="no name of a source set"):
        source_id(made.store, "a b")
    with pytest.raises(SpecError, match="2 features are too many; at most 1"):
        known_latents(made.store, "1,2", 1)
    with pytest.raises(DictionaryError, match="no feature 48"):
        known_latents(made.store, "1,48", 9)
    with pytest.raises(SpecError, match="at most 500"):
        html_page(made.store, [1] * (MOST_PAGES + 1), None)
    for path, status in (("features.html?latents=lamp", 400), ("features.html?latents=48", 404), ("features.xlsx", 404),
                         ("features.csv?sort=beauty", 400), (f"neuronpedia.json?latents={DEAD}", 400),
                         ("..%2Fmanifest.json", 404)):
        assert client.get(f"{S}/export/{path}").status_code == status
    assert client.post(f"{S}/export/features.csv", headers={HEADER: "1", "origin": f"http://{HOST}"}).status_code in (404, 405)
    page = client.get(f"{S}/features", params={"state": "live"}).text
    for name in ("features.csv", "features.parquet", "features.html", "neuronpedia.json"):
        assert f"{S}/export/{name}?state=live" in page


@pytest.mark.parametrize("kind", ["csv", "parquet", "html", "neuronpedia", "neuronpedia-vectors"])
def test_the_command(made: Made, run: Run, tmp_path: Path, kind: str, client: TestClient) -> None:
    out = tmp_path / "new" / kind
    answer = run("export", made.folder / "store", "--format", kind, "--latents", "7,9", "--out", out, "--json")
    assert answer.code == 0, answer.err
    assert (answer.json["features"], answer.json["format"]) == (2, kind)
    written = {path.name: path.read_bytes() for path in (out.iterdir() if out.is_dir() else [out])}
    assert sum(map(len, written.values())) == answer.json["bytes"]
    if kind == "html":
        assert written[kind].decode() == client.get(f"{S}/export/features.html?latents=7,9").text
    elif kind == "neuronpedia-vectors":
        assert len(json.loads(written[kind])) == 2
    elif kind == "neuronpedia":
        assert [feature["index"] for feature in json.loads(written["batch-0.json"])["features"]] == [7, 9]
    elif kind == "csv":
        assert len(written[kind].decode().splitlines()) == 3
    again = run("export", made.folder / "store", "--format", kind, "--latents", "7,9", "--out", out)
    assert (again.code, "exists" in again.err) == (2, True)


@pytest.mark.parametrize(("words", "message"), [
    (["--format", "xlsx"], "choose csv, parquet, html, neuronpedia or neuronpedia-vectors"),
    (["--format", "html"], "--latents 1,2,3"), (["--format", "neuronpedia-vectors"], "1 to 128"),
    (["--latents", "48"], "no feature 48"), (["--latents", "a"], "'a' is no feature's number"),
])
def test_what_the_command_refuses(made: Made, run: Run, tmp_path: Path, words: list[str], message: str) -> None:
    answer = run("export", made.folder / "store", "--out", tmp_path / "o", *words)
    assert (answer.code, message in answer.err, (tmp_path / "o").exists()) == (2, True, False)


def _last_json(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_commands_of_the_operating_table_do_what_it_does(client: TestClient, made: Made, capsys: pytest.CaptureFixture[str]
                                                             ) -> None:
    """What the page calls the same on the command line is: both commands are run, and write the streamed texts."""
    pairs = [("f", "7"), ("op", "floor"), ("x", "0.5"), ("text", "The keeper\nof the mill"), ("seed", "4"), ("tokens", "6")]
    headers = {HEADER: "1", "origin": f"http://{HOST}"}
    body = {"query": urlencode(pairs)}
    events = [json.loads(line) for line in client.post(f"{S}/surgery/run", json=body, headers=headers).text.splitlines()]
    texts = {side: "".join(event["text"] for event in events if event.get("side") == side) for side in ("base", "operated")}
    assert client.post(f"{S}/surgery/save", json=body, headers=headers).status_code == 200
    page = client.get(f"{S}/surgery", params=pairs).text.replace("&#39;", "'").replace("&amp;", "&")
    apply, operate = (re.search(rf"<code>({command} [^<]*)</code>", page)[1]  # type: ignore[index]
                      for command in ("undertow recipe apply", "undertow dashboard operate"))
    assert main([*shlex.split(operate)[1:], "--json"]) == 0
    whole = _last_json(capsys)
    assert whole["texts"] == texts and whole["kl_mean"] == pytest.approx(events[-1]["kl_mean"], rel=1e-4)
    assert main(shlex.split(operate)[1:]) == 0
    assert "forms of the word in the operated text: none" in " ".join(capsys.readouterr().out.split())
    words = shlex.split(apply)[1:]
    assert main([*words[:2], "--json", *words[2:]]) == 0
    [row] = _last_json(capsys)["generations"]
    for name, side in (("plain", "base"), ("operated", "operated")):
        assert "".join(c for c in row[name] if c.isprintable()) == "".join(
            c for c in re.sub(r"\\x[0-9a-f]{2}|\n", "", texts[side]) if c.isprintable())
