"""Small real objects for the tests of this room: a store in memory, a dictionary whose codes are the activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, final

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.dictionary import Codes, Provenance


@final
class MemoryStore:
    """Activations in memory, for all positions but the first of every row and those `left_out`."""

    def __init__(self, activations: Tensor, n_rows: int, n_pos: int,
                 left_out: tuple[tuple[int, int], ...] = ()) -> None:
        self.tokens = torch.arange(n_rows * n_pos).reshape(n_rows, n_pos)
        self.measured = torch.ones(n_rows, n_pos, dtype=torch.bool)
        self.measured[:, 0] = False
        for row, position in left_out:
            self.measured[row, position] = False
        self.n, self.d_in = int(self.measured.sum()), activations.shape[1]
        self.activations = activations[:self.n]
        self.record: dict[str, Any] = {"spec": {"text": {"source": "memory"}}, "n": self.n, "written": "today"}

    @property
    def where(self) -> Tensor:
        return self.measured.nonzero()

    def chunks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.n, size):
            yield start, self.activations[start:start + size]


@final
class IdentityDictionary:
    """Codes are the positive activations themselves, so that every count can be worked out by hand."""

    architecture = "identity"
    provenance = Provenance.unknown()

    def __init__(self, width: int) -> None:
        self.d_in = self.d_sae = width
        self.W_dec = torch.eye(width)

    def encode(self, x: Tensor) -> Tensor:
        return x.relu()

    def encode_sparse(self, x: Tensor) -> Codes:
        rows, latents = x.relu().nonzero(as_tuple=True)
        return Codes(rows, latents, x[rows, latents])

    def latent_values(self, x: Tensor, latents: Tensor) -> Tensor:
        return x.relu()[:, latents]

    def directions(self, latents: Tensor) -> Tensor:
        return self.W_dec[latents]

    def decode(self, f: Tensor) -> Tensor:
        return f

    def decode_codes(self, codes: Codes, n: int) -> Tensor:
        out = torch.zeros(n, self.d_in)
        out[codes.rows, codes.latents] = codes.values
        return out

    def to(self, device: torch.device | str) -> IdentityDictionary:
        return self


@pytest.fixture
def memory_store() -> type[MemoryStore]:
    return MemoryStore


@pytest.fixture
def identity_dictionary() -> Callable[[int], IdentityDictionary]:
    return IdentityDictionary


@pytest.fixture
def random_store() -> Callable[..., MemoryStore]:
    """Builds a store of random sparse activations, with ties among the values and two tokens left out."""

    def build(seed: int, d_sae: int, n_rows: int = 12, n_pos: int = 9, share: float = 0.3) -> MemoryStore:
        rng = np.random.default_rng(seed)
        values = rng.integers(1, 20, (n_rows * n_pos, d_sae)) / 4 * (rng.random((n_rows * n_pos, d_sae)) < share)
        left_out = ((1, 3), (n_rows - 1, n_pos - 1))
        return MemoryStore(torch.from_numpy(values).float(), n_rows, n_pos, left_out)

    return build
