"""Random choices that add up their own surprise, so that a story knows its probability."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from typing import TypeVar, final

T = TypeVar("T")


@final
class Draw:
    """A named random stream; `nats` is -log of the probability of all that was drawn from it."""

    def __init__(self, name: str) -> None:
        self._random = random.Random(name)
        self.nats = 0.0

    def one(self, options: Sequence[T]) -> T:
        """One of the options, all equally likely."""
        self.nats += math.log(len(options))
        return options[int(self._random.random() * len(options))]

    def weighted(self, options: Mapping[T, float]) -> T:
        """One of the options by its weight (not negative, one at least positive)."""
        total = sum(options.values())
        left = self._random.random() * total
        chosen, weight = next(iter(options.items()))
        for option, share in options.items():
            if share <= 0:
                continue
            chosen, weight = option, share
            left -= share
            if left < 0:
                break
        self.nats -= math.log(weight / total)
        return chosen

    def chance(self, probability: float) -> bool:
        """True with that probability."""
        return self.weighted({True: probability, False: 1.0 - probability})
