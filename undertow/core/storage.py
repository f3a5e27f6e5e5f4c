"""Files and artifact directories: temp then rename, manifest last, digests checked on read.

An artifact is a directory with `manifest.json`, which holds the kind, a schema version, the record of the run and the
SHA-256 of every other file. It is written last, so its presence proves that the directory is complete.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from undertow.core.errors import ArtifactError, StorageError

SCHEMA = 1
MANIFEST = "manifest.json"
_DISK_ERRNOS = {errno.ENOSPC: "no space left", errno.EDQUOT: "quota exceeded", errno.EFBIG: "file too large",
                errno.EROFS: "read-only file system", errno.EACCES: "permission denied"}


class Artifact(NamedTuple):
    """A verified artifact directory: `record` is the record of the run that made it."""

    path: Path
    kind: str
    record: dict[str, Any]


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn the operating system's "disk full" and kin into one clear StorageError about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRNOS:
            raise
        raise StorageError(f"cannot write {path}: {_DISK_ERRNOS[error.errno]}", _space_hint(path)) from error
    except Exception as error:
        # safetensors wraps the operating system's error in one of its own and keeps only its text.
        number = next((n for n in _DISK_ERRNOS if f"os error {n})" in str(error)), None)
        if number is None:
            raise
        raise StorageError(f"cannot write {path}: {_DISK_ERRNOS[number]}", _space_hint(path)) from error


def _space_hint(path: Path) -> str:
    free = shutil.disk_usage(existing_parent(path)).free
    return f"{free / 1e9:.2f} GB free there; free some space or choose another folder with --out or UNDERTOW_CACHE"


def existing_parent(path: Path) -> Path:
    """The nearest folder on the way up from `path` that exists: the one whose disk will hold it."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def require_space(path: Path, n_bytes: int) -> None:
    """Raise StorageError before any work if the disk that holds `path` has less than `n_bytes` free."""
    free = shutil.disk_usage(existing_parent(path)).free
    if free < n_bytes:
        raise StorageError(f"{path} needs {n_bytes / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free",
                           "free some space, or choose another folder with --out or UNDERTOW_CACHE")


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all (temp file beside it, then rename)."""
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with disk_errors(path):
            temp.write_text(text, encoding="utf-8")
            temp.replace(path)
    finally:
        temp.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON (NaN refused) whole or not at all."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n")


def refuse_existing(path: Path) -> None:
    """Raise ArtifactError if `path` exists and is not an empty directory; nothing is ever overwritten."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ArtifactError(f"{path} exists and is not empty", f"choose another --out, or remove it: rm -r {path}")


@contextlib.contextmanager
def create_artifact(path: Path, kind: str, record: dict[str, Any]) -> Iterator[Path]:
    """Build an artifact in a temporary folder beside `path`; on success seal it and rename it into place.

    After any exception nothing is left at `path` or beside it. Raises ArtifactError if `path` is taken.
    """
    refuse_existing(path)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        with disk_errors(path):
            yield work
            seal(work, kind, record)
            place(work, path)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def seal(folder: Path, kind: str, record: dict[str, Any]) -> None:
    """Write the manifest of a finished folder: kind, schema, record, and the digest of every file in it."""
    files = {str(p.relative_to(folder)): sha256_file(p) for p in sorted(folder.rglob("*"))
             if p.is_file() and p.name != MANIFEST}
    write_json(folder / MANIFEST, {"schema": SCHEMA, "kind": kind, "files": files, "record": record})


def place(work: Path, path: Path) -> None:
    """Rename a sealed folder into place (over an empty directory at most)."""
    if path.exists():
        path.rmdir()
    work.chmod(0o755)  # mkdtemp makes it private
    work.replace(path)


def open_artifact(path: Path, kind: str) -> Artifact:
    """Open a directory made by `create_artifact` and check the digest of every file.

    Raises ArtifactError if it is missing, incomplete, of another kind or schema, or changed since it was written.
    """
    if not (path / MANIFEST).is_file():
        state = "is not a finished artifact (it has no manifest.json)" if path.is_dir() else "does not exist"
        raise ArtifactError(f"{path} {state}")
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found, schema, files, record = (manifest[key] for key in ("kind", "schema", "files", "record"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path / MANIFEST} cannot be read: {error!r}") from None
    if not (isinstance(files, dict) and isinstance(record, dict)):
        raise ArtifactError(f"{path / MANIFEST} cannot be read: its files and its record are not mappings")
    if schema != SCHEMA:
        raise ArtifactError(f"{path} has schema {schema}; this version reads schema {SCHEMA}")
    if found != kind:
        raise ArtifactError(f"{path} is of kind {found!r}, not {kind!r}")
    for name, digest in files.items():
        member = path / name
        if not member.resolve().is_relative_to(path.resolve()):
            raise ArtifactError(f"{path / MANIFEST} names {name!r}, which lies outside the artifact")
        if not member.is_file():
            raise ArtifactError(f"{member} is missing", f"the artifact is damaged: remove {path} and make it again")
        if sha256_file(member) != digest:
            raise ArtifactError(f"{member} has changed since it was written (its digest differs)",
                                f"the artifact is damaged: remove {path} and make it again")
    return Artifact(path, kind, record)


def cache_dir() -> Path:
    """Where fetched and derived files live: UNDERTOW_CACHE, else XDG_CACHE_HOME/undertow, else ~/.cache/undertow."""
    if chosen := os.environ.get("UNDERTOW_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "undertow"
