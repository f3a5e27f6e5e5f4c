"""Random streams: pure functions of the seed and their name, and independent of each other."""

from __future__ import annotations

import hashlib

import torch
from hypothesis import given
from hypothesis import strategies as st

from undertow.core.seeds import derive_seed, generator

NAMES = st.lists(st.text("abcxyz/0123456789", min_size=1) | st.integers(0, 99), max_size=3)


def test_by_hand() -> None:
    first_8 = hashlib.sha256(b"7/shuffle/3").digest()[:8]
    assert derive_seed(7, "shuffle", 3) == int.from_bytes(first_8, "big") // 2


@given(st.integers(-2**70, 2**70), NAMES)
def test_63_bits_and_reproducible(seed: int, names: list[str | int]) -> None:
    value = derive_seed(seed, *names)
    assert 0 <= value < 2**63
    assert value == derive_seed(seed, *names)


def test_names_cannot_run_together() -> None:
    names = [("a", "b"), ("ab",), ("b", "a"), ("a/b",), ("a~1b",), ()]
    assert len({derive_seed(0, *parts) for parts in names}) == len(names)


def test_a_stream_does_not_depend_on_how_much_another_drew() -> None:
    alone = torch.randn(8, generator=generator(3, "weights"))
    other, weights = generator(3, "shuffle"), generator(3, "weights")
    torch.rand(1000, generator=other)
    torch.rand(1000)  # the global stream
    assert torch.equal(torch.randn(8, generator=weights), alone)


def test_streams_are_uncorrelated() -> None:
    """20,000 draws from neighbouring streams: |r| stays under 5/√n, and equal names give r = 1."""
    n = 20_000
    streams = [torch.randn(n, generator=generator(seed, name)) for seed in (0, 1) for name in ("a", "b")]
    r = torch.corrcoef(torch.stack(streams))
    assert r.fill_diagonal_(0).abs().max() < 5 / n**0.5
