"""The subjects: the one door to TransformerLens and transformers, and the one place that edits a forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undertow.core.lazy import lazy_names

if TYPE_CHECKING:
    from undertow.subjects.load import load_subject
    from undertow.subjects.sampling import Generated, Sampling, generate
    from undertow.subjects.scoring import score
    from undertow.subjects.sites import Site
    from undertow.subjects.splicing import Edit, EditResult, Splice, splice
    from undertow.subjects.subject import Subject
    from undertow.subjects.tapping import tap

__all__ = ["Edit", "EditResult", "Generated", "Sampling", "Site", "Splice", "Subject", "generate", "load_subject",
           "score", "splice", "tap"]
__getattr__ = lazy_names(__name__, {
    "load_subject": "load", "Generated": "sampling", "Sampling": "sampling", "generate": "sampling", "score": "scoring",
    "Site": "sites", "Edit": "splicing", "EditResult": "splicing", "Splice": "splicing", "splice": "splicing",
    "Subject": "subject", "tap": "tapping",
})
