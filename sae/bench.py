"""Races: the same inputs, precision and threads in one run. And the race of harvests, against sae-lens' two routes.

Rounds are interleaved (every contestant once a round), so that a slow minute of the machine hits all alike.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae.corpus import Corpus, TokenBatch
from sae.harvesting import Source, harvest, rows_per_pass, stream
from undertow.core.errors import UserError
from undertow.subjects.bridge import bridge
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import tap


class Row(NamedTuple):
    """One contestant: figures over the rounds, in `unit`; `ratio` is its median over that of the reference contestant."""

    name: str
    median: float
    min: float
    max: float
    unit: str
    ratio: float


def race(contestants: dict[str, Callable[[], float]], rounds: int, unit: str, reference: str) -> list[Row]:
    """Run every contestant once a round, after one round that does not count; each returns its own figure."""
    for run in contestants.values():
        run()
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            gc.collect()
            figures[name].append(run())
    return ratios(figures, unit, reference)


def ratios(figures: dict[str, list[float]], unit: str, reference: str) -> list[Row]:
    """The rows of what was measured."""
    base = statistics.median(figures[reference])
    return [Row(name, statistics.median(found), min(found), max(found), unit, statistics.median(found) / base)
            for name, found in figures.items()]


def _milliseconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def harvest_contestants(source: Source, rows: int) -> dict[str, Callable[[], float]]:
    """Activations of `rows` token rows by each route, in tokens a second.

    The bare truncated forward on ready token rows is the floor. Every other route also reads and tokenises the text.
    """
    subject, site, corpus = source
    n_tokens = rows * corpus.spec.context
    ready = list(islice(corpus.batches(rows_per_pass(subject, corpus.spec.context)),
                        max(1, rows // rows_per_pass(subject, corpus.spec.context))))

    def rate(work: Callable[[], Any]) -> Callable[[], float]:
        return lambda: n_tokens / (_milliseconds(work) / 1e3)

    def bare() -> None:
        for batch in ready:
            tap(subject, batch.tokens, site, None)

    def streamed() -> None:
        for _ in islice(stream(subject, site, corpus), len(ready)):
            pass

    def stored() -> None:
        # A few less than the rows hold: a massive activation left out must not cost another pass.
        wanted = sum(int(batch.measured.sum()) for batch in ready) - 16
        with tempfile.TemporaryDirectory() as folder:
            harvest(subject, site, corpus, wanted, Path(folder))

    found = {"bare truncated forward (floor)": rate(bare), "undertow, streamed": rate(streamed),
             "undertow, stored and checked": rate(stored)}
    for name, make in (("sae-lens ActivationsStore on TransformerBridge", _bridge_store),
                       ("sae-lens ActivationsStore on the plain model", _proxy_store)):
        found[name] = rate(make(source, ready))
    return found


def _bridge_store(source: Source, ready: Sequence[TokenBatch]) -> Callable[[], None]:
    return _sae_lens_store(bridge(source.subject), source.site.name, source, ready)


def _proxy_store(source: Source, ready: Sequence[TokenBatch]) -> Callable[[], None]:
    from sae_lens.load_model import HookedProxyLM

    subject, site, _ = source
    if site.kind != "resid_post":
        raise UserError(f"the plain-model route has no name for {site.name}", "bench a hook_resid_post site")
    block = subject.blocks[site.layer]
    name = next(name for name, module in subject.hf_model.named_modules() if module is block)
    return _sae_lens_store(HookedProxyLM(subject.hf_model, subject.tokenizer, [name]), name, source, ready)


def _sae_lens_store(model: Any, hook: str, source: Source, ready: Sequence[TokenBatch]) -> Callable[[], None]:
    from datasets import Dataset
    from sae_lens import ActivationsStore

    subject, _, corpus = source
    store = ActivationsStore(
        model=model, dataset=_texts(corpus, Dataset), streaming=False, hook_name=hook, hook_head_index=None,
        context_size=corpus.spec.context, d_in=subject.d_model, n_batches_in_buffer=16, total_training_tokens=10**9,
        store_batch_size_prompts=len(ready[0].tokens), train_batch_size_tokens=2048, prepend_bos=True,
        normalize_activations="none", device=subject.device, dtype="float32")

    def run() -> None:
        with torch.inference_mode():
            for _ in ready:
                store.get_raw_llm_batch()

    return run


def _texts(corpus: Corpus, dataset: Any) -> Any:
    """The same documents as a data set of sae-lens' kind."""
    from sae.text import read_documents

    wanted = set(corpus.document_ids)
    return dataset.from_list([{"text": document.text} for document in read_documents(corpus.spec.source, corpus.spec.column)
                              if document.id in wanted])


def describe_subject(subject: Subject) -> str:
    """Subject, device and threads, for the head of a table."""
    return f"{subject.name} on {subject.device}, {torch.get_num_threads()} threads"
