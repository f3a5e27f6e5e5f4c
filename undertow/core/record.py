"""The record of a run: what was asked, by which code, on which machine, in which time."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("undertow", "torch", "transformers", "transformer-lens", "sae-lens", "numpy", "safetensors")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result; absent ones are left out."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def git_revision() -> str:
    """Commit of the source tree that this code runs from, with "+dirty" if changed; "" outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        head = _git(root, "rev-parse", "HEAD")
        return head + ("+dirty" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def run_record(spec: dict[str, Any], seed: int, **facts: Any) -> dict[str, Any]:
    """What a manifest keeps of a run; `facts` are further JSON values (digests, figures, wall time)."""
    return {"spec": spec, "seed": seed, "git": git_revision(), "versions": package_versions(),
            "machine": platform.machine(), "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **facts}
