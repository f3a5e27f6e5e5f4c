"""Speed, beside sae-lens in the same run, on the same inputs, precision and threads; the floor stands beside each figure.

Rounds are interleaved (every contestant once a round), so that a slow minute of the machine hits all alike.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.architectures import BY_PRICE
from sae.corpus import Corpus, TokenBatch
from sae.harvesting import Source, harvest, rows_per_pass, stream
from sae.training import Trainer, TrainSpec
from undertow.core.errors import UserError
from undertow.core.seeds import generator
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


class StepSize(NamedTuple):
    """Shape of the training step that is measured."""

    d_in: int
    d_sae: int
    k: int
    batch: int


def race(contestants: dict[str, Callable[[], float]], rounds: int, unit: str, reference: str) -> list[Row]:
    """Run every contestant once a round, after one round that does not count; each returns its own figure."""
    for run in contestants.values():
        run()
    figures: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            gc.collect()
            figures[name].append(run())
    base = statistics.median(figures[reference])
    return [Row(name, statistics.median(found), min(found), max(found), unit, statistics.median(found) / base)
            for name, found in figures.items()]


def _milliseconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def step_contestants(size: StepSize, architecture: str, device: str) -> dict[str, Callable[[], float]]:
    """One training step each, all bookkeeping on, in milliseconds; the encoder product alone is the floor.

    The activations are sums of a few random directions plus noise, the same for all.
    """
    batches = cycle(list(_synthetic(size, 8)))
    d_in, d_sae, k, batch = size
    sparse = {"penalty": {"coefficient": 1.0}} if architecture in BY_PRICE else {"k": k}
    spec = TrainSpec.checked({**sparse, "d_sae": d_sae, "steps": 10_000, "architecture": architecture,
                              "batch_size": batch}, "bench")
    trainer = Trainer.begin(spec, next(batches), device)
    peer = _sae_lens_trainer(size, spec, device, batches)
    x = next(batches).to(device)
    weight, out = torch.randn(d_in, d_sae, device=device), torch.empty(batch, d_sae, device=device)
    for _ in range(5):  # past the first steps, whose thresholds and optimizer states are being made
        trainer.step(next(batches))
    return {
        "encode product alone (floor)": lambda: _milliseconds(lambda: torch.mm(x, weight, out=out)),
        f"undertow {architecture} step": lambda: _milliseconds(lambda: trainer.step(next(batches))),
        f"sae-lens {architecture} step": lambda: _milliseconds(lambda: peer(next(batches))),
    }


def _synthetic(size: StepSize, n: int) -> Iterator[Float[Tensor, "batch d_in"]]:
    g = generator(0, "bench")
    directions = torch.randn(4 * size.d_in, size.d_in, generator=g)
    for _ in range(n):
        chosen = torch.rand(size.batch, len(directions), generator=g).topk(16, dim=1).indices
        strength = torch.rand(size.batch, 16, generator=g)
        noise = torch.randn(size.batch, size.d_in, generator=g)
        yield torch.nn.functional.embedding_bag(chosen, directions, mode="sum", per_sample_weights=strength) + noise


def _sae_lens_trainer(size: StepSize, spec: TrainSpec, device: str, batches: Iterator[Tensor]) -> Callable[[Tensor], Any]:
    """sae-lens' own trainer with its defaults, by its public step; what sets the sparsity is ours."""
    import sae_lens
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    price, k = spec.penalty.coefficient, {"k": spec.k}
    name, own = {
        "topk": ("TopK", k), "batchtopk": ("BatchTopK", k), "standard": ("Standard", {"l1_coefficient": price}),
        "matryoshka": ("MatryoshkaBatchTopK", {**k, "matryoshka_widths": [*spec.inner_prefixes, size.d_sae]}),
        "jumprelu": ("JumpReLU", {"jumprelu_sparsity_loss_mode": "quadratic", "target_l0": spec.k}),
        "gated": ("Gated", {"l1_coefficient": price})}[spec.architecture]
    config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=size.d_in, d_sae=size.d_sae, device=device, **own)
    dictionary = sae_lens.TrainingSAE.from_dict(config.to_dict())
    settings = SAETrainerConfig(total_training_samples=10_000 * size.batch, train_batch_size_samples=size.batch, lr=3e-4,
                                lr_end=3e-5, device=device)
    return SAETrainer(cfg=settings, sae=dictionary, data_provider=batches).step


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


def floor_note(size: StepSize) -> str:
    """What the step cannot go below, from its formula."""
    flop = 2 * size.d_in * size.d_sae + 10 * size.k * size.d_in
    return (f"floor 2·d·F + 10·k·d = {flop / 1e6:.2f} MFLOP an activation (dense autograd: 12·d·F = "
            f"{12 * size.d_in * size.d_sae / 1e6:.1f}); {28 * 2 * size.d_in * size.d_sae / 1e6:.0f} MB of Adam traffic a step")


def describe_subject(subject: Subject) -> str:
    """Subject, device and threads, for the head of a table."""
    return f"{subject.name} on {subject.device}, {torch.get_num_threads()} threads"
