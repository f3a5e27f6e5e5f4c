"""Direct logit effect: what one latent writes straight into the logits, past every later layer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from undertow.core.errors import DictionaryError
from undertow.subjects.unembed import UnembedView


class TokenEffect(NamedTuple):
    """A token and the change of its logit, relative to the mean over the vocabulary, per unit of activation."""

    token_id: int
    effect: float


def logit_effect(direction: Float[Tensor, "d_model"], unembed: UnembedView) -> Float[Tensor, "vocab"]:
    """Change of every token's logit per unit of activation of the latent that writes `direction`.

    Formula: `e = W_U @ (gamma * (d - mean(d)))` for a LayerNorm, `e = W_U @ (gamma * d)` for an RMSNorm, then
    `e - mean(e)`, because adding one number to all logits changes no probability. Unit: logits times the final norm's
    scale, per unit of activation: the norm divides by the length of the residual stream, which differs from token to
    token, so this is exact up to one positive factor a token. Ranks within one latent mean something; sizes compare
    only between latents of one dictionary. Range: any real number, mean 0 over the vocabulary.

    Departs from the true effect in two ways: the scale of the norm is frozen (a direction along the residual stream
    changes it), and no later attention or MLP layer reads the direction. A soft cap of the logits is left out; it keeps
    the order of tokens at a time. This is the logit lens applied to a decoder row (nostalgebraist 2020; "logit
    weights" in Bricken et al. 2023), with the norm's gain and centring folded in.

    Raises DictionaryError if the direction is not as wide as the residual stream.
    """
    return logit_effects(direction[None], unembed)[0]


def logit_effects(directions: Float[Tensor, "k d_model"], unembed: UnembedView) -> Float[Tensor, "k vocab"]:
    """`logit_effect` of several directions at once. Raises DictionaryError as it does."""
    if directions.shape[-1] != unembed.W_U.shape[-1]:
        raise DictionaryError(f"the SAE writes {directions.shape[-1]} channels; the residual stream has "
                              f"{unembed.W_U.shape[-1]}", "only SAEs on the residual stream have a direct logit effect")
    written = directions.detach().to(unembed.W_U)
    if unembed.centred:
        written = written - written.mean(dim=-1, keepdim=True)
    effect = (unembed.gamma * written) @ unembed.W_U.T
    return effect.sub_(effect.mean(dim=-1, keepdim=True))


def promoted(effect: Float[Tensor, "vocab"], n: int) -> tuple[TokenEffect, ...]:
    """The `n` tokens whose logit rises most, largest rise first; of equal ones the lower id first."""
    return _first(torch.argsort(effect, descending=True, stable=True), effect, n)


def suppressed(effect: Float[Tensor, "vocab"], n: int) -> tuple[TokenEffect, ...]:
    """The `n` tokens whose logit falls most, largest fall first; of equal ones the lower id first."""
    return _first(torch.argsort(effect, stable=True), effect, n)


def _first(order: Tensor, effect: Tensor, n: int) -> tuple[TokenEffect, ...]:
    return tuple(TokenEffect(int(i), float(effect[i])) for i in order[:n])
