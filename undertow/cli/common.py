"""What every command shares: the options that are the same everywhere, the console, and the machine-readable line."""

from __future__ import annotations

import json
import os
import sys
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

_as_json: ContextVar[bool] = ContextVar("as_json", default=False)


def _remember_json(value: bool) -> bool:
    _as_json.set(value)
    return value


SeedOption = Annotated[int, typer.Option("--seed", help="Seed of every random choice of this command.")]
JsonOption = Annotated[bool, typer.Option("--json", callback=_remember_json,
                                          help="Leave one JSON object as the last line of standard output.")]
_OUT_HELP = "Folder to write; it must not exist, or be empty."
OutOption = Annotated[Path, typer.Option("--out", help=_OUT_HELP)]
OptionalOutOption = Annotated[Path | None, typer.Option("--out", help=_OUT_HELP)]
_MODEL_HELP = "A subject's name (undertow subject list), a Hugging Face name, or a local folder."
ModelOption = Annotated[str, typer.Option("--model", help=_MODEL_HELP)]
OptionalModelOption = Annotated[str | None, typer.Option("--model", help=_MODEL_HELP)]
_TEXT_HELP = ("A file or folder (.txt, .jsonl, .jsonl.gz, .parquet), a fetched text (brown), the packaged world (keeper, "
              "keeper:5000), a Hugging Face data set, or several joined by + (keeper:3000+brown).")
TextOption = Annotated[str, typer.Option("--text", help=_TEXT_HELP)]
OptionalTextOption = Annotated[str | None, typer.Option("--text", help=_TEXT_HELP)]
ColumnOption = Annotated[str | None, typer.Option("--column", help="Column or key that holds the text of a record.")]
ChatOption = Annotated[bool, typer.Option("--chat", help="Wrap every document in the subject's chat template.")]


def console() -> Console:
    """The console for readable output: standard output, or standard error while `--json` owns standard output."""
    return Console(stderr=_as_json.get(), highlight=False, soft_wrap=not sys.stdout.isatty())


def emit(values: dict[str, Any], as_json: bool) -> None:
    """Print the result of a command: one line of JSON (NaN refused), or one readable line a value."""
    if as_json:
        sys.stdout.write(json.dumps(values, allow_nan=False, default=os.fspath) + "\n")
        sys.stdout.flush()
        return
    width = max(map(len, values), default=0)
    for key, value in values.items():
        console().print(f"{key:<{width}}  {_readable(value)}", markup=False)


def _readable(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value, default=os.fspath)
