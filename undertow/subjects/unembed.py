"""The way out of the residual stream: final norm and unembedding, read off the model by probing it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from undertow.core.errors import SubjectError
from undertow.subjects.subject import Subject, find_blocks


class UnembedView(NamedTuple):
    """Final norm and unembedding in one form for all architectures.

    Attributes:
        gamma: gain of the final norm per channel (Gemma's "1 + weight" included).
        centred: True for LayerNorm (the mean over channels is removed first), False for RMSNorm.
        W_U: unembedding matrix; the logits are `W_U @ norm(x)`, before any soft cap.
    """

    gamma: Float[Tensor, "d_model"]
    centred: bool
    W_U: Float[Tensor, "vocab d_model"]


def final_norm(subject: Subject) -> nn.Module:
    """The norm after the last block. Raises SubjectError if there is not exactly one candidate."""
    owner, blocks = find_blocks(subject.hf_model, subject.name)
    found = [child for child in owner.children() if child is not blocks
             and [tuple(p.shape) for n, p in child.named_parameters() if n == "weight"] == [(subject.d_model,)]]
    if len(found) != 1:
        raise SubjectError(f"{subject.name}: found {len(found)} candidates for the final norm, need exactly 1")
    return found[0]


def final_norm_and_unembed(subject: Subject) -> UnembedView:
    """Gain, kind and unembedding of `subject`; the gain is measured on inputs whose norm is known."""
    norm = final_norm(subject)
    head = subject.hf_model.get_output_embeddings()
    if head is None:
        raise SubjectError(f"{subject.name} has no unembedding")
    weight = head.weight
    d_model = subject.d_model
    signs = torch.ones(d_model, dtype=weight.dtype, device=weight.device)
    signs[1::2] = -1  # mean 0 and mean square 1 (for even widths), so that both kinds of norm leave it as it is
    with torch.no_grad():
        offset = norm(torch.zeros_like(signs))  # the bias of a LayerNorm; zero for RMSNorm
        gamma = (norm(signs) - offset) * signs
        shifted = (norm(signs + 0.5) - offset) * signs
    centred = bool(torch.allclose(shifted, gamma, atol=1e-3, rtol=1e-3))
    return UnembedView(gamma.detach().float(), centred, weight.detach().float())
