"""The four packages that belong to Undertow and have everyday names: found beside it, or refused by name.

`sae`, `features`, `interventions` and `dashboards` are top-level packages. A folder of the same name that comes earlier
on `sys.path` (in a notebook: any `features/` of the user's own) would be imported in place of ours, so it is looked for
when `undertow` is imported, and named.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from undertow.core.errors import UserError

SIBLINGS = ("sae", "features", "interventions", "dashboards")
_HOME = Path(__file__).resolve().parents[1]


class ShadowedError(UserError, ImportError):
    """Another folder or module has the name of one of our packages and would be imported in its place."""


def check_siblings() -> None:
    """Raise ShadowedError if importing one of our four packages would give, or has given, something else."""
    for name in SIBLINGS:
        _find(name)


def sibling(name: str) -> ModuleType:
    """Our package `name`: the same module object that `import name` gives. Raises ShadowedError."""
    _find(name)
    return import_module(name)


def _find(name: str) -> None:
    loaded = sys.modules.get(name)
    places = _places(loaded.__spec__ if loaded is not None else find_spec(name))
    ours = _HOME / name
    if not places:
        raise ShadowedError(f"Undertow's package {name!r} ({ours}) cannot be imported", f"put {_HOME} on sys.path")
    if places[0] != ours:
        raise ShadowedError(f"{places[0]} has the name of Undertow's package {name!r} ({ours}) and hides it",
                            f"rename it, or work in a folder that has no {name}/ (then restart Python)")


def _places(spec: ModuleSpec | None) -> list[Path]:
    """Folders of a package, or the file of a plain module."""
    if spec is None:
        return []
    if spec.submodule_search_locations is not None:
        return [Path(place).resolve() for place in spec.submodule_search_locations]
    return [Path(spec.origin).resolve()] if spec.origin else []
