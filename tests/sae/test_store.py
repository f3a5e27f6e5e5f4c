"""The activation store against brute force: order, the global shuffle, both types, and shards that have changed."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain, islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sae.store import KIND, ActivationStore, open_store
from undertow.core.errors import ArtifactError, NumericsError
from undertow.core.storage import create_artifact, write_json

D_IN = 6
SIZES = (11, 0, 4, 9)  # rows a shard; one shard lost every activation
N = sum(SIZES)


def activations() -> Tensor:
    """Row i begins with i, so that a row tells where it came from."""
    values = torch.randn(N, D_IN, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    values[:, 0] = torch.arange(N)
    return values


def write_store(path: Path, dtype: torch.dtype, measured: Tensor | None = None, broken: int | None = None) -> Path:
    if measured is None:
        measured = torch.zeros(5, 8, dtype=torch.bool)
        where = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:N]
        measured.view(-1)[where] = True
    with create_artifact(path, KIND, {"norm_ceiling": 1.0}) as work:
        values = activations()
        if broken is not None:
            values[broken, 2] = float("nan")
        for number, block in enumerate(values.split(list(SIZES))):
            save_file({"acts": block.to(dtype).contiguous()}, work / f"acts-{number:05d}.safetensors")
        save_file({"tokens": torch.arange(40).reshape(5, 8).int(), "measured": measured,
                   "documents": torch.full((5, 8), -1).int()}, work / "rows.safetensors")
        write_json(work / "documents.json", ["a", "b"])
    return path


@pytest.fixture(params=["bfloat16", "float32"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ActivationStore:
    return open_store(write_store(tmp_path / "store", getattr(torch, request.param)))


def origins(batch: Tensor) -> list[int]:
    return [int(value) for value in batch[:, 0]]


def test_what_lies_in_it(store: ActivationStore) -> None:
    assert (store.n, store.d_in, store.document_ids) == (N, D_IN, ["a", "b"])
    assert store.where.tolist() == [[r, p] for r in range(5) for p in range(8) if store.measured[r, p]]
    assert store.tokens[2].tolist() == list(range(16, 24))


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_chunks_are_the_activations_in_order(store: ActivationStore, size: int) -> None:
    expected = 0
    blocks = []
    for start, block in store.chunks(size):
        assert start == expected
        assert 1 <= len(block) <= size
        assert block.dtype == torch.float32
        expected += len(block)
        blocks.append(block)
    assert torch.equal(torch.cat(blocks), activations())


def test_take_in_any_order_and_with_repeats(store: ActivationStore) -> None:
    index = torch.tensor([N - 1, 0, 11, 10, 14, 15, 0, 23])
    assert torch.equal(store.take(index), activations()[index])
    assert store.take(index[:0]).shape == (0, D_IN)
    store.take(index).zero_()  # a copy: the file is not touched
    assert torch.equal(store.take(index), activations()[index])


def test_float32_is_exact_where_bfloat16_rounds(tmp_path: Path) -> None:
    fine = activations() + 1 / 3
    with create_artifact(tmp_path / "store", KIND, {}) as work:
        save_file({"acts": fine}, work / "acts-00000.safetensors")
        save_file({"tokens": torch.zeros(1, N).int(), "measured": torch.ones(1, N, dtype=torch.bool),
                   "documents": torch.zeros(1, N).int()}, work / "rows.safetensors")
        write_json(work / "documents.json", ["a"])
    assert torch.equal(open_store(tmp_path / "store").take(torch.arange(N)), fine)
    assert not torch.equal(fine.bfloat16().float(), fine)


def test_every_epoch_is_one_global_permutation(store: ActivationStore) -> None:
    per_epoch = N // 5
    drawn = [origins(batch) for batch in islice(store.batches(5, seed=1), 3 * per_epoch)]
    epochs = [list(chain.from_iterable(drawn[e * per_epoch:(e + 1) * per_epoch])) for e in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(set(epoch)) == 5 * per_epoch  # nothing twice; a tail of 4 is left out
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != sorted(epochs[0])
    assert len({first // 11 for first in drawn[0]}) > 1  # a batch mixes shards
    left_out = [set(range(N)) - set(epoch) for epoch in epochs]
    assert left_out[0] != left_out[1] or left_out[1] != left_out[2]


def test_batch_of_all_is_a_permutation(store: ActivationStore) -> None:
    first, second = islice(store.batches(N, seed=0), 2)
    assert sorted(origins(first)) == sorted(origins(second)) == list(range(N))
    assert torch.equal(first, activations()[origins(first)])


@pytest.mark.parametrize("start", [0, 1, 3, 4, 9, 13])
def test_a_batch_does_not_depend_on_where_the_reading_began(store: ActivationStore, start: int) -> None:
    whole = list(islice(store.batches(5, seed=7), 16))
    rest = list(islice(store.batches(5, seed=7, start=start), 16 - start))
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], rest, strict=True))
    other = next(store.batches(5, seed=8, start=start))
    assert not torch.equal(other, whole[start])


def test_fewer_activations_than_a_batch(store: ActivationStore) -> None:
    with pytest.raises(ArtifactError, match=f"holds {N} activations, fewer than one batch of 25") as caught:
        next(store.batches(25, seed=0))
    assert "--batch-size" in caught.value.hint
    assert len(next(store.batches(N, seed=0))) == N


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4])


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(("damage", "message"), [(_flip, "has changed"), (_cut, "has changed"), (_remove, "is missing")])
@pytest.mark.parametrize("name", ["acts-00002.safetensors", "rows.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None], message: str) -> None:
    path = write_store(tmp_path / "store", torch.bfloat16)
    damage(path / name)
    with pytest.raises(ArtifactError, match=f"{name} {message}") as caught:
        open_store(path)
    assert str(path) in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_nan_is_named_by_shard_and_row(dtype: torch.dtype, tmp_path: Path) -> None:
    """A harvest refuses it, but another tool may have written the store, digests and all. Activation 13 is row 2 of shard 2."""
    store = open_store(write_store(tmp_path / "store", dtype, broken=13))
    for read in (lambda: store.take(torch.tensor([3, 14, 13, 12])), lambda: list(store.chunks(4)),
                 lambda: list(islice(store.batches(N, seed=0), 1))):
        with pytest.raises(NumericsError, match=r"acts-00002.safetensors: row 2 holds NaN or infinity"):
            read()
    assert origins(store.take(torch.tensor([12, 14]))) == [12, 14]  # the others can be read


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere does not exist"):
        open_store(tmp_path / "nowhere")
    with create_artifact(tmp_path / "sae", "sae", {}) as work:
        write_json(work / "x.json", 1)
    with pytest.raises(ArtifactError, match="of kind 'sae', not 'activations'"):
        open_store(tmp_path / "sae")
    unfit = torch.ones(5, 8, dtype=torch.bool)
    with pytest.raises(ArtifactError, match=f"holds {N} activations for 40 measured positions"):
        open_store(write_store(tmp_path / "unfit", torch.float32, unfit))
