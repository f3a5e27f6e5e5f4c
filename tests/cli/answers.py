"""Running a command of the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from undertow.cli.main import main


class Answer(NamedTuple):
    """What a command gave back."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """The last line of standard output."""
        return json.loads(self.out.splitlines()[-1])


Run = Callable[..., Answer]


def runner(capsys: pytest.CaptureFixture[str], *group: str) -> Run:
    """A function that runs `undertow GROUP WORDS` and returns its answer."""
    def call(*words: str | Path) -> Answer:
        capsys.readouterr()
        code = main([*group, *(str(word) for word in words)])
        return Answer(code, *capsys.readouterr())

    return call
