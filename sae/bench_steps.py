"""One training step of every trainer on the same batches: how long it takes, and how much memory.

The encoder product alone is the floor beside the times. Peak memory is that of a process of its own for each trainer.
"""

from __future__ import annotations

import gc
import multiprocessing
import resource
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import cycle
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import BY_PRICE, TrainSpec
from sae.peers import STEPS, Job, Maker, peer_makers, timed
from sae.training import Trainer
from undertow.core.errors import UserError
from undertow.core.seeds import generator

WARM_UP = 5  # steps: past the first ones, whose thresholds and optimizer states are being made
MEMORY_STEPS = 3
STATUS = Path("/proc/self/status")


class StepSize(NamedTuple):
    """Shape of the training step that is measured."""

    d_in: int
    d_sae: int
    k: int
    batch: int


def job_of(size: StepSize, architecture: str, device: str) -> Job:
    """A training of that shape at the architecture's defaults; at a price of 1, where it has no k."""
    sparse = {"penalty": {"coefficient": 1.0}} if architecture in BY_PRICE else {"k": size.k}
    spec = TrainSpec.checked({**sparse, "d_sae": size.d_sae, "steps": STEPS, "architecture": architecture,
                              "batch_size": size.batch}, "bench")
    return Job(size.d_in, spec, device)


def synthetic(job: Job, n: int) -> Iterator[Float[Tensor, "batch d_in"]]:
    """Batches of sums of a few random directions plus noise."""
    g = generator(0, "bench")
    batch = job.spec.batch_size
    directions = torch.randn(4 * job.d_in, job.d_in, generator=g)
    for _ in range(n):
        chosen = torch.rand(batch, len(directions), generator=g).topk(min(16, len(directions)), dim=1).indices
        strength = torch.rand(chosen.shape, generator=g)
        noise = torch.randn(batch, job.d_in, generator=g)
        summed = torch.nn.functional.embedding_bag(chosen, directions, mode="sum", per_sample_weights=strength)
        yield (summed + noise).to(job.device)


def step_makers(job: Job) -> tuple[dict[str, Maker], list[str]]:
    """What makes each trainer's step (ours first), and a line on each peer that cannot take part."""
    peers, notes = peer_makers(job)
    ours = f"undertow {job.spec.architecture} step"
    return {ours: lambda first: timed(Trainer.begin(job.spec, first.cpu(), job.device).step), **peers}, notes


def step_contestants(job: Job) -> tuple[dict[str, Callable[[], float]], list[str]]:
    """One training step each, all bookkeeping on, in milliseconds, and the encoder product alone; notes on who is missing."""
    batches = cycle(list(synthetic(job, 8)))
    x = next(batches)
    weight = torch.randn(job.d_in, job.spec.d_sae, device=job.device)
    out = torch.empty(len(x), job.spec.d_sae, device=job.device)
    product = timed(lambda batch: torch.mm(batch, weight, out=out))
    found: dict[str, Callable[[], float]] = {"encode product alone (floor)": lambda: product(x)}
    makers, notes = step_makers(job)
    for name, make in makers.items():
        step = make(x)
        for _ in range(WARM_UP):
            step(next(batches))
        found[name] = lambda step=step: step(next(batches))
    return found, notes


def peak_memory(job: Job) -> dict[str, float]:
    """Peak memory of training by each trainer, in MB (10^6 bytes): weights, gradients, optimizer and all that a step makes.

    Each is measured in a process of its own: its largest resident set over the making of the trainer and 3 steps, less the
    resident set before, when all packages were imported and all batches lay there. (The largest since the process began, which
    `getrusage` gives, would start at that of the parent, and hold what imports needed for a moment; Linux lets us start the
    count anew.) AuxK has no dead latents to work on in the first steps, in none of the trainers. On CUDA: the largest that
    was allocated on the device.
    """
    return {name: _in_a_process_of_its_own(job, name) for name in step_makers(job)[0]}


def _in_a_process_of_its_own(job: Job, name: str) -> float:
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak_of, job, name, torch.get_num_threads()).result()
    except BrokenProcessPool:
        raise UserError(f"the process that measured the memory of {name} was killed",
                        "choose a smaller --width or --batch-size, or add --no-memory") from None


def _peak_of(job: Job, name: str, threads: int) -> float:
    torch.set_num_threads(threads)
    makers, _ = step_makers(job)
    batches = list(synthetic(job, MEMORY_STEPS))
    leaf = torch.ones(256, 256, device=job.device, requires_grad=True)
    (leaf @ leaf).sum().backward()  # libraries make their own buffers at the first product
    gc.collect()
    before = _resident(restart=True)
    step = makers[name](batches[0])
    for batch in batches:
        step(batch)
    return (_resident() - before) / 1e6


def _resident(restart: bool = False) -> int:
    """The largest resident set of this process in bytes: since the last `restart`, where the system can start anew."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if restart:
            Path("/proc/self/clear_refs").write_text("5")
        lines = STATUS.read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


def floor_note(job: Job) -> str:
    """What the step cannot go below, from its formula."""
    d_in, d_sae, k = job.d_in, job.spec.d_sae, job.spec.k
    dense = f"dense autograd: 12·d·F = {12 * d_in * d_sae / 1e6:.1f}"
    adam = f"{28 * 2 * d_in * d_sae / 1e6:.0f} MB of Adam traffic a step"
    if k is None:
        return f"{job.spec.architecture} has no sparse step: {dense} MFLOP an activation; {adam}"
    return f"floor 2·d·F + 10·k·d = {(2 * d_in * d_sae + 10 * k * d_in) / 1e6:.2f} MFLOP an activation ({dense}); {adam}"
