"""The record of a run."""

from __future__ import annotations

import datetime
import platform
from importlib.metadata import version

import pytest

from undertow.core import record


def test_run_record() -> None:
    got = record.run_record({"k": 2}, seed=5, fvu=0.25)
    assert (got["spec"], got["seed"], got["fvu"]) == ({"k": 2}, 5, 0.25)
    assert got["versions"]["torch"] == version("torch")
    assert got["versions"]["python"] == platform.python_version()
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(got["written"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)


def test_absent_packages_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "PACKAGES", ("torch", "no-such-package"))
    assert set(record.package_versions()) == {"python", "torch"}


def test_git_revision_is_a_commit_or_empty() -> None:
    revision = record.git_revision().removesuffix("+dirty")
    assert revision == "" or (len(revision) == 40 and int(revision, 16) >= 0)
