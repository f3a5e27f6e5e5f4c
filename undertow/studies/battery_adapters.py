"""Files of others as exercises: MoralChoice (CSV) and Anthropic's evaluations (JSON Lines). Nothing here loads a model.

Options are shown in an order drawn for each row from the stream seed / "battery", "options", digest of the file, line: in
one of the files the wanted answer is (A) in 62 % of rows. Letters are dropped; what is scored is the whole wording.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any, NamedTuple, final

from undertow.core.errors import TextError
from undertow.core.seeds import derive_seed

COLUMNS = ("scenario_id", "context", "action1", "action2")
KEYS = ("question", "answer_matching_behavior", "answer_not_matching_behavior")
_CHOICES = re.compile(r"\n\s*Choices:\s*(?=\n)")
_OPTION = re.compile(r"\n\s*\(([A-Z])\)([^\n]*)")
_LETTER = re.compile(r"\(([A-Z])\)")
_STATEMENT = re.compile(r'(.+?\?)\s*\n".*"\s*', re.DOTALL)


@final
class Exercise(NamedTuple):
    """A text and the ways in which it may be gone on with.

    Attributes:
        id: name of the row. line: where it begins in the file, from 1.
        text: what is put to the model, without the options.
        premise: what is left of it without its content, by which the prior pull of each wording is measured; may be empty.
        targets: wordings of what is asked for (MoralChoice: the first action; Anthropic: the answer that matches).
        others: wordings of anything else.
        shown: all wordings in the order in which they are shown; empty if they are not shown.
    """

    id: str
    line: int
    text: str
    premise: str
    targets: tuple[str, ...]
    others: tuple[str, ...]
    shown: tuple[str, ...]

    @property
    def place(self) -> int | None:
        """Where the target stands among what is shown, from 0; None if nothing is shown."""
        return self.shown.index(self.targets[0]) if self.shown else None


@final
class Foreign(NamedTuple):
    """A file of others, read.

    Attributes:
        name: of the file. sha256: of its bytes.
        exercises: its rows, in the order of the file.
        left_out: rows that are well formed and ask nothing, because their wordings are the same, by line.
    """

    name: str
    sha256: str
    exercises: list[Exercise]
    left_out: list[int]


def read_moralchoice(path: Path, seed: int) -> Foreign:
    """Scherrer et al. 2023: `context`, `action1` and `action2` a row; in the low-ambiguity file action1 is the common choice.

    Raises TextError that names the line: a missing column or cell, or a row of another width.
    """
    digest, content = _content(path)
    made, same, line = [], [], 1
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
    if missing:
        raise TextError(f"{path}, line 1: no column {missing[0]!r}, so this is not MoralChoice",
                        f"needed: {', '.join(COLUMNS)}")
    while (row := _next(reader, path, line + 1)) is not None:
        at, line = line + 1, reader.line_num
        if None in row or None in row.values():
            raise TextError(f"{path}, line {at}: {len(reader.fieldnames or ())} cells are needed, and the row has "
                            f"{'more' if None in row else 'fewer'}")
        empty = [column for column in COLUMNS if not row[column].strip()]
        if empty:
            raise TextError(f"{path}, line {at}: {empty[0]} is empty")
        name, text, *actions = (" ".join(row[column].split()) for column in COLUMNS)
        if actions[0] == actions[1]:
            same.append(at)
            continue
        shown = _shuffled(tuple(actions), seed, digest, at)
        made.append(Exercise(name, at, text, "", (actions[0],), (actions[1],), shown))
    return _whole(path, digest, made, same)


def read_anthropic(path: Path, seed: int) -> Foreign:
    """Perez et al. 2022: a question with lettered choices, or a statement to be said Yes or No to.

    Raises TextError that names the line: no JSON, a missing key, an answer that is no choice, a choice without a text.
    """
    digest, content = _content(path)
    made, same = [], []
    for line, text in enumerate(content.split("\n"), start=1):
        if not text.strip():
            continue
        row = _json(path, line, text)
        one = (_lettered(path, line, row, (seed, digest)) if _CHOICES.search(row["question"]) else _plain(path, line, row))
        if one is None:
            same.append(line)
        else:
            made.append(one)
    return _whole(path, digest, made, same)


def _lettered(path: Path, line: int, row: dict[str, str], shuffle: tuple[int, str]) -> Exercise | None:
    text, options = _CHOICES.split(row["question"], maxsplit=1)
    listed = {letter: " ".join(said.split()) for letter, said in _OPTION.findall(options)}
    bare = [letter for letter, said in listed.items() if not said]
    if bare or len(listed) < 2:
        what = f"choice ({bare[0]}) has no text" if bare else f"{len(listed)} lettered choices, and 2 are needed"
        raise TextError(f"{path}, line {line}: {what}")
    target, other = (_LETTER.fullmatch(row[key].strip()) for key in KEYS[1:])
    if target is None or other is None or target[1] == other[1] or not {target[1], other[1]} <= set(listed):
        raise TextError(f"{path}, line {line}: the answers {row[KEYS[1]]!r} and {row[KEYS[2]]!r} are not two of the choices "
                        f"{', '.join(f'({letter})' for letter in listed)}")
    if len(set(listed.values())) < len(listed):
        return None
    wanted = listed[target[1]]
    others = tuple(said for said in listed.values() if said != wanted)
    return Exercise(str(line), line, text.removeprefix("Question:").strip(), "", (wanted,), others,
                    _shuffled(tuple(listed.values()), *shuffle, line))


def _plain(path: Path, line: int, row: dict[str, str]) -> Exercise:
    target, other = (row[key].strip() for key in KEYS[1:])
    if not target or not other or target == other or _LETTER.search(target + other):
        raise TextError(f"{path}, line {line}: the answers {row[KEYS[1]]!r} and {row[KEYS[2]]!r} are not two words",
                        "a question with lettered answers lists them under “Choices:”")
    text = row["question"].strip()
    asked = _STATEMENT.fullmatch(text)
    return Exercise(str(line), line, text, asked[1] if asked else "", (target,), (other,), ())


def _shuffled(options: tuple[str, ...], seed: int, digest: str, line: int) -> tuple[str, ...]:
    return tuple(sorted(options, key=lambda option: derive_seed(seed, "battery", "options", digest, line, option)))


def _content(path: Path) -> tuple[str, str]:
    """SHA-256 and text of a file."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise TextError(f"cannot read {path}: {error.strerror}", "name the file with --file PATH") from None
    try:
        return hashlib.sha256(content).hexdigest(), content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise TextError(f"{path}, line {line}: not UTF-8: {error.reason}") from None


def _next(reader: csv.DictReader[str], path: Path, line: int) -> dict[str, Any] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise TextError(f"{path}, line {line}: {error}") from None


def _json(path: Path, line: int, text: str) -> dict[str, str]:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise TextError(f"{path}, line {line}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise TextError(f"{path}, line {line}: holds {type(row).__name__}, not an object")
    lost = [key for key in KEYS if not isinstance(row.get(key), str)]
    if lost:
        raise TextError(f"{path}, line {line}: {lost[0]} is {row.get(lost[0])!r}, not a text")
    return row


def _whole(path: Path, digest: str, made: list[Exercise], same: list[int]) -> Foreign:
    if len(made) < 2:
        raise TextError(f"{path} holds {len(made)} rows, and at least 2 are needed")
    return Foreign(path.name, digest, made, same)


READERS = {"moralchoice": read_moralchoice, "anthropic-evals": read_anthropic}
