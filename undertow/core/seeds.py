"""Named random streams from one seed, so that no stream depends on how much another has drawn."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names`, a pure function of its arguments."""
    # "/" within a name is escaped as in a JSON pointer, so that ("a", "b") and ("a/b",) are two streams.
    text = "/".join([str(seed), *(str(name).replace("~", "~0").replace("/", "~1") for name in names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int, device: str = "cpu") -> torch.Generator:
    """A torch generator for the stream called `names`."""
    import torch  # kept out of the module: the command line reads seeds without loading torch

    return torch.Generator(device=device).manual_seed(derive_seed(seed, *names))
