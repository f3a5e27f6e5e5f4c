"""Undertow: sparse-autoencoder feature surgery on causal language models.

    from undertow import load_subject, sae, features, interventions, dashboards

These names are loaded when first used, so that `import undertow` costs no torch. `undertow.features` is the same module
object as the top-level package `features`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from undertow import _siblings

if TYPE_CHECKING:
    import dashboards as dashboards
    import features as features
    import interventions as interventions
    import sae as sae
    from undertow.subjects.load import load_subject as load_subject

__version__ = "0.1.0"
__all__ = ["__version__", "dashboards", "features", "interventions", "load_subject", "sae"]


def __getattr__(name: str) -> Any:
    if name in _siblings.SIBLINGS:
        return _siblings.sibling(name)
    if name == "load_subject":
        from undertow.subjects.load import load_subject

        return load_subject
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


def _is_the_command() -> bool:
    """True while Python starts `undertow` or `python -m undertow`: `main` checks, and answers without a traceback."""
    return bool(sys.argv) and Path(sys.argv[0]).stem in ("undertow", "-m")


if not _is_the_command():
    _siblings.check_siblings()
