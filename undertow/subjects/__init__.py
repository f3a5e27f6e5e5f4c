"""The subjects: the one door to TransformerLens and transformers, and the one place that edits a forward pass."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from undertow.subjects.load import load_subject
    from undertow.subjects.sampling import Generated, Sampling, generate
    from undertow.subjects.scoring import score
    from undertow.subjects.sites import Site
    from undertow.subjects.splicing import Edit, EditResult, Splice, splice
    from undertow.subjects.subject import Subject
    from undertow.subjects.tapping import tap

_HOMES = {"Generated": "sampling", "Sampling": "sampling", "generate": "sampling", "load_subject": "load",
          "score": "scoring", "Site": "sites", "Edit": "splicing", "EditResult": "splicing", "Splice": "splicing",
          "splice": "splicing", "Subject": "subject", "tap": "tapping"}
__all__ = ["Edit", "EditResult", "Generated", "Sampling", "Site", "Splice", "Subject", "generate", "load_subject",
           "score", "splice", "tap"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
