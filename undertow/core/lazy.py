"""Public names of a package, imported when first used, so that importing the package costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level `__getattr__` for `package`.

    Args:
        package: the package's `__name__`.
        homes: public name → the module of the package that defines it. A name that is also a module's is refused: once
            that module is imported, Python would give the module under this name.
    """
    clashes = sorted(set(homes) & set(homes.values()))
    if clashes:
        raise ValueError(f"{package} has both a name and a module called {', '.join(clashes)}")

    def get(name: str) -> Any:
        if name in homes:
            return getattr(import_module(f"{package}.{homes[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return get
