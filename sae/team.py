"""The processes that train one dictionary together, each on its share of every batch.

A team has one member (`ALONE`: every method returns at once) or those that `torchrun` started. Every member holds all weights
and takes the same steps; gradients are averaged, and what an architecture decides over the batch is decided over all shares.
All members must see the same cache and output folders.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed

from undertow.core.errors import SpecError, UserError

PATIENCE = timedelta(days=2)  # of members that wait while the first one judges; torchrun itself ends those of a dead one


@final
@dataclass(frozen=True)
class Team:
    """This process among `size` of them; `device` is where its part of a collective lies."""

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    @property
    def is_first(self) -> bool:
        """Whether this member writes, shows and judges."""
        return self.rank == 0

    def share_of(self, n: int) -> slice:
        """This member's part of a batch of `n`. Raises SpecError if `n` cannot be divided evenly."""
        if n % self.size:
            raise SpecError(f"a batch of {n} cannot be divided among {self.size} processes",
                            f"choose a --batch-size that is a multiple of {self.size}, e.g. {n - n % self.size or self.size}")
        part = n // self.size
        return slice(self.rank * part, (self.rank + 1) * part)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the team, in place."""
        if self.size > 1:
            for tensor in tensors:
                distributed.all_reduce(tensor)
                tensor.div_(self.size)

    def totals(self, values: Sequence[float]) -> list[float]:
        """Sums over the team."""
        return self._reduced(values, distributed.ReduceOp.SUM)

    def means(self, values: Sequence[float]) -> list[float]:
        """Means over the team."""
        return [total / self.size for total in self.totals(values)]

    def lowest(self, value: float) -> float:
        """The smallest of all members' values."""
        return self._reduced([value], distributed.ReduceOp.MIN)[0]

    def any(self, mine: bool) -> bool:
        """Whether any member says yes; all get the same answer, so that all stop at the same step."""
        return self._reduced([float(mine)], distributed.ReduceOp.MAX)[0] > 0

    def union(self, flags: Bool[Tensor, "n"]) -> Bool[Tensor, "n"]:
        """Flags that are set on any member."""
        if self.size == 1:
            return flags
        counts = flags.to(torch.int32)
        distributed.all_reduce(counts, distributed.ReduceOp.MAX)
        return counts > 0

    def nth_largest(self, values: Float[Tensor, "n"], nth: int) -> float:
        """The `nth` largest (from 1) of all members' values; −∞ where there are fewer."""
        longest = int(self._reduced([float(min(nth, len(values)))], distributed.ReduceOp.MAX)[0])
        mine = values.new_full((longest,), -math.inf)
        best = values.topk(min(nth, len(values)), sorted=False).values
        mine[:len(best)] = best
        found = [mine]
        if self.size > 1:
            found = [torch.empty_like(mine) for _ in range(self.size)]
            distributed.all_gather(found, mine)
        joined = torch.cat(found)
        return float(joined.topk(nth).values.min()) if len(joined) >= nth else -math.inf

    def first(self, work: Callable[[], None]) -> None:
        """Let the first member do `work` while the others wait. Raises UserError on these, if it failed or was stopped."""
        self.each(work if self.is_first else lambda: None)

    def each(self, work: Callable[[], None]) -> None:
        """Let every member do its `work`, and wait for all. Raises UserError on those that did theirs, if another failed."""
        failure: Exception | None = None
        try:
            work()
        except Exception as error:  # noqa: BLE001  raised again below, once the others know
            failure = error
        if self.any(failure is not None):
            raise failure or UserError("another of the processes stopped; its own message says why")

    def _reduced(self, values: Sequence[float], how: distributed.ReduceOp.RedOpType) -> list[float]:
        if self.size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor, how)
        return tensor.tolist()


ALONE = Team()


@contextmanager
def joined(device: str) -> Iterator[Team]:
    """The team that `torchrun` started this process for, or ALONE where it did not.

    On CUDA every member takes the device of its local rank, and NCCL carries the sums; on a CPU gloo does.
    Raises SpecError where a machine has fewer CUDA devices than processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        yield ALONE
        return
    cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if cuda and local >= torch.cuda.device_count():
        raise SpecError(f"process {local} of this machine has no CUDA device of its own: there are {torch.cuda.device_count()}",
                        "start as many with --nproc-per-node, or add --device cpu")
    place = f"cuda:{local}" if cuda else "cpu"
    if cuda:
        torch.cuda.set_device(place)
    distributed.init_process_group("nccl" if cuda else "gloo", timeout=PATIENCE)
    try:
        yield Team(distributed.get_rank(), distributed.get_world_size(), place)
        distributed.barrier()  # nobody leaves while another still needs it
    finally:
        distributed.destroy_process_group()
