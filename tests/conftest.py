"""Tests run offline: the hub is told so before anything imports it, and a connection to another machine raises."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

import tests.typecheck  # noqa: F401  the checker that pyproject names has to be in place before our packages are

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_SILENT"] = "true"
settings.register_profile("undertow", deadline=None, derandomize=True)
settings.load_profile("undertow")

_LOOPBACK = ("127.", "::1", "localhost")
_connect = socket.socket.connect


class NetworkUsedError(AssertionError):
    """A test tried to reach another machine."""


def _loopback_only(self: socket.socket, address: Any) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(_LOOPBACK):
        raise NetworkUsedError(f"tests are offline, and this one connects to {address!r}")
    _connect(self, address)


def pytest_configure(config: pytest.Config) -> None:
    socket.socket.connect = _loopback_only  # type: ignore[method-assign]


def pytest_unconfigure(config: pytest.Config) -> None:
    socket.socket.connect = _connect  # type: ignore[method-assign]


@pytest.fixture
def undertow_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own in place of the user's."""
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("UNDERTOW_CACHE", str(cache))
    return cache
