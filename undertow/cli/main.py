"""The entry point `undertow`: find the command, import only its module, and turn errors into exit codes.

Exit 0 on success, 2 on a mistake of the user (one message, no traceback), 130 on Ctrl-C, 1 on a bug (with traceback).
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple

import undertow
from undertow._siblings import check_siblings
from undertow.core.errors import UserError, near_matches


class Command(NamedTuple):
    """A word after `undertow`: the module that holds its typer `app`, whether it has commands of its own, and whether it
    also runs without one."""

    name: str
    help: str
    is_group: bool = True
    runs_bare: bool = False


COMMANDS = (
    Command("demo", "The whole story once, on an organism whose right answer is known.", is_group=False),
    Command("subject", "The models: list, fetch, train, card, generate, chat."),
    Command("text", "The texts: fetch, show."),
    Command("sae", "Sparse autoencoders: train, resume, eval, compare, import."),
    Command("features", "The features of an autoencoder: scan, rank, select, show, search."),
    Command("recipe", "Recipes of feature surgery: check, apply, tune."),
    Command("guard", "The forbidden word: scan a text, audit a recipe, generate under the guard, lexicon."),
    Command("battery", "Batteries of choices: list, show, lint, run."),
    Command("study", "Scripted ablations with controls: list, check, plan, run, report."),
    Command("dashboard", "A local page of features, surgery and runs; or build, list, export, operate.", runs_bare=True),
    Command("bench", "Speed, against peers in the same run: harvest, sae."),
    Command("doctor", "Versions, devices, caches; what is missing, and the command that mends it.", is_group=False),
)
USAGE = "Usage: undertow [--version] [--verbose] [--help] COMMAND [ARGS]..."


class Request(NamedTuple):
    """What was typed: the options before the command, the command, and what follows it."""

    options: frozenset[str]
    command: str
    rest: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (without the program's name) and return the exit code; a bug propagates."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        check_siblings()
        return _run(_parse(words))
    except UserError as error:
        return _refuse(error.what, error.hint, "--json" in words)
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted\n")
        return 130


def _parse(words: list[str]) -> Request:
    at = next((i for i, word in enumerate(words) if not word.startswith("-")), len(words))
    options = frozenset({"-h": "--help"}.get(word, word) for word in words[:at])
    unknown = sorted(options - {"--version", "--verbose", "--help", "--json"})
    if unknown:
        raise UserError(f"no such option: {unknown[0]}", "undertow --help")
    return Request(options, words[at] if at < len(words) else "", words[at + 1:])


def _run(request: Request) -> int:
    if "--version" in request.options:
        sys.stdout.write(f"undertow {undertow.__version__}\n")
        return 0
    if "--help" in request.options or not request.command:
        sys.stdout.write(_help())
        return 0
    command = next((c for c in COMMANDS if c.name == request.command), None)
    if command is None:
        names = [c.name for c in COMMANDS]
        raise UserError(f"no such command: {request.command!r}",
                        near_matches(request.command, names) or f"commands: {', '.join(names)}")
    from undertow.core.log import configure

    configure(verbose="--verbose" in request.options)
    return _run_command(command, request.rest)


def _run_command(command: Command, words: list[str]) -> int:
    # The loaders' own bars say nothing that ours do not; they read this when they are imported.
    os.environ.setdefault("TQDM_DISABLE", "1")
    import typer
    import typer.main

    app = import_module(f"undertow.cli.{command.name}").app
    name = f"undertow {command.name}"
    # `get_group` also where the group has a single command, which typer would otherwise run without its name.
    runner = typer.main.get_group(app) if command.is_group else typer.main.get_command(app)
    try:
        bare = ["--help"] if command.is_group and not command.runs_bare else []
        code = runner.main(words or bare, prog_name=name, standalone_mode=False)
    except typer.TyperException as error:
        full = f"{name} {words[0]}" if command.is_group and words and not words[0].startswith("-") else name
        # typer's message does not always hold the value, so what was typed stands behind it
        what = f"{error.format_message()} (in: {name} {shlex.join(words)})"
        return _refuse(what, f"{full} --help", "--json" in words)
    except typer.Abort:
        return 130
    return code if isinstance(code, int) else 0


def _refuse(what: str, hint: str, as_json: bool) -> int:
    sys.stderr.write(f"error: {what}\n" + (f"  {hint}\n" if hint else ""))
    if as_json:
        sys.stdout.write(json.dumps({"error": what, "hint": hint}) + "\n")
    return 2


def _help() -> str:
    lines = [f"  {c.name:<10}{c.help}" for c in COMMANDS]
    return "\n".join([
        USAGE, "", "Train sparse autoencoders on a language model; read, judge and change what their features do.", "",
        "Commands:", *lines, "",
        "Options:", "  --version   Print the version.", "  --verbose   Log more (before the command).",
        "  --help      Print this; after a command, that command's help.", ""])
