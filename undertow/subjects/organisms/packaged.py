"""Opening organisms: the packaged ones, and folders of whole models and adapters that were trained here."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from undertow.core.errors import ArtifactError, SubjectError, near_matches
from undertow.core.storage import MANIFEST, open_artifact
from undertow.subjects.catalog import FETCHABLE, ORGANISMS, organism, packaged_folder
from undertow.subjects.subject import Subject

log = logging.getLogger(__name__)
KIND = "organism"
ADAPTER_CONFIG = "adapter_config.json"


def open_packaged(name: str) -> Path:
    """The folder of a packaged organism, every file of which has the digest that it was written with.

    Raises:
        SubjectError: no organism of that name, or this installation came without its weights.
        ArtifactError: a file is missing or changed.
    """
    if organism(name) is None:
        names = [entry.name for entry in ORGANISMS]
        raise SubjectError(f"unknown organism {name!r}", near_matches(name, names) or f"known: {', '.join(names)}")
    folder = packaged_folder(name)
    if not (folder / MANIFEST).is_file():
        raise SubjectError(f"the weights of {name} are not packaged with this installation",
                           f"train it: undertow subject train {name} --out runs/{name}")
    try:
        open_artifact(folder, KIND)
    except ArtifactError as error:
        raise ArtifactError(error.what, "the installation is damaged: install undertow again") from None
    return folder


def is_adapter(folder: Path) -> bool:
    """True for a folder in PEFT's format."""
    return (folder / ADAPTER_CONFIG).is_file()


def manifest_kind(folder: Path) -> str:
    """The kind that the manifest in `folder` states; "" if there is none that can be read."""
    return str(_json(folder / MANIFEST).get("kind", ""))


def record_of(folder: Path) -> dict[str, Any]:
    """The record of the run that made an organism's folder; empty for a folder that was not made here."""
    found = _json(folder / MANIFEST).get("record", {})
    return found if isinstance(found, dict) else {}


def organism_kind(name: str) -> str:
    """Whose gates apply to the subject called `name` (a known name or a folder): an organism's name, or "model"."""
    if organism(name):
        return name
    folder = Path(name).expanduser()
    if manifest_kind(folder) != KIND:
        return "model"
    return "hearth-smollm2" if is_adapter(folder) else str(record_of(folder).get("spec", {}).get("name", "model"))


def weights_of(name: str) -> str:
    """What the weights of the subject called `name` are, in words."""
    if organism(name):
        return "packaged with Undertow"
    folder = Path(name).expanduser()
    if manifest_kind(folder) == KIND:
        return "an adapter trained here" if is_adapter(folder) else "trained here"
    return "a local folder" if folder.is_dir() else "from the Hugging Face hub"


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def adapter_base(folder: Path) -> str:
    """The subject that the adapter in `folder` was trained over, by the name that `load_subject` takes.

    Raises SubjectError if the folder does not say.
    """
    base = record_of(folder).get("base") or _json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise SubjectError(f"{folder / ADAPTER_CONFIG} does not say which model the adapter was trained over",
                           "set base_model_name_or_path in it")
    return next((entry.name for entry in FETCHABLE if entry.hub == base), str(base))


def check_base(folder: Path, base: Subject) -> None:
    """Warn if the adapter was trained over other weights than those of `base`."""
    trained_over = record_of(folder).get("base_digest")
    if trained_over and trained_over != base.digest:
        log.warning("the adapter in %s was trained over other weights of %s (digest %s, and these have %s): what its card says "
                    "need not hold", folder, base.name, trained_over, base.digest)


def merge(base: Subject, folder: Path) -> PreTrainedModel:
    """A copy of the base with the adapter added into its weights: a plain model of the base's own class.

    Raises SubjectError if PEFT cannot read the folder, or if the adapter does not fit the base.
    """
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers by an old name
            adapted = PeftModel.from_pretrained(copy.deepcopy(base.hf_model), str(folder))
            merged = cast(PreTrainedModel, adapted.merge_and_unload(safe_merge=True))
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SubjectError(f"the adapter in {folder} cannot be added to {base.name}: {reason}",
                           "needed: adapter_config.json and adapter_model.safetensors, trained over that base") from error
    return merged
