"""Activations on disk: sharded, digest-checked, read in order or in one true global shuffle.

A store is an artifact directory: `rows.safetensors` (the token rows and which positions were measured),
`documents.json`, and `acts-00000.safetensors`, ... whose rows are the activations of the measured positions in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import load_file
from torch import Tensor

from undertow.core.errors import ArtifactError, NumericsError
from undertow.core.seeds import generator
from undertow.core.storage import open_artifact

KIND = "activations"
_DTYPES = {"BF16": (np.uint16, torch.bfloat16), "F32": (np.float32, torch.float32)}


class _Shard(NamedTuple):
    path: Path
    values: np.ndarray  # memory-mapped, (rows, d_in)
    dtype: torch.dtype

    def read(self, index: slice | np.ndarray) -> Float[Tensor, "token d_in"]:
        # A fancy index copies; a slice is copied too, so that no tensor points into the read-only map.
        found = torch.from_numpy(np.array(self.values[index])).view(self.dtype).float()
        bad = ~torch.isfinite(found).all(dim=1)
        if bool(bad.any()):
            rows = np.arange(len(self.values))[index][bad.numpy()]
            raise NumericsError(f"{self.path}: row {rows[0]} holds NaN or infinity, as do {len(rows) - 1} others of "
                                f"{len(found)} read", "a harvest refuses such activations: harvest again, or mend what "
                                "wrote them")
        return found


@final
class ActivationStore:
    """Activations of one subject at one site over one text, opened from a verified folder.

    Reading raises NumericsError, naming the shard and the row in it, where an activation is not finite.

    Attributes:
        path: the folder.
        n: number of activations.
        d_in: their width.
        record: the record of the harvest (subject, site, text, norms, counts).
        tokens: every token row, whether measured or not.
        measured: True where the store holds the position's activation.
        documents: index into `document_ids` of every token, -1 on BOS and padding.
        document_ids: names of the documents.
    """

    def __init__(self, path: Path, record: dict[str, Any]) -> None:
        self.path, self.record = path, record
        rows = load_file(path / "rows.safetensors")
        self.tokens: Int[Tensor, "row pos"] = rows["tokens"].long()
        self.measured: Bool[Tensor, "row pos"] = rows["measured"].bool()
        self.documents: Int[Tensor, "row pos"] = rows["documents"].long()
        self.document_ids: list[str] = json.loads((path / "documents.json").read_text(encoding="utf-8"))
        self._shards = [_open_shard(shard) for shard in sorted(path.glob("acts-*.safetensors"))]
        self._ends = np.cumsum([len(shard.values) for shard in self._shards])
        self.n, self.d_in = int(self._ends[-1]), int(self._shards[0].values.shape[1])
        if self.n != int(self.measured.sum()):
            raise ArtifactError(f"{path} holds {self.n} activations for {int(self.measured.sum())} measured positions")

    @property
    def where(self) -> Int[Tensor, "n 2"]:
        """(row, position) of every activation."""
        return self.measured.nonzero()

    def chunks(self, size: int) -> Iterator[tuple[int, Float[Tensor, "token d_in"]]]:
        """(index of the first, activations) in order; no chunk spans two shards, so some are shorter than `size`."""
        start = 0
        for shard in self._shards:
            for low in range(0, len(shard.values), size):
                block = shard.read(slice(low, low + size))
                yield start, block
                start += len(block)

    def take(self, index: Int[Tensor, "token"]) -> Float[Tensor, "token d_in"]:
        """Activations by index, in the order asked for."""
        wanted = index.numpy()
        shard_of = np.searchsorted(self._ends, wanted, side="right")
        out = torch.empty(len(wanted), self.d_in)
        for number in np.unique(shard_of):
            mine = np.flatnonzero(shard_of == number)
            first = self._ends[number] - len(self._shards[number].values)
            out[torch.from_numpy(mine)] = self._shards[number].read(wanted[mine] - first)
        return out

    def batches(self, size: int, seed: int, start: int = 0,
                share: slice = slice(None)) -> Iterator[Float[Tensor, "batch d_in"]]:
        """Endless batches: every epoch is one global permutation of all activations, of which a tail < `size` is left out.

        Batch number `start` is the same whether the ones before it were drawn or not, which makes resuming exact. `share`
        is the part of every batch to read.
        """
        per_epoch = self.n // size
        if per_epoch == 0:
            raise ArtifactError(f"{self.path} holds {self.n} activations, fewer than one batch of {size}",
                                "give a longer text or a smaller --batch-size")
        epoch, first = divmod(start, per_epoch)
        while True:
            order = torch.randperm(self.n, generator=generator(seed, "shuffle", epoch))
            for number in range(first, per_epoch):
                yield self.take(order[number * size:(number + 1) * size][share])
            epoch, first = epoch + 1, 0


def open_store(path: Path) -> ActivationStore:
    """Open a store. Raises ArtifactError if a shard is missing or has changed since it was written."""
    return ActivationStore(path, open_artifact(path, KIND).record)


def _open_shard(path: Path) -> _Shard:
    with path.open("rb") as handle:
        size = int.from_bytes(handle.read(8), "little")
        entry = json.loads(handle.read(size))["acts"]
    kind, dtype = _DTYPES[entry["dtype"]]
    if not entry["shape"][0]:
        return _Shard(path, np.empty(entry["shape"], kind), dtype)  # an empty file part cannot be mapped
    values = np.memmap(path, kind, mode="r", offset=8 + size + entry["data_offsets"][0], shape=tuple(entry["shape"]))
    return _Shard(path, values, dtype)
