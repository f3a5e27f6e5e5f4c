"""Codes of activations that come again: one text under many recipes has the same activations where all of them edit."""

from __future__ import annotations

import hashlib
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary import Codes, Dictionary, known_latents
from undertow.core.recency import Recent

MOST_BYTES = 1 << 29


@final
class Recall:
    """`Dictionary.latent_values`, to the bit, that encodes the same activations once.

    What is kept is found by a digest of the activations, so that nothing need be known of where they come from; the last used
    is kept longest. An architecture that reads only the columns it is asked for is asked anew.

    Attributes:
        dictionary: whose codes they are.
        hits: calls that were answered from what is kept.
        misses: calls that had to encode.
    """

    def __init__(self, dictionary: Dictionary, most_bytes: int = MOST_BYTES) -> None:
        self.hits = self.misses = 0
        self.dictionary = dictionary
        self._kept: Recent[Codes] = Recent(most_bytes, _size)

    def latent_values(self, x: Float[Tensor, "token d_in"], latents: Int[Tensor, "k"]) -> Float[Tensor, "token k"]:
        """Codes of a few latents. Raises DictionaryError for an unknown latent."""
        if self.dictionary.architecture != "topk":
            return self.dictionary.latent_values(x, latents)
        wanted, place = known_latents(latents, self.dictionary.d_sae).unique(return_inverse=True)
        rows, columns, values = self._codes(x)
        column = torch.full((self.dictionary.d_sae,), -1, device=columns.device)
        column[wanted.to(columns.device)] = torch.arange(len(wanted), device=columns.device)
        at = column[columns]
        found = torch.zeros(len(x), len(wanted), dtype=values.dtype, device=values.device)
        found[rows[at >= 0], at[at >= 0]] = values[at >= 0]
        return found[:, place.to(found.device)]

    def _codes(self, x: Float[Tensor, "token d_in"]) -> Codes:
        key = hashlib.blake2b(x.contiguous().view(torch.uint8).numpy(force=True).data, digest_size=16,
                              person=str(x.dtype).encode()[:16]).digest()
        known = self._kept.get(key)
        if known is not None:
            self.hits += 1
            return known
        self.misses += 1
        codes = self.dictionary.encode_sparse(x)
        self._kept.put(key, codes)
        return codes


def _size(codes: Codes) -> int:
    return sum(tensor.nbytes for tensor in codes)
