"""`undertow dashboard`: build, list, open; what is refused, and what it then says to type."""

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import uvicorn

from dashboards.feature_page import show_command
from dashboards.notes import Notes
from dashboards.store import open_feature_store
from sae.dictionary import LinearDictionary, Provenance, TopK
from sae.formats import save_folder
from sae.text import TextSpec
from tests import tiny
from tests.cli.answers import Run, runner
from undertow.cli.main import main

SITE, D_SAE = "blocks.1.hook_resid_post", 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("dashboard_cli")
    tiny.save_subject(made / "llama", "llama")
    tiny.save_text(made / "text.jsonl", copies=2)
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)))
    text = TextSpec(source=str(made / "text.jsonl"), context=32, held_out=0.3)
    save_folder(LinearDictionary(rows.T.contiguous(), torch.zeros(D_SAE), rows, torch.zeros(tiny.D_MODEL), TopK(4),
                                 Provenance(str(made / "llama"), SITE, 32, True, {"text": text.model_dump()})), made / "sae")
    return made


@pytest.fixture(autouse=True)
def places(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERTOW_CACHE", str(folder / "cache"))
    monkeypatch.setenv("UNDERTOW_DATA", str(tmp_path / "data"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "dashboard")


@pytest.fixture
def store(folder: Path, run: Run) -> Path:
    if not (folder / "store").exists():
        answer = run("build", folder / "sae", "--out", folder / "store", "--tokens", "800", "--seed", "5")
        assert answer.code == 0, answer.err
    return folder / "store"


def test_build(folder: Path, run: Run, tmp_path: Path) -> None:
    answer = run("build", folder / "sae", "--out", tmp_path / "s", "--tokens", "600", "--split", "train", "--text",
                 folder / "text.jsonl", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["features"] == D_SAE and answer.json["tokens"] >= 600
    assert "are read once with" in answer.err, "the cost is said beforehand"
    opened = open_feature_store(tmp_path / "s")
    assert opened.record["spec"]["split"] == "train"
    again = run("build", folder / "sae", "--out", tmp_path / "s")
    assert (again.code, "exists and is not empty" in again.err) == (2, True)


def test_list_is_the_table(store: Path, run: Run, tmp_path: Path) -> None:
    opened = open_feature_store(store)
    Notes(tmp_path / "n").add_label(opened.dictionary, 3, "lamps")
    answer = run("list", store, "--sort=density", "--order=down", "--json", "--notes", tmp_path / "n")
    rows = answer.json["rows"]
    counts = opened.columns["count"]
    assert [row["feature"] for row in rows] == sorted(range(D_SAE), key=lambda i: (-counts[i], i))
    assert {row["label"] for row in rows if row["feature"] == 3} == {"lamps"}
    assert run("list", store, "--labelled", "yes", "--notes", tmp_path / "n", "--json").json["passing"] == 1
    assert "strongest context" in run("list", store).out
    refused = run("list", store, "--sort", "beauty")
    assert (refused.code, "sort = 'beauty'" in refused.err) == (2, True)


def test_the_command_of_a_feature_prints_the_same_figures(store: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """What a page calls "the same on the command line" is that."""
    opened = open_feature_store(store)
    words = shlex.split(show_command(opened, 3))
    capsys.readouterr()
    assert main([*words[1:], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])["cards"][0]
    assert shown["count"] == int(opened.columns["count"][3])
    assert shown["maximum"] == pytest.approx(float(opened.columns["maximum"][3]))
    assert [context["row"] for context in shown["top"]] == opened.details[3]["top"]["row"].tolist()[:len(shown["top"])]
    assert [word["token_id"] for word in shown["promoted"]] == opened.details[3]["promoted"]["id"].tolist()


@pytest.mark.parametrize(("words", "message"), [
    (["nowhere"], "nowhere is neither a folder nor an SAE"),
    (["smolm2/12"], "did you mean smollm2/12"),
    (["--host", "0.0.0.0"], "there is no token\n  add --token SECRET"),
    (["build", "SAE", "--out", "OUT", "--split", "test"], "choose held_out or train"),
    (["list", "SAE"], "no manifest.json"),
    (["build"], "undertow dashboard build --help"),
])
def test_refusals(folder: Path, run: Run, tmp_path: Path, words: list[str], message: str) -> None:
    answer = run(*(str({"SAE": folder / "sae", "OUT": tmp_path / "o"}.get(word, word)) for word in words))
    assert answer.code == 2
    assert message in answer.err
    assert "Traceback" not in answer.err


def test_a_port_in_use(store: Path, run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        answer = run(store, "--port", taken.getsockname()[1], "--no-open")
    assert answer.code == 2
    assert "cannot listen on 127.0.0.1" in answer.err and "--port 0" in answer.err


@pytest.mark.parametrize("target", ["store", "sae"])
def test_open_serves_a_store_and_builds_a_missing_one(folder: Path, store: Path, monkeypatch: pytest.MonkeyPatch,
                                                      capsys: pytest.CaptureFixture[str], target: str) -> None:
    """The real server in a thread; Ctrl-C is the flag that uvicorn sets on it."""
    started: list[uvicorn.Server] = []
    monkeypatch.setattr(uvicorn.Server, "capture_signals", lambda self: _noting(self, started))
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["dashboard", str(folder / target), "--port", "0", "--no-open",
                                                                "--json"])))
    thread.start()
    deadline = time.monotonic() + 60
    while not (started and started[0].started) and time.monotonic() < deadline and thread.is_alive():
        time.sleep(0.05)
    url = json.loads(capsys.readouterr().out.splitlines()[-1])["url"]
    [key] = json.load(urllib.request.urlopen(f"{url}healthz"))["stores"]
    assert b"Strongest context" in urllib.request.urlopen(f"{url}s/{key}/features").read()
    prompt = urllib.request.urlopen(f"{url}s/{key}/prompt?text=The+lamp").read()
    assert b"features fire on" in prompt
    started[0].should_exit = True
    thread.join(30)
    assert codes == [0]


def _noting(server: object, started: list) -> object:
    started.append(server)
    return contextlib.nullcontext()
