"""Evaluate a dictionary on the held-out split of a text: the figures that a card carries."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sae.corpus import Corpus, TokenBatch
from sae.dictionary import Dictionary
from sae.harvesting import DEFAULT, Progress, Source, StoreSpec, harvest
from sae.metrics import LossTable, Reconstruction, loss_table, reconstruction
from undertow.core.errors import TextError

CHUNK = 4096
LOSS_ROWS = 2  # rows a pass of the loss table: two logit tensors of rows × context × vocab are alive


class Evaluation(NamedTuple):
    """Everything measured on held-out text. `massive` counts tokens left out because of their norm."""

    reconstruction: Reconstruction
    losses: LossTable
    massive: int
    wall_s: float

    def summary(self) -> dict[str, Any]:
        """The figures under the names of the command line's JSON; a figure that is not defined is absent."""
        r, table = self.reconstruction, self.losses
        figures = {
            "fvu": r.fvu, "l0": r.l0, "dead_share": r.dead_share, "tokens": r.tokens, "massive_tokens": self.massive,
            "ce_base": table.base.ce, "ce_recon": table.recon.ce, "ce_mean_ablation": table.mean_ablation.ce,
            "ce_zero_ablation": table.zero_ablation.ce, "ce_recovered": table.ce_recovered(table.mean_ablation),
            "ce_recovered_zero": table.ce_recovered(table.zero_ablation), "kl_recon": table.recon.kl,
            "kl_mean_ablation": table.mean_ablation.kl, "kl_zero_ablation": table.zero_ablation.kl,
            "kl_recovered": table.kl_recovered(table.mean_ablation), "ce_tokens": table.tokens, "wall_s": self.wall_s,
        }
        return {k: v for k, v in figures.items() if math.isfinite(v)} | {"density_histogram": r.histogram()}


def evaluate(dictionary: Dictionary, source: Source, tokens: tuple[int, int], cache: Path, progress: Progress | None = None,
             form: StoreSpec = DEFAULT) -> Evaluation:
    """Judge `dictionary` on the first activations of `source` and the loss on its first tokens: so many of each (`tokens`).

    Raises TextError if the text is not a held-out split: figures on trained text would flatter.
    """
    subject, site, corpus = source
    if corpus.split != "held_out":
        raise TextError(f"evaluation needs the held-out split, got {corpus.split!r}")
    began = time.perf_counter()
    n_tokens, ce_tokens = tokens
    store = harvest(subject, site, corpus, n_tokens, cache, progress, form)
    found = reconstruction(dictionary, (x for _, x in store.chunks(CHUNK)))
    rows = max(1, math.ceil(ce_tokens / corpus.spec.context))
    table = loss_table(subject, site, dictionary, found.mean, _first_rows(corpus, rows), store.record["norm_ceiling"])
    return Evaluation(found, table, int(store.record["massive"]), time.perf_counter() - began)


def _first_rows(corpus: Corpus, rows: int) -> Iterator[TokenBatch]:
    return islice(corpus.batches(LOSS_ROWS), math.ceil(rows / LOSS_ROWS))
