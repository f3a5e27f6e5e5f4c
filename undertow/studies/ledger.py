"""The folder of a study: what was asked (study.json), and one line a trial (rows.jsonl), appended and flushed to the disk.

A run may be killed at any moment. A half-written last line is passed over, and cut off by the next run, with a warning (who
only reads may meet a line that is being written); a line in the middle that cannot be read is an error, and nothing is changed.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from interventions import verdict as table
from undertow.core.errors import ArtifactError
from undertow.core.record import run_record
from undertow.core.storage import disk_errors, write_json
from undertow.studies.spec import StudySpec

log = logging.getLogger(__name__)
STUDY, ROWS = "study.json", "rows.jsonl"


def table_constants() -> dict[str, float]:
    """The limits of the verdict's table, which a study fixes in advance together with its own."""
    return {name.lower(): float(getattr(table, name)) for name in (
        "MIN_RANDOM_SETS", "MIN_LEXICAL_RATIO", "MAX_HAZARD_RATIO", "MAX_KL_MEAN", "MAX_KL_P99", "MIN_UNSAID_RATIO",
        "MAX_EXTRA_BITS", "MAX_WORD_P")}


@final
class Ledger:
    """The rows of a study, by the key of their trial. Made by `open_ledger`."""

    def __init__(self, folder: Path, spec: StudySpec, rows: dict[str, dict[str, Any]]) -> None:
        self.folder, self.spec, self._rows = folder, spec, rows

    @property
    def rows(self) -> Mapping[str, dict[str, Any]]:
        """The latest row of every trial."""
        return self._rows

    def done(self, key: str, retry: bool = False) -> bool:
        """Whether a trial has its row; with `retry` a failed one does not count."""
        row = self._rows.get(key)
        return row is not None and not (retry and row["status"] == "failed")

    def append(self, row: dict[str, Any]) -> None:
        """Write one row; it is on the disk when this returns. Raises StorageError if it cannot be written."""
        line = json.dumps(row, sort_keys=True, separators=(",", ":"), allow_nan=False) + "\n"
        path = self.folder / ROWS
        with disk_errors(path), path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._rows[row["id"]] = row


def open_ledger(folder: Path, spec: StudySpec | None = None, mend: bool = False) -> Ledger:
    """Open the folder of a study, or begin it with `spec`; with `mend` a half-written last line is cut off.

    Raises:
        ArtifactError: no study there and no spec; another study, or changed settings, with the differences; a row that
            cannot be read.
    """
    path = folder / STUDY
    if not path.is_file():
        if spec is None:
            raise ArtifactError(f"{folder} holds no study ({STUDY} is missing)", "undertow study run NAME --out DIR")
        if folder.exists() and any(folder.iterdir()):
            raise ArtifactError(f"{folder} exists and is not a study", f"choose another --out, or remove it: rm -r {folder}")
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        record = run_record(spec.model_dump(mode="json"), spec.seeds[0], digest=spec.digest(), table=table_constants())
        write_json(path, record)
        return Ledger(folder, spec, {})
    record = _json(path)
    kept = StudySpec.checked(record["spec"], str(path))
    rows = _read(folder / ROWS, mend)
    _refuse_changes(folder, record, kept if spec is None else spec, bool(rows))
    if spec is not None and spec != kept:
        write_json(path, run_record(spec.model_dump(mode="json"), spec.seeds[0], digest=spec.digest(), table=table_constants()))
    return Ledger(folder, kept if spec is None else spec, rows)


def record_of(folder: Path) -> dict[str, Any]:
    """What study.json holds: spec, digest, table, versions, commit."""
    return _json(folder / STUDY)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} holds {type(found).__name__}, not a mapping")
    return found


def _refuse_changes(folder: Path, record: Mapping[str, Any], spec: StudySpec, has_rows: bool) -> None:
    """Raise ArtifactError with every setting that differs from what the rows were made under."""
    before = _flat({"spec": record["spec"], "table": record.get("table", {})})
    after = _flat({"spec": spec.model_dump(mode="json"), "table": table_constants()})
    changed = [f"{name}: {before.get(name)!r} -> {after.get(name)!r}" for name in sorted(before.keys() | after.keys())
               if before.get(name) != after.get(name)]
    if changed and has_rows:
        raise ArtifactError(f"{folder} has rows that were made under other settings, which were fixed in advance:\n  "
                            + "\n  ".join(changed), "run the changed study into a folder of its own with --out")


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {name: value}
    return {key: inner for part, held in value.items()
            for key, inner in _flat(held, f"{name}.{part}" if name else str(part)).items()}


def _read(path: Path, mend: bool) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    rows: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row["id"]] = row
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{path}, line {number} cannot be read: {error}; nothing was changed",
                                "restore the line from a copy, or remove it: its trial is then run again") from None
    if len(whole) < len(content) and mend:
        log.warning("%s: the last line was half written (%d bytes); it is cut off and its trial is run again", path,
                    len(content) - len(whole))
        with disk_errors(path), path.open("r+b") as file:
            file.truncate(len(whole))
            file.flush()
            os.fsync(file.fileno())
    return rows
