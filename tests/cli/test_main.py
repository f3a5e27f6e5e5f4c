"""The entry point: exit codes, messages, and the JSON line."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path

import pytest
import typer

import undertow
from undertow.cli import main as cli
from undertow.cli.common import JsonOption, OutOption, SeedOption, console, emit
from undertow.core.errors import SiteError


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command group `bench` of the test's own."""
    app = typer.Typer()

    @app.command()
    def go(out: OutOption, seed: SeedOption = 0, json_: JsonOption = False) -> None:
        console().print(f"working in [{out}]", markup=False)
        if seed == 1:
            raise SiteError("unknown site 'blocks.99'", "did you mean blocks.9?")
        if seed == 2:
            raise KeyboardInterrupt
        if seed == 3:
            raise ZeroDivisionError("a bug")
        emit({"seed": seed, "fvu": 0.123456, "path": out}, json_)

    module = types.ModuleType("undertow.cli.bench")
    module.app = app  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "undertow.cli.bench", module)


Captured = pytest.CaptureFixture[str]


@pytest.mark.usefixtures("toy")
class TestCommand:
    def test_readable(self, capsys: Captured) -> None:
        assert cli.main(["bench", "go", "--out", "x"]) == 0
        out, err = capsys.readouterr()
        assert out.splitlines() == ["working in [x]", "seed  0", "fvu   0.1235", 'path  "x"']
        assert err == ""

    def test_json_owns_standard_output(self, capsys: Captured) -> None:
        assert cli.main(["bench", "go", "--out", "x", "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out) == {"seed": 0, "fvu": 0.123456, "path": "x"}
        assert "working in [x]" in err

    def test_json_of_one_call_does_not_leak_into_the_next(self, capsys: Captured) -> None:
        cli.main(["bench", "go", "--out", "x", "--json"])
        capsys.readouterr()
        self.test_readable(capsys)

    def test_user_error(self, capsys: Captured) -> None:
        assert cli.main(["bench", "go", "--out", "x", "--seed", "1"]) == 2
        out, err = capsys.readouterr()
        assert err == "error: unknown site 'blocks.99'\n  did you mean blocks.9?\n"
        assert out == "working in [x]\n"

    def test_user_error_in_json(self, capsys: Captured) -> None:
        assert cli.main(["bench", "go", "--out", "x", "--seed", "1", "--json"]) == 2
        out, _ = capsys.readouterr()
        assert json.loads(out) == {"error": "unknown site 'blocks.99'", "hint": "did you mean blocks.9?"}

    def test_interrupted(self, capsys: Captured) -> None:
        assert cli.main(["bench", "go", "--out", "x", "--seed", "2"]) == 130

    def test_a_bug_propagates(self) -> None:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            cli.main(["bench", "go", "--out", "x", "--seed", "3"])

    @pytest.mark.parametrize(("words", "what", "hint"), [
        (["go"], "'--out'", "undertow bench go --help"),
        (["go", "--out", "x", "--sede", "1"], "--sede", "undertow bench go --help"),
        (["go", "--out", "x", "--seed", "many"], "--seed many", "undertow bench go --help"),
        (["stop"], "'stop'", "undertow bench stop --help"),
        (["--fast"], "--fast", "undertow bench --help"),
    ])
    def test_usage_errors(self, words: list[str], what: str, hint: str, capsys: Captured) -> None:
        assert cli.main(["bench", *words, "--json"]) == 2
        out, err = capsys.readouterr()
        assert what in err and hint in err
        assert "Traceback" not in err
        assert what in json.loads(out)["error"]

    def test_help_of_a_group_with_one_command(self, capsys: Captured) -> None:
        for words in (["bench"], ["bench", "--help"]):
            assert cli.main(words) == 0
            assert "go" in capsys.readouterr().out


def test_every_command_has_its_app() -> None:
    for command in cli.COMMANDS:
        app = importlib.import_module(f"undertow.cli.{command.name}").app
        assert isinstance(app, typer.Typer)
        assert len(app.registered_commands) >= 1


def test_version(capsys: Captured) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"undertow {undertow.__version__}\n"


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["--verbose"]])
def test_help_names_every_command(words: list[str], capsys: Captured) -> None:
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert all(f"  {command.name} " in out for command in cli.COMMANDS)
    assert max(map(len, out.splitlines())) <= 100


@pytest.mark.parametrize(("words", "what", "hint"), [
    (["sea"], "'sea'", "did you mean sae"),
    (["xyz"], "'xyz'", "subject, text, sae"),
    (["--fast"], "--fast", "undertow --help"),
])
def test_unknown_words(words: list[str], what: str, hint: str, capsys: Captured) -> None:
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert what in err and hint in err


def test_emit_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        emit({"fvu": float("nan")}, as_json=True)
    with pytest.raises(TypeError):
        emit({"fvu": object()}, as_json=True)
    with pytest.raises(TypeError):
        emit({"path": Path("x"), "fvu": {1, 2}}, as_json=True)
