"""What was used last, within so many bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar, final

T = TypeVar("T")


@final
class Recent(Generic[T]):
    """Values by key, of which those that were used longest ago are forgotten. The last one put in is always kept.

    Args:
        most_bytes: of all values together.
        size: bytes of a value.
    """

    def __init__(self, most_bytes: int, size: Callable[[T], int]) -> None:
        self._most_bytes, self._size, self._bytes = most_bytes, size, 0
        self._kept: OrderedDict[bytes, T] = OrderedDict()  # the last used one last

    def get(self, key: bytes | None) -> T | None:
        """The value, which counts as used now; None if there is none."""
        if key is None or key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key]

    def put(self, key: bytes, value: T) -> None:
        """Keep a value, in the place of one of the same key."""
        if key in self._kept:
            self._bytes -= self._size(self._kept.pop(key))
        self._kept[key] = value
        self._bytes += self._size(value)
        while self._bytes > self._most_bytes and len(self._kept) > 1:
            self._bytes -= self._size(self._kept.popitem(last=False)[1])
