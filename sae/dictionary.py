"""Sparse autoencoders as values: weights, one of four activations, and where they belong.

    pre  = (x − b_dec)·W_enc + b_enc            (x itself where `subtract_b_dec` is off)
    f    = activation(pre)
    x̂    = f·W_dec + b_dec                      (f / ‖W_dec[j]‖ where a TopK rescales by decoder norm)

The arithmetic is that of sae-lens' inference SAEs, operation for operation, so that codes are equal to theirs.
Nothing here reads or writes files; see `sae.formats`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, assert_never, final, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Int64
from torch import Tensor

from undertow.core.errors import DictionaryError, NumericsError

UNKNOWN_CONTEXT = 256  # tokens a row, where an SAE does not say on how many it was trained


class Codes(NamedTuple):
    """Active latents in coordinate form: entry i says that latent `latents[i]` is `values[i]` ≠ 0 on token `rows[i]`.

    Sorted by row, and by latent within a row.
    """

    rows: Int64[Tensor, "n"]
    latents: Int64[Tensor, "n"]
    values: Float[Tensor, "n"]


@final
@dataclass(frozen=True)
class Provenance:
    """Where a dictionary belongs.

    Attributes:
        model_name: the model whose activations it reads; "" if it does not say.
        hook_name: the site in TransformerLens' names; "" if it does not say.
        context_size: tokens a row in training.
        prepend_bos: whether every row began with the model's BOS token.
        extra: further JSON values of ours (text, seed, figures, `subject_digest`).
    """

    model_name: str
    hook_name: str
    context_size: int
    prepend_bos: bool
    extra: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def unknown(cls) -> Provenance:
        """Of a dictionary that does not say where it belongs."""
        return cls("", "", UNKNOWN_CONTEXT, True)


@final
@dataclass(frozen=True)
class TopK:
    """Keep the `k` largest pre-activations of a token, if positive (Makhzani & Frey 2013; Gao et al. 2024).

    With `rescale_by_decoder_norm` pre-activation j is multiplied by ‖W_dec[j]‖ before the choice, and the code is
    divided by it in decoding.
    """

    k: int
    rescale_by_decoder_norm: bool = False


@final
@dataclass(frozen=True, eq=False)
class JumpReLU:
    """Keep what is positive and strictly above the latent's own threshold (Rajamanoharan et al. 2024)."""

    threshold: Float[Tensor, "d_sae"]


@final
@dataclass(frozen=True)
class ReLU:
    """Keep what is positive; sae-lens calls this architecture `standard`."""


@final
@dataclass(frozen=True, eq=False)
class Gated:
    """Keep exp(r_mag)·(x − b_dec)·W_enc + b_mag, if positive, where the pre-activation is (Rajamanoharan et al. 2024).

    The dictionary's `b_enc` is the bias of the gate (sae-lens' `b_gate`).
    """

    b_mag: Float[Tensor, "d_sae"]
    r_mag: Float[Tensor, "d_sae"]


Activation = TopK | JumpReLU | ReLU | Gated


