"""Sparse codes of a text: which latents fire on which activation, in one pass with bounded memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.dictionary import Codes, Dictionary, LinearDictionary, TopK
from undertow.core.errors import DictionaryError, NumericsError
from undertow.core.seeds import generator

CHUNK = 2048
_PROBES = 64
Progress = Callable[[int, int], None]
"""Called with (done, in all)."""


@runtime_checkable
class Activations(Protocol):
    """What the screens of this room read of an activation store."""

    @property
    def n(self) -> int:
        """Number of activations."""
        ...

    @property
    def d_in(self) -> int:
        """Width of one activation."""
        ...

    @property
    def record(self) -> dict[str, Any]:
        """Record of the run that made the store."""
        ...

    @property
    def tokens(self) -> Int[Tensor, "row pos"]:
        """Token ids of the rows that the activations belong to."""
        ...

    @property
    def measured(self) -> Bool[Tensor, "row pos"]:
        """True where the store holds the activation of a token."""
        ...

    @property
    def where(self) -> Int[Tensor, "n 2"]:
        """(row, pos) of every activation, ascending."""
        ...

    def chunks(self, size: int) -> Iterator[tuple[int, Float[Tensor, "token d_in"]]]:
        """All activations in order, as (index of the first one, at most `size` activations)."""
        ...


def scan_codes(dictionary: Dictionary, store: Activations, chunk: int = CHUNK) -> Iterator[tuple[int, Codes]]:
    """Codes of every activation of `store`, in order, as (index of the first activation, codes of the chunk).

    `codes.rows` counts from the first activation of the chunk. Memory: one chunk's dense encoding,
    `chunk * d_sae` numbers, whatever the length of the text.

    Raises:
        DictionaryError: the dictionary reads activations of another width.
        NumericsError: the dictionary turns an activation into NaN or infinity; the activation is named.
    """
    if dictionary.d_in != store.d_in:
        raise DictionaryError(f"the SAE reads activations of width {dictionary.d_in}; these have width {store.d_in}",
                              "harvest at the site and from the subject that the SAE was trained on")
    for first, activations in store.chunks(chunk):
        with torch.inference_mode():
            codes = dictionary.encode_sparse(activations)
        if not bool(torch.isfinite(codes.values).all()):
            bad = first + int(codes.rows[~torch.isfinite(codes.values)][0])
            raise NumericsError(f"activation {bad} has a NaN or infinite code", "the SAE's weights may be damaged")
        yield first, codes


def dictionary_digest(dictionary: Dictionary) -> str:
    """16 hex characters over all that a dictionary computes with: architecture, settings and weights.

    Of a dictionary that is not linear, whose encoder we do not know, the decoder and the codes of fixed random probes
    of many sizes stand for the weights.
    """
    if isinstance(dictionary, LinearDictionary):
        top_k = dictionary.activation if isinstance(dictionary.activation, TopK) else None
        settings = f"{dictionary.subtract_b_dec} {top_k}"
        tensors = dictionary.tensors()
    else:
        settings, tensors = "", {"W_dec": dictionary.W_dec, **_probe(dictionary)._asdict()}
    digest = hashlib.sha256(f"{dictionary.architecture} {settings}".encode())
    for name, tensor in tensors.items():
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _probe(dictionary: Dictionary) -> Codes:
    sizes = torch.logspace(-2, 4, _PROBES)[:, None]
    with torch.inference_mode():
        return dictionary.encode_sparse(torch.randn(_PROBES, dictionary.d_in, generator=generator(0, "probe")) * sizes)


def dictionary_name(path_or_name: str, dictionary: Dictionary) -> str:
    """How a dictionary is called in the ids of its features: its packaged or released name, for a folder its digest."""
    return dictionary_digest(dictionary)[:8] if Path(path_or_name).exists() else path_or_name
