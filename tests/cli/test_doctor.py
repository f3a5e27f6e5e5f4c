"""`undertow doctor`: what is fetched, damaged or missing, and the command that mends it."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pytest

from undertow.cli import doctor
from undertow.cli.main import main
from undertow.core.storage import create_artifact


def fetched(cache: Path, *place: str, kind: str) -> Path:
    with create_artifact(cache.joinpath(*place), kind, {}) as work:
        (work / "data.bin").write_bytes(b"x" * 1000)
    return cache.joinpath(*place)


def test_an_empty_cache(undertow_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == version("torch")
    assert report["cache"]["path"] == str(undertow_cache)
    assert report["cache"]["bytes"] == 0
    assert report["cache"]["free_bytes"] > 0
    assert report["subjects"] == [{"name": "smollm2", "state": "absent"}]
    commands = [item["command"] for item in report["missing"]]
    assert commands[-2:] == ["undertow subject fetch smollm2", "undertow text fetch brown"]


def test_readable(undertow_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "subject smollm2 is absent\n  undertow subject fetch smollm2" in out
    assert f"cache: {undertow_cache}  0 MB used" in out


def test_fetched_and_damaged(undertow_cache: Path) -> None:
    subject = fetched(undertow_cache, "subjects", "smollm2", kind="subject")
    report = doctor.examine(undertow_cache)
    [entry] = report["subjects"]
    assert entry["state"] == "fetched"
    assert entry["bytes"] == 1000 + (subject / "manifest.json").stat().st_size
    assert not any("smollm2" in item["what"] for item in report["missing"])

    (subject / "data.bin").write_bytes(b"y" * 1000)
    report = doctor.examine(undertow_cache)
    [entry] = report["subjects"]
    assert entry["state"] == "damaged"
    assert "data.bin has changed" in entry["reason"]
    assert {"what": "subject smollm2 is damaged", "command": "undertow subject fetch smollm2"} in report["missing"]


def test_missing_tools_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    assert [item["command"] for item in doctor._missing_tools()] == ["install Node.js (https://nodejs.org)"]
    monkeypatch.setattr(doctor.importlib.metadata, "requires",
                        lambda name: ["torch>=2.9", "no-such-package<3,>=2", "absent-too; extra == 'dev'"])
    assert doctor._missing_packages() == [
        {"what": "Python package no-such-package is not installed", "command": "pip install 'no-such-package<3,>=2'"}]
