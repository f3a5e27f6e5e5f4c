"""What a run will cost, said beforehand: one pass and a few steps are measured here, and multiplied."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae.corpus import Corpus, open_corpus
from sae.dictionary import Provenance
from sae.harvesting import rows_per_pass, store_folder
from sae.spec import RunSpec
from sae.text import TextSpec
from sae.training import Trainer
from undertow.core.errors import TextError
from undertow.subjects.sites import Site, site_width
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import tap


class Inputs(NamedTuple):
    """A run's inputs, checked: subject, site, and the two splits of the text."""

    subject: Subject
    site: Site
    train: Corpus
    held_out: Corpus


class Plan(NamedTuple):
    """Estimated cost of a run, in seconds and bytes; the harvest costs nothing if it lies in the cache."""

    tokens: int
    steps: int
    harvest_s: float
    train_s: float
    judge_s: float
    disk_bytes: int
    memory_bytes: int

    @property
    def total_s(self) -> float:
        return self.harvest_s + self.train_s + self.judge_s


def open_inputs(spec: RunSpec, subject: Subject) -> Inputs:
    """Check the site and open both splits of the text; nothing is computed on the subject yet."""
    site = subject.site(spec.site)
    train, held_out = (open_corpus(spec.text, split, subject.tokenizer, subject.bos_id) for split in ("train", "held_out"))
    return Inputs(subject, site, train, held_out)


def make_plan(spec: RunSpec, inputs: Inputs, cache: Path) -> Plan:
    """Estimate the cost of `spec` on this machine. Raises TextError if the text is shorter than one batch."""
    subject, site, corpus, held_out = inputs
    batch = next(corpus.batches(rows_per_pass(subject, spec.text.context)))
    per_token = _median_s(lambda: tap(subject, batch.tokens, site, batch.attend), 3) / batch.tokens.numel()
    text = subject.tokenizer.decode(batch.tokens[batch.measured].tolist())
    measured = int(batch.measured.sum())
    tokens_of = {c.split: int(c.n_chars * measured / max(1, len(text))) for c in (corpus, held_out)}
    tokens, judged = min(spec.tokens, tokens_of["train"]), min(spec.eval_tokens, tokens_of["held_out"])
    training = spec.learn.train_spec(tokens if tokens_of["train"] > 2 * spec.learn.batch_size
                                     else min(spec.tokens, corpus.count_tokens().measured), spec.seed)
    d_in = site_width(subject.blocks, site, subject.d_model)
    x = torch.randn(training.batch_size, d_in)
    trainer = Trainer.begin(training, x, str(subject.device))
    per_step = _median_s(lambda: trainer.step(x), 3)
    depth = subject.n_layers / (site.layer + 1)
    width = 4 * training.d_sae
    return Plan(
        tokens=tokens, steps=training.steps,
        harvest_s=0.0 if store_folder(subject, site, corpus, spec.tokens, cache, spec.store).exists() else
        (tokens + judged) * batch.tokens.numel() / measured * per_token,
        train_s=training.steps * per_step,
        judge_s=4 * min(spec.ce_tokens, judged) * per_token * depth * 1.4,  # 1.4: the unembedding, measured on SmolLM2
        disk_bytes=(tokens + judged) * d_in * (2 if spec.store.dtype == "bfloat16" else 4),
        memory_bytes=width * (2 * training.batch_size + 8 * d_in))


def _median_s(work: Callable[[], Any], times: int) -> float:
    work()
    taken: list[float] = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return statistics.median(taken)


def _chosen_text(provenance: Provenance, source: str | None, column: str | None, chat: bool) -> TextSpec:
    """The text to judge on: the one named, cut as in training, else the one that the SAE was trained on.

    Raises TextError if the SAE does not say and none is named.
    """
    if source is not None:
        return TextSpec.checked({"source": source, "column": column, "chat": chat,
                                 "context": provenance.context_size}, "--text")
    recorded = provenance.extra.get("text")
    if not isinstance(recorded, dict):
        raise TextError("the SAE does not say which text it was trained on", "name one with --text")
    return TextSpec.checked(recorded, "the SAE's own text")


def open_held_out(provenance: Provenance, subject: Subject, source: str | None, column: str | None, chat: bool) -> Corpus:
    """The held-out split of the text named by `source`, else of the one that the SAE was trained on.

    Raises TextError if it cannot be opened; for the SAE's own text it says how to name another.
    """
    spec = _chosen_text(provenance, source, column, chat)
    try:
        return open_corpus(spec, "held_out", subject.tokenizer, subject.bos_id)
    except TextError as error:
        if source is not None:
            raise
        raise TextError(f"the text that the SAE was trained on cannot be opened: {error.what}",
                        f"{error.hint}; or name another with --text".removeprefix("; or ")) from error
