"""Which stores a folder holds, what they are called in addresses, and what to type where there is none."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dashboards.layout import KIND
from dashboards.store import FeatureStore, open_feature_store, slug
from undertow.core.errors import UserError
from undertow.core.storage import MANIFEST

DEPTH = 3


class Collection(NamedTuple):
    """Stores by their name in addresses; `trouble` has what could not be opened, `bare` SAE folders without a store."""

    stores: dict[str, FeatureStore]
    trouble: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()


def is_store(folder: Path) -> bool:
    """Whether a folder says that it is a feature store (whatever its state)."""
    return kind_of(folder) == KIND


def collect(folder: Path) -> Collection:
    """Every store in `folder` and up to three levels below it, in the order of their paths; damaged ones are reported."""
    opened: list[FeatureStore] = []
    trouble: list[str] = []
    bare: list[str] = []
    for inside in folders(folder, DEPTH):
        if is_store(inside):
            try:
                opened.append(open_feature_store(inside))
            except UserError as error:
                trouble.append(str(error))
        elif (inside / "cfg.json").is_file() and (inside / "sae_weights.safetensors").is_file():
            bare.append(str(inside))
    shown = {store.record["spec"]["sae"] for store in opened}
    return Collection(named(opened), tuple(trouble), tuple(name for name in bare if name not in shown))


def named(stores: list[FeatureStore]) -> dict[str, FeatureStore]:
    """Stores by address: the SAE's name, with the folder's added where two have the same, then a number."""
    found: dict[str, FeatureStore] = {}
    names = [slug(store.name) for store in stores]
    for name, store in zip(names, stores, strict=True):
        key = name if names.count(name) == 1 else f"{name}-{slug(store.path.name)}"
        free = next(candidate for number in range(1, len(stores) + 2)
                    if (candidate := key if number == 1 else f"{key}-{number}") not in found)
        found[free] = store
    return found


def advice(sae: str) -> str:
    """The command that builds a store of an SAE."""
    return shlex.join(["undertow", "dashboard", "build", sae, "--out", sae.rstrip("/") + "-dashboard"])


def folders(folder: Path, depth: int) -> Iterator[Path]:
    """`folder` and what lies up to `depth` levels below it, by path; hidden folders, links and the inside of stores apart."""
    yield folder
    if depth == 0 or is_store(folder):
        return
    try:
        inside = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in inside:
        if not name.startswith("."):
            yield from folders(folder / name, depth - 1)


def kind_of(folder: Path) -> str:
    """The kind of artifact that a folder says it is (whatever its state); "" if none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return str(manifest["kind"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
