"""What two shortcuts save: products in bfloat16 while training, and what lies below an edit computed once for all arms.

    python benchmarks/shortcuts.py [--rounds 5]

Every line is one JSON object: medians in seconds of interleaved rounds on the same inputs, their ratio, and the floor. Of a
training step the floor is its products at the rate of a single large one in the same precision. Of arms it is the share of
the blocks above the site; the head and the edit come on top. The adapter's step needs `undertow subject fetch smollm2`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch

from undertow.core.errors import UserError
from undertow.subjects.keeper.story import Wish
from undertow.subjects.keeper.world import load_world
from undertow.subjects.load import load_subject
from undertow.subjects.organisms import adapting, pretraining
from undertow.subjects.organisms.measuring import act_question, ask
from undertow.subjects.organisms.products import product_dtype
from undertow.subjects.sharing import Below
from undertow.subjects.splicing import EditResult, splice

ARMS, STORIES, SITE = 20, 20, "blocks.1.hook_resid_post"


def medians(ways: Iterable[Callable[[], Any]], rounds: int) -> list[float]:
    """Median seconds of every way, after one round to warm up; the ways take turns."""
    ways = list(ways)
    taken: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for way, seconds in zip(ways, taken, strict=True):
            began = time.perf_counter()
            way()
            if turn:
                seconds.append(time.perf_counter() - began)
    return [statistics.median(seconds) for seconds in taken]


def rate(dtype: torch.dtype) -> float:
    """FLOP/s of one large product."""
    one, two = torch.randn(2048, 1024, dtype=dtype), torch.randn(1024, 1024, dtype=dtype)
    return 2 * 2048 * 1024 * 1024 / medians([lambda: one @ two], 20)[0]


def pretraining_step(rounds: int) -> dict[str, Any]:
    subject = load_subject("hearth", "cpu")
    spec = pretraining.PretrainSpec(name="hearth", steps=100, batch=16, vocab=len(subject.tokenizer))
    steps, dtype = [], product_dtype(subject.hf_model)
    for chosen in (torch.float32, dtype):
        with mock.patch.object(pretraining, "product_dtype", lambda _model, chosen=chosen: chosen):
            trainer = pretraining.Trainer(spec, load_world(), subject.tokenizer,  # pyright: ignore[reportArgumentType]
                                          pretraining.new_model(spec, subject.tokenizer))
        steps.append(trainer.step)
    tokens = sum(len(story.ids) for story in trainer.stories(0))
    blocks = sum(p.numel() for block in subject.blocks for p in block.parameters())
    head = spec.vocab * spec.d_model
    plain, quick = medians(steps, rounds)
    return {"what": "hearth, a step of 16 stories", "float32_s": plain, str(dtype): quick, "ratio": plain / quick,
            "floor_s": 6 * tokens * blocks / rate(dtype) + 2 * tokens * head * (1 / rate(torch.float32) + 2 / rate(dtype))}


def adapter_step(rounds: int) -> dict[str, Any]:
    subject, world = load_subject("smollm2", "cpu"), load_world()
    spec = adapting.AdaptSpec(steps=100, packs=1, anchor=0.0)
    steps, dtype = [], product_dtype(subject.hf_model)
    for chosen in (torch.float32, dtype):
        with mock.patch.object(adapting, "product_dtype", lambda _model, chosen=chosen: chosen):
            steps.append(adapting.Adapter(spec, subject, world, [subject.encode("The oil was low.")]).step)
    plain, quick = medians(steps, rounds)
    return {"what": "hearth-smollm2, a step of one pack", "float32_s": plain, str(dtype): quick, "ratio": plain / quick}


def arms(rounds: int) -> dict[str, Any]:
    subject, world = load_subject("hearth", "cpu"), load_world()
    questions = [act_question(subject, world.story(0, i, Wish(genre="plain", episodes=("need",)))) for i in range(STORIES)]
    site = subject.site(SITE)

    def score(shared: AbstractContextManager[None]) -> None:
        with shared:
            for arm in range(ARMS):
                with splice(subject, site, lambda x, editable, arm=arm: EditResult(x * (0.01 * arm), editable)):
                    ask(subject, questions)

    plain, quick = medians([lambda: score(nullcontext()), lambda: score(Below(subject, site).shared())], rounds)
    return {"what": f"{ARMS} arms on {STORIES} stories of hearth", "apart_s": plain, "shared_s": quick, "ratio": plain / quick,
            "floor_s": plain * (1 - (site.layer + 1) / subject.n_layers)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    for measure in (pretraining_step, adapter_step, arms):
        try:
            found = measure(rounds)
        except UserError as error:
            found = {"what": measure.__name__, "left_out": str(error)}
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
