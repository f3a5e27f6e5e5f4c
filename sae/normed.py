"""Dictionaries that see every activation normalised by its own statistics (`layer_norm`, `constant_norm_rescale`).

sae-lens keeps the statistics of the last `encode` on the module, so that its `decode` depends on the order of calls. Here
nothing is kept. With x = σ·z + μ, z what the inner dictionary sees, and codes f(z),

    x̂ = σ·(f·W_dec + b_dec) + μ = (σ·f)·W_dec + σ·b_dec + μ,

so codes are given as σ·f, in the units of the activation itself: `directions` are then what one unit of a code adds, and an
edit x + Σ (a' − a)·d is the difference of two reconstructions, as for any other dictionary. Only the offset σ·b_dec + μ
needs the activation; `reconstruct` takes it from there, and decoding codes alone is refused.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionary import Codes, Dictionary, LinearDictionary, Provenance
from undertow.core.errors import DictionaryError

OwnNorm = Literal["layer_norm", "constant_norm_rescale"]
OWN_NORMS = ("layer_norm", "constant_norm_rescale")
EPSILON = 1e-5  # of sae-lens, which adds it to σ in encoding and not in decoding


class Normalised(NamedTuple):
    """z = (x − μ)/σ, with μ and σ of each token."""

    z: Float[Tensor, "token d_in"]
    mean: Float[Tensor, "token 1"]
    scale: Float[Tensor, "token 1"]


def normalise(x: Float[Tensor, "token d_in"], norm: OwnNorm) -> Normalised:
    """`layer_norm`: μ the mean over channels, σ the standard deviation (n − 1). `constant_norm_rescale`: μ = 0, σ = ‖x‖/√d."""
    if norm == "constant_norm_rescale":
        factor = x.shape[-1] ** 0.5 / x.norm(dim=-1, keepdim=True)
        return Normalised(x * factor, torch.zeros_like(factor), 1 / factor)
    mean = x.mean(dim=-1, keepdim=True)
    centred = x - mean
    scale = centred.std(dim=-1, keepdim=True)
    return Normalised(centred / (scale + EPSILON), mean, scale)


@final
@dataclass(frozen=True, eq=False)
class NormedDictionary:
    """A linear dictionary of normalised activations. Codes are in the units of the activations: σ·f."""

    inner: LinearDictionary
    norm: OwnNorm

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.inner.d_in

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.inner.d_sae

    @property
    def architecture(self) -> str:
        """Architecture in sae-lens' names."""
        return self.inner.architecture

    @property
    def provenance(self) -> Provenance:
        """Where it belongs."""
        return self.inner.provenance

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """Decoder rows as stored."""
        return self.inner.W_dec

    def encode(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        """Codes of activations, dense: σ times those of sae-lens."""
        seen = self._see(x)
        return self.inner.encode(seen.z) * seen.scale

    def encode_sparse(self, x: Float[Tensor, "token d_in"]) -> Codes:
        """Codes of activations, the non-zero ones only."""
        return _encode_sparse(self.inner, self._see(x))

    def latent_values(self, x: Float[Tensor, "token d_in"], latents: Int[Tensor, "k"]) -> Float[Tensor, "token k"]:
        """Codes of a few latents. Raises DictionaryError for an unknown latent."""
        seen = self._see(x)
        return self.inner.latent_values(seen.z, latents) * seen.scale

    def decode(self, f: Float[Tensor, "token d_sae"]) -> NoReturn:
        """Refused: raises DictionaryError."""
        raise _without_input(self.norm)

    def decode_codes(self, codes: Codes, n: int) -> NoReturn:
        """Refused: raises DictionaryError."""
        raise _without_input(self.norm)

    def directions(self, latents: Int[Tensor, "k"]) -> Float[Tensor, "k d_in"]:
        """What one unit of each latent adds to the reconstruction. Raises DictionaryError for an unknown latent."""
        return self.inner.directions(latents)

    def reconstruct(self, x: Float[Tensor, "token d_in"]) -> tuple[Float[Tensor, "token d_in"], Codes]:
        """Reconstruction of activations, and their codes."""
        seen = self._see(x)
        codes = _encode_sparse(self.inner, seen)
        offset = (seen.scale - 1) * self.inner.b_dec + seen.mean  # the inner dictionary adds b_dec once itself
        return self.inner.decode_codes(codes, len(x)) + offset, codes

    def to(self, device: torch.device | str) -> NormedDictionary:
        """The same dictionary on `device`."""
        return dataclasses.replace(self, inner=self.inner.to(device))

    def _see(self, x: Float[Tensor, "token d_in"]) -> Normalised:
        if x.shape[-1] != self.d_in:
            raise DictionaryError(f"activations of width {x.shape[-1]} given to an SAE of width {self.d_in}",
                                  "use the subject and the site that the SAE was trained on")
        return normalise(x.to(self.inner.b_dec), self.norm)


def linear_part(dictionary: LinearDictionary | NormedDictionary) -> LinearDictionary:
    """The dictionary of normalised activations inside, or the dictionary itself."""
    return dictionary.inner if isinstance(dictionary, NormedDictionary) else dictionary


def _encode_sparse(inner: LinearDictionary, seen: Normalised) -> Codes:
    codes = inner.encode_sparse(seen.z)
    return codes._replace(values=codes.values * seen.scale[codes.rows, 0])


def _without_input(norm: str) -> DictionaryError:
    return DictionaryError(f"an SAE with normalize_activations = {norm!r} needs each activation to decode: its codes alone do "
                           "not reconstruct", "use sae.reconstruct(dictionary, activations); edits by `directions` are exact")


def reconstruct(dictionary: Dictionary, x: Float[Tensor, "token d_in"]) -> tuple[Float[Tensor, "token d_in"], Codes]:
    """Reconstruction of activations by any dictionary, and their codes."""
    if isinstance(dictionary, NormedDictionary):
        return dictionary.reconstruct(x)
    codes = dictionary.encode_sparse(x)
    return dictionary.decode_codes(codes, len(x)), codes
