"""What a person writes about features: labels with their history, notes, stars. One SQLite file for all SAEs.

Kept under the digest of the SAE, so that a store built anew, on another text, shows them again. Labels and notes are only
ever added: the label in force is the newest, and an empty one takes it back.
"""

from __future__ import annotations

import datetime
import getpass
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple, final

from undertow.core.errors import SpecError, StorageError
from undertow.core.storage import disk_errors

MAX_LABEL, MAX_NOTE = 200, 4_000
_SCHEMA = """
CREATE TABLE IF NOT EXISTS labels (id INTEGER PRIMARY KEY, sae TEXT NOT NULL, latent INTEGER NOT NULL, text TEXT NOT NULL,
                                   author TEXT NOT NULL, written TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS notes (id INTEGER PRIMARY KEY, sae TEXT NOT NULL, latent INTEGER NOT NULL, text TEXT NOT NULL,
                                  author TEXT NOT NULL, written TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS stars (sae TEXT NOT NULL, latent INTEGER NOT NULL, written TEXT NOT NULL,
                                  PRIMARY KEY (sae, latent));
CREATE INDEX IF NOT EXISTS labels_of ON labels (sae, latent, id);
CREATE INDEX IF NOT EXISTS notes_of ON notes (sae, latent, id);
"""


class Entry(NamedTuple):
    """A label or a note: its text, who wrote it, and when (UTC, ISO 8601)."""

    text: str
    author: str
    written: str


class Marks(NamedTuple):
    """What the table shows of one SAE: the labels in force, and the starred features."""

    labels: dict[int, str]
    starred: frozenset[int]


def notes_path() -> Path:
    """Where notes live: UNDERTOW_DATA, else XDG_DATA_HOME/undertow, else ~/.local/share/undertow; file notes.sqlite."""
    if chosen := os.environ.get("UNDERTOW_DATA"):
        return Path(chosen) / "notes.sqlite"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "undertow" / "notes.sqlite"


@final
class Notes:
    """Labels, notes and stars in one file. Several processes may use it at once.

    Every method raises StorageError if the file cannot be read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._open() as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(_SCHEMA)

    def marks(self, sae: str) -> Marks:
        """Labels in force and stars of one SAE (by digest)."""
        with self._open() as db:
            rows = db.execute("SELECT latent, text FROM labels WHERE sae = ? ORDER BY id", (sae,)).fetchall()
            starred = db.execute("SELECT latent FROM stars WHERE sae = ?", (sae,)).fetchall()
        newest = dict(rows)
        return Marks({latent: text for latent, text in newest.items() if text}, frozenset(latent for (latent,) in starred))

    def add_label(self, sae: str, latent: int, text: str) -> None:
        """Put a label in force; "" takes the present one back. Raises SpecError if it is too long."""
        self._add("labels", sae, latent, " ".join(text.split()), MAX_LABEL)

    def add_note(self, sae: str, latent: int, text: str) -> None:
        """Add a note. Raises SpecError if it is blank or too long."""
        if not text.strip():
            raise SpecError("the note is blank", "type something, then save")
        self._add("notes", sae, latent, text.strip(), MAX_NOTE)

    def labels(self, sae: str, latent: int) -> tuple[Entry, ...]:
        """Every label that the feature ever had, newest first; one with an empty text is a withdrawal."""
        return self._entries("labels", sae, latent)

    def notes(self, sae: str, latent: int) -> tuple[Entry, ...]:
        """Notes on the feature, newest first."""
        return self._entries("notes", sae, latent)

    def star(self, sae: str, latent: int, on: bool) -> None:
        """Star the feature, or take the star away."""
        with self._open() as db:
            if on:
                db.execute("INSERT OR IGNORE INTO stars VALUES (?, ?, ?)", (sae, latent, _now()))
            else:
                db.execute("DELETE FROM stars WHERE sae = ? AND latent = ?", (sae, latent))

    def _add(self, table: str, sae: str, latent: int, text: str, longest: int) -> None:
        if len(text) > longest:
            raise SpecError(f"{len(text):,} characters are too many: {table} have at most {longest:,}", "shorten it")
        with self._open() as db:
            db.execute(f"INSERT INTO {table} (sae, latent, text, author, written) VALUES (?, ?, ?, ?, ?)",
                       (sae, latent, text, _author(), _now()))

    def _entries(self, table: str, sae: str, latent: int) -> tuple[Entry, ...]:
        with self._open() as db:
            rows = db.execute(f"SELECT text, author, written FROM {table} WHERE sae = ? AND latent = ? ORDER BY id DESC",
                              (sae, latent)).fetchall()
        return tuple(Entry(*row) for row in rows)

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        """A connection of its own for every call: handlers run in several threads."""
        try:
            with closing(sqlite3.connect(self.path, timeout=10)) as db, db:
                yield db
        except sqlite3.Error as error:
            raise StorageError(f"{self.path}: {error}", "choose another file with --notes") from error


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _author() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError, ImportError):
        return "unknown"