@runtime_checkable
class Dictionary(Protocol):
    """A sparse autoencoder that reads and writes one site."""

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        ...

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        ...

    @property
    def architecture(self) -> str:
        """Architecture in sae-lens' names."""
        ...

    @property
    def provenance(self) -> Provenance:
        """Where it belongs."""
        ...

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """Decoder rows as stored; see `directions` for their effect."""
        ...

    def encode(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        """Codes of activations, dense."""
        ...

    def encode_sparse(self, x: Float[Tensor, "token d_in"]) -> Codes:
        """Codes of activations, the non-zero ones only."""
        ...

    def latent_values(self, x: Float[Tensor, "token d_in"], latents: Int[Tensor, "k"]) -> Float[Tensor, "token k"]:
        """Codes of a few latents."""
        ...

    def decode(self, f: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_in"]:
        """Reconstruction from dense codes."""
        ...

    def decode_codes(self, codes: Codes, n: int) -> Float[Tensor, "n d_in"]:
        """Reconstruction of `n` tokens from sparse codes."""
        ...

    def directions(self, latents: Int[Tensor, "k"]) -> Float[Tensor, "k d_in"]:
        """What one unit of each latent adds to the reconstruction."""
        ...

    def to(self, device: torch.device | str) -> Dictionary:
        """The same dictionary on `device`."""
        ...


@final
@dataclass(frozen=True, eq=False)
class LinearDictionary:
    """A dictionary with a linear encoder and decoder. The weights are checked once and never change.

    Inputs are cast and moved to the weights' type and device. Only floating inputs of width d_in are taken
    (DictionaryError otherwise).

    Raises:
        DictionaryError: shapes that do not fit each other, or k outside 1..d_sae.
        NumericsError: NaN or infinity, naming the tensor.
    """

    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, "d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, "d_in"]
    activation: Activation
    provenance: Provenance
    subtract_b_dec: bool = True

    def __post_init__(self) -> None:
        check_weights(self.tensors(), self.activation)

    @property
    def d_in(self) -> int:
        """Width of an activation."""
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[1]

    @property
    def architecture(self) -> str:
        """`topk`, `jumprelu`, `standard` or `gated`."""
        match self.activation:
            case TopK():
                return "topk"
            case JumpReLU():
                return "jumprelu"
            case ReLU():
                return "standard"
            case Gated():
                return "gated"
            case _ as never:
                assert_never(never)

    def tensors(self) -> dict[str, Tensor]:
        """Every weight by its name in sae-lens' files."""
        named = {"W_enc": self.W_enc, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}
        if isinstance(self.activation, JumpReLU):
            named["threshold"] = self.activation.threshold
        if isinstance(self.activation, Gated):
            named["b_gate"] = named.pop("b_enc")
            named |= {"b_mag": self.activation.b_mag, "r_mag": self.activation.r_mag}
        return named

    def pre_activations(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        """(x − b_dec)·W_enc + b_enc, before any rescaling by decoder norm."""
        return (self._centred(x) @ self.W_enc).add_(self.b_enc)

    def encode(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        """Codes of activations, dense: ≥ 0, in the units of the decoder rows."""
        if not isinstance(self.activation, TopK):
            return _rectify(self._centred(x), self.W_enc, self.b_enc, self.activation)
        pre = self.pre_activations(x)
        values, latents = _top_k(pre, self.W_dec, self.activation)
        return torch.zeros_like(pre).scatter_(-1, latents, values)

    def encode_sparse(self, x: Float[Tensor, "token d_in"]) -> Codes:
        """Codes of activations, the non-zero ones only.

        TopK needs one dense tensor (the pre-activations); the others need the dense code too. NaN inputs give NaN
        codes, so that they can be named.
        """
        if not isinstance(self.activation, TopK):
            return sparse_codes(self.encode(x))
        values, latents = _top_k(self.pre_activations(x), self.W_dec, self.activation)
        latents, order = latents.sort(dim=-1)
        values = values.gather(-1, order)
        rows, places = (values != 0).nonzero(as_tuple=True)
        return Codes(rows, latents[rows, places], values[rows, places])

    def latent_values(self, x: Float[Tensor, "token d_in"], latents: Int[Tensor, "k"]) -> Float[Tensor, "token k"]:
        """Codes of a few latents: `encode(x)[:, latents]`.

        Reads only their encoder columns, except for TopK, where every latent has a say in which ones fire. The product
        has another shape than `encode`'s, so the last bits may differ. Raises DictionaryError for an unknown latent.
        """
        latents = known_latents(latents, self.d_sae).to(self.b_dec.device)
        if isinstance(self.activation, TopK):
            return self.encode(x)[:, latents]
        activation = _mapped(self.activation, lambda tensor: tensor[latents])
        return _rectify(self._centred(x), self.W_enc[:, latents], self.b_enc[latents], activation)

    def decode(self, f: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_in"]:
        """Reconstruction from dense codes: f·W_dec + b_dec."""
        f = f.to(self.b_dec)
        if _rescaled(self.activation):
            f = f * (1 / self.W_dec.norm(dim=-1))
        return f @ self.W_dec + self.b_dec

    def decode_codes(self, codes: Codes, n: int) -> Float[Tensor, "n d_in"]:
        """Reconstruction of `n` tokens from sparse codes, reading only the active decoder rows.

        Raises ValueError if the codes are not sorted by row or name a row outside 0..n−1.
        """
        rows, latents = codes.rows.to(self.b_dec.device), codes.latents.to(self.b_dec.device)
        if len(rows) and (int(rows[0]) < 0 or int(rows[-1]) >= n or bool((rows[1:] < rows[:-1]).any())):
            raise ValueError(f"codes must be sorted by row and lie in rows 0 to {n - 1}")
        values = codes.values.to(self.b_dec)
        if _rescaled(self.activation):
            values = values * (1 / self.W_dec.norm(dim=-1))[latents]
        counts = torch.bincount(rows, minlength=n)
        starts = counts.cumsum(0) - counts
        return F.embedding_bag(latents, self.W_dec, starts, mode="sum", per_sample_weights=values) + self.b_dec

    def directions(self, latents: Int[Tensor, "k"]) -> Float[Tensor, "k d_in"]:
        """What one unit of each latent adds to the reconstruction: its decoder row, at norm 1 where TopK rescales.

        Raises DictionaryError for an unknown latent.
        """
        rows = self.W_dec[known_latents(latents, self.d_sae).to(self.b_dec.device)]
        return rows / rows.norm(dim=-1, keepdim=True) if _rescaled(self.activation) else rows

    def to(self, device: torch.device | str) -> LinearDictionary:
        """The same dictionary on `device`."""
        return with_weights(self, lambda tensor: tensor.to(device))

    def _centred(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_in"]:
        if x.shape[-1] != self.d_in:
            raise DictionaryError(f"activations of width {x.shape[-1]} given to an SAE of width {self.d_in}",
                                  "use the subject and the site that the SAE was trained on")
        x = x.to(self.b_dec)
        return x - self.b_dec if self.subtract_b_dec else x


def _rescaled(activation: Activation) -> bool:
    return isinstance(activation, TopK) and activation.rescale_by_decoder_norm


def _top_k(pre: Float[Tensor, "token d_sae"], W_dec: Float[Tensor, "d_sae d_in"],
           activation: TopK) -> tuple[Float[Tensor, "token k"], Int64[Tensor, "token k"]]:
    """Values and latents of the k largest pre-activations; `pre` is used up."""
    if activation.rescale_by_decoder_norm:
        pre = pre.mul_(W_dec.norm(dim=-1))
    values, latents = torch.topk(pre, activation.k, dim=-1, sorted=False)
    return values.relu(), latents


def with_weights(dictionary: LinearDictionary, change: Callable[[Tensor], Tensor]) -> LinearDictionary:
    """The same dictionary with every weight changed alike: moved, or rounded."""
    named = {name: change(getattr(dictionary, name)) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return dataclasses.replace(dictionary, **named, activation=_mapped(dictionary.activation, change))


def _mapped(activation: Activation, change: Callable[[Tensor], Tensor]) -> Activation:
    match activation:
        case JumpReLU():
            return JumpReLU(change(activation.threshold))
        case Gated():
            return Gated(change(activation.b_mag), change(activation.r_mag))
        case _:
            return activation


def _rectify(centred: Float[Tensor, "token d_in"], W_enc: Float[Tensor, "d_in k"], b_enc: Float[Tensor, "k"],
             activation: Activation) -> Float[Tensor, "token k"]:
    """Codes of some latents, each by itself: any activation but TopK."""
    pre = (centred @ W_enc).add_(b_enc)
    if isinstance(activation, JumpReLU):
        return pre.relu() * (pre > activation.threshold).to(pre.dtype)
    if isinstance(activation, Gated):
        return (pre > 0).to(pre.dtype) * (centred @ (W_enc * activation.r_mag.exp()) + activation.b_mag).relu()
    return pre.relu()


def sparse_codes(f: Float[Tensor, "token d_sae"]) -> Codes:
    """The non-zero entries of dense codes."""
    rows, latents = f.nonzero(as_tuple=True)
    return Codes(rows, latents, f[rows, latents])


def known_latents(latents: Int[Tensor, "k"], d_sae: int) -> Int64[Tensor, "k"]:
    """`latents` as indices. Raises DictionaryError that names the first one outside 0..d_sae−1."""
    strange = latents[(latents < 0) | (latents >= d_sae)]
    if len(strange):
        raise DictionaryError(f"no feature {int(strange[0])}: this SAE has {d_sae}", f"choose from 0 to {d_sae - 1}")
    return latents.long()


def weight_shapes(architecture: str, d_in: int, d_sae: int) -> dict[str, tuple[int, ...]]:
    """Shape of every weight in the file of an architecture; of any weight there is, for an architecture not named."""
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    biases = {"jumprelu": ("b_enc", "threshold"), "gated": ("b_gate", "b_mag", "r_mag"),
              "": ("b_enc", "threshold", "b_gate", "b_mag", "r_mag")}.get(architecture, ("b_enc",))
    return shapes | {name: (d_sae,) for name in biases}


def check_weights(tensors: dict[str, Tensor], activation: Activation) -> None:
    """Refuse weights that do not fit each other, k outside 1..d_sae, NaN, infinity, and rows that cannot be rescaled.

    Raises:
        DictionaryError: naming the tensor, its shape and the expected one.
        NumericsError: naming the tensor and how many of its values are not finite.
    """
    if tensors["W_enc"].ndim != 2:
        raise DictionaryError(f"W_enc has shape {tuple(tensors['W_enc'].shape)}, not (d_in, d_sae)")
    d_in, d_sae = tensors["W_enc"].shape
    expected = weight_shapes("", d_in, d_sae)
    for name, tensor in tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise DictionaryError(f"{name} has shape {tuple(tensor.shape)}, not {expected[name]} as W_enc "
                                  f"of ({d_in}, {d_sae}) wants")
        if tensor.dtype != tensors["W_enc"].dtype or not tensor.is_floating_point():
            raise DictionaryError(f"{name} is {tensor.dtype} and W_enc {tensors['W_enc'].dtype}",
                                  "all weights must be of one floating type")
    require_finite(tensors)
    if isinstance(activation, TopK):
        if not 1 <= activation.k <= d_sae:
            raise DictionaryError(f"k = {activation.k} is outside 1..{d_sae} (the number of latents)")
        silent = (tensors["W_dec"].norm(dim=-1) == 0).nonzero()
        if activation.rescale_by_decoder_norm and len(silent):
            raise NumericsError(f"row {int(silent[0])} of W_dec is zero, and codes are divided by its norm")


def require_finite(tensors: dict[str, Tensor]) -> None:
    """Raise NumericsError, naming the tensor, if any of its values is NaN or infinite."""
    for name, tensor in tensors.items():
        bad = int((~torch.isfinite(tensor)).sum())
        if bad:
            raise NumericsError(f"{name} of the SAE has {bad} NaN or infinite values of {tensor.numel()}",
                                "the file is damaged, or its training diverged")
