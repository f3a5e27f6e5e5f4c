"""Many short texts in two files: all UTF-8 bytes in a row, and where each text ends. Read without loading them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import final

import numpy as np


def write_strings(folder: Path, name: str, texts: Iterable[str]) -> None:
    """Write `name`.bin and `name`.npy into `folder`."""
    ends, end = [0], 0
    with (folder / f"{name}.bin").open("wb") as handle:
        for text in texts:
            end += handle.write(text.encode("utf-8", "backslashreplace"))
            ends.append(end)
    np.save(folder / f"{name}.npy", np.array(ends, dtype=np.int64), allow_pickle=False)


@final
class Strings:
    """Texts written by `write_strings`, by index."""

    def __init__(self, folder: Path, name: str) -> None:
        self._ends = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        path = folder / f"{name}.bin"
        self._bytes = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        return self.between(index, index + 1)[0]

    def between(self, start: int, stop: int) -> list[str]:
        """Texts `start` up to `stop`. Raises IndexError outside 0 to the number of texts."""
        if not 0 <= start <= stop <= len(self):
            raise IndexError(f"texts {start} to {stop} of {len(self)}")
        ends = np.asarray(self._ends[start:stop + 1])
        block = self._bytes[ends[0]:ends[-1]].tobytes()
        first = int(ends[0])
        return [block[a - first:b - first].decode("utf-8") for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)]
