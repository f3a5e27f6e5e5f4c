"""TransformerLens' view of a subject, for circuit work and as the independent reference of our sites."""

from __future__ import annotations

from transformer_lens.model_bridge import TransformerBridge

from undertow.subjects.subject import Subject


def bridge(subject: Subject) -> TransformerBridge:
    """A TransformerBridge with canonical hook names over a model of its own, read from the same source.

    Beware: on a bridge a misspelt hook name runs silently unchanged. `Subject.site` checks names.
    """
    return TransformerBridge.boot_transformers(subject.source, device=str(subject.device), dtype=subject.hf_model.dtype)
