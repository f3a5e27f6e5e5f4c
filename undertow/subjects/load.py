"""Opening a subject: a known name, a local folder (a model or an adapter), or a Hugging Face name."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from undertow.core.errors import ArtifactError, SubjectError, near_matches
from undertow.core.storage import MANIFEST, open_artifact
from undertow.subjects.catalog import FETCHABLE, ORGANISMS, fetchable, organism, subject_folder
from undertow.subjects.organisms.packaged import KIND, adapter_base, check_base, is_adapter, manifest_kind, merge, open_packaged
from undertow.subjects.subject import Subject

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_subject(name_or_path: str, device: str = "auto", dtype: str = "float32") -> Subject:
    """Open a model for reading and surgery.

    Args:
        name_or_path: a known name (`undertow subject list`), a local folder in Hugging Face format (an adapter's folder is
            opened over its base), or a Hugging Face name. Code from a model repository is never run.
        device: `cpu`, `cuda`, `cuda:1`, ... or `auto` (CUDA if there is one).
        dtype: `float32`, `bfloat16`, `float16` or `float64`.

    Raises:
        SubjectError: unknown name, unreadable folder, missing weights, or an architecture that cannot be tapped.
        ArtifactError: a fetched or packaged subject was changed since it was written.
    """
    if dtype not in DTYPES:
        raise SubjectError(f"unknown dtype {dtype!r}", f"choose one of {', '.join(DTYPES)}")
    source = _source(name_or_path)
    if is_adapter(Path(source)):
        tokenizer, model = _adapted(name_or_path, Path(source))
        model = model.to(DTYPES[dtype])  # pyright: ignore[reportArgumentType]
    else:
        tokenizer, model = _whole(name_or_path, source, dtype)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        model = model.to(chosen).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]  (its stub lacks `to`)
    except (RuntimeError, AssertionError) as error:
        raise SubjectError(f"device {device!r} cannot be used: {str(error).splitlines()[0]}", "try --device cpu") from None
    subject = Subject(name_or_path, source, model, tokenizer)
    _ = subject.blocks  # an architecture that cannot be tapped is refused here and not hours later
    return subject


def _whole(name: str, source: str, dtype: str) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    try:
        return AutoTokenizer.from_pretrained(source), AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype])
    except Exception as error:
        raise _unreadable(name, source, error) from error


def _adapted(name: str, folder: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """The base with the adapter added into its weights, in float32 (the sum is rounded once, if at all)."""
    base_name = adapter_base(folder)
    if fetchable(base_name) and not subject_folder(base_name).exists():
        raise SubjectError(f"{name} is an adapter over {base_name}, which has not been fetched yet",
                           f"undertow subject fetch {base_name}")
    base = load_subject(base_name, "cpu")
    check_base(folder, base)
    return base.tokenizer, merge(base, folder)


def _source(name: str) -> str:
    if organism(name):
        return str(open_packaged(name))
    if known := fetchable(name):
        folder = subject_folder(name)
        if not folder.exists():
            raise SubjectError(f"{name} has not been fetched yet", f"undertow subject fetch {name}")
        try:
            open_artifact(folder, "subject")
        except ArtifactError as error:
            raise ArtifactError(error.what, f"undertow subject fetch {known.name}") from None
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / MANIFEST).is_file() and manifest_kind(path) == KIND:
            open_artifact(path, KIND)
        if is_adapter(path):
            return str(path.resolve())
        if not (path / "config.json").is_file():
            raise SubjectError(f"{path} is not a model folder: it has no config.json")
        return str(path.resolve())
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise SubjectError(f"no such model folder: {name}")
    return name


def _unreadable(name: str, source: str, error: Exception) -> SubjectError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if Path(source).is_dir():
        kind = _model_type(Path(source))
        return SubjectError(f"cannot open the model in {name}{f' (model_type {kind!r})' if kind else ''}: {reason}",
                            "needed: config.json, *.safetensors and tokenizer files of a decoder-only language model")
    known = near_matches(name, [entry.name for entry in (*FETCHABLE, *ORGANISMS)])
    return SubjectError(f"unknown model {name!r}: it is not a known subject, not a folder, and Hugging Face's loader "
                        f"says: {reason}", known or "known subjects: undertow subject list")


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", ""))
    except (OSError, ValueError):
        return ""


def variant(subject_name: str) -> str:
    """Which weights a fetched subject has ("Q4_1, dequantised", ...), or an adapter's base; "" for any other model."""
    if (entry := organism(subject_name)) and entry.base:
        return f"adapter over {entry.base} ({variant(entry.base)})"
    folder = subject_folder(subject_name)
    if fetchable(subject_name) is None or not (folder / MANIFEST).is_file():
        return ""
    return str(json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["record"].get("variant", ""))
