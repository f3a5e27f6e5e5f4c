"""Artifact directories: complete or absent, and never changed unnoticed."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from undertow.core.errors import ArtifactError, StorageError
from undertow.core.storage import (
    cache_dir,
    create_artifact,
    open_artifact,
    refuse_existing,
    require_space,
    sha256_file,
    write_json,
    write_text,
)


def make(path: Path, **files: str) -> Path:
    with create_artifact(path, "sample", {"seed": 7}) as work:
        for name, text in (files or {"a.txt": "abc"}).items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text)
    return path


def test_round_trip(tmp_path: Path) -> None:
    with create_artifact(tmp_path / "deep" / "er" / "run", "sample", {"seed": 7, "spec": {"k": 2}}) as work:
        (work / "inner").mkdir()
        (work / "inner" / "a.txt").write_text("abc")
    opened = open_artifact(tmp_path / "deep" / "er" / "run", "sample")
    assert opened.kind == "sample"
    assert opened.record == {"seed": 7, "spec": {"k": 2}}
    assert (opened.path / "inner" / "a.txt").read_text() == "abc"
    manifest = json.loads((opened.path / "manifest.json").read_text())
    # SHA-256 of "abc", from FIPS 180-2 appendix B.1
    assert manifest["files"] == {"inner/a.txt": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    assert oct(opened.path.stat().st_mode & 0o777) == "0o755"


def test_nothing_but_the_artifact_is_left(tmp_path: Path) -> None:
    make(tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("boom", [RuntimeError("boom"), KeyboardInterrupt()])
def test_nothing_is_left_after_an_exception(tmp_path: Path, boom: BaseException) -> None:
    with pytest.raises(type(boom)), create_artifact(tmp_path / "run", "sample", {}) as work:
        (work / "half.bin").write_bytes(b"x" * 1000)
        raise boom
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_json_cannot_hold_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON"), create_artifact(tmp_path / "run", "x", {"fvu": float("nan")}):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run", **{"a.txt": "abc", "b.txt": "def"})
    (run / "b.txt").write_text("dEf")
    with pytest.raises(ArtifactError, match=r"b\.txt has changed") as caught:
        open_artifact(run, "sample")
    assert f"remove {run}" in caught.value.hint


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    (run / "a.txt").unlink()
    with pytest.raises(ArtifactError, match=r"a\.txt is missing"):
        open_artifact(run, "sample")


def test_absent_folder_absent_manifest(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        open_artifact(tmp_path / "no", "sample")
    run = make(tmp_path / "run")
    (run / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        open_artifact(run, "sample")


@pytest.mark.parametrize("keep", [0, 1, 40, -3])
def test_truncated_manifest(tmp_path: Path, keep: int) -> None:
    run = make(tmp_path / "run")
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text[:keep])
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_artifact(run, "sample")


@pytest.mark.parametrize("text", ["[]", '"x"', "3", '{"kind": "sample", "schema": 1, "files": 3, "record": {}}',
                                  '{"kind": "sample", "schema": 1, "files": {"a.txt": 5}, "record": []}'])
def test_manifest_of_another_shape(tmp_path: Path, text: str) -> None:
    run = make(tmp_path / "run")
    (run / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match="cannot be read"):
        open_artifact(run, "sample")


def test_a_manifest_cannot_point_outside(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    (tmp_path / "outside.txt").write_text("x")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"]["../outside.txt"] = sha256_file(tmp_path / "outside.txt")
    write_json(run / "manifest.json", manifest)
    with pytest.raises(ArtifactError, match=r"outside\.txt"):
        open_artifact(run, "sample")


def test_another_kind_and_another_schema(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(ArtifactError, match="kind 'sample', not 'subject'"):
        open_artifact(run, "subject")
    manifest = json.loads((run / "manifest.json").read_text())
    write_json(run / "manifest.json", {**manifest, "schema": 99})
    with pytest.raises(ArtifactError, match="schema 99"):
        open_artifact(run, "sample")


def test_an_existing_folder_is_never_overwritten(tmp_path: Path) -> None:
    run = make(tmp_path / "run")
    with pytest.raises(ArtifactError, match="not empty") as caught, create_artifact(run, "sample", {}):
        pytest.fail("the body must not run")
    assert f"rm -r {run}" in caught.value.hint
    assert (run / "a.txt").read_text() == "abc"
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="not empty"):
        refuse_existing(tmp_path / "file")


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert open_artifact(make(tmp_path / "run"), "sample").record == {"seed": 7}


def test_write_text_replaces_whole(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "one")
    write_text(tmp_path / "a.txt", "two")
    assert (tmp_path / "a.txt").read_text() == "two"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.txt", float("inf"))
    assert (tmp_path / "a.txt").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_require_space_states_both_figures(tmp_path: Path) -> None:
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(StorageError, match=r"needs 1000000000\.00 GB and the disk has"):
        require_space(tmp_path / "not" / "yet", 10**18)


FULL_DISK = """
    import resource, signal, sys
    from pathlib import Path
    import numpy, safetensors.numpy
    from undertow.core.errors import StorageError
    from undertow.core.storage import create_artifact
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    out, way = Path(sys.argv[1]), sys.argv[2]
    try:
        with create_artifact(out, "sample", {}) as work:
            if way == "plain":
                (work / "big.bin").write_bytes(bytes(1_000_000))
            else:
                safetensors.numpy.save_file({"x": numpy.zeros(1_000_000)}, work / "big.safetensors")
    except StorageError as error:
        sys.exit(f"refused: {error}")
"""


@pytest.mark.parametrize("way", ["plain", "safetensors"])
def test_full_disk(tmp_path: Path, way: str) -> None:
    """The system's own limit on file size stands for the full disk: the same errno family, and really raised."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL_DISK), str(tmp_path / "run"), way],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"refused: cannot write {tmp_path / 'run'}: file too large")
    assert "GB free there" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, undertow_cache: Path) -> None:
    assert cache_dir() == undertow_cache
    monkeypatch.delenv("UNDERTOW_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_dir() == Path("/somewhere/undertow")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ann")
    assert cache_dir() == Path("/home/ann/.cache/undertow")
