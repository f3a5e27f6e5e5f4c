"""Building a feature store: activations and SAE → one folder that shows every feature without a model.

The model runs once over the text (`sae.harvesting.harvest`, which resumes); the codes are scanned twice; the folder is
written under another name and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Float32, Int32, Shaped
from numpy import ndarray
from numpy.lib.format import open_memmap
from torch import Tensor

from dashboards.geometry import all_directions, each_block, logit_block, nearest
from dashboards.layout import (
    BYTES_PER_FEATURE,
    COLUMNS,
    DETAIL,
    EXAMPLE,
    FORMAT,
    HEAT,
    KIND,
    N_INTERVALS,
    PER_INTERVAL,
)
from dashboards.moments import SecondLook, look_again
from dashboards.strings import write_strings
from features.cards import Lens
from features.codes import dictionary_digest
from features.examples import ExampleTable, cached_examples
from features.ranking import Examples
from features.wording import Tokenizer, pieces, token_text
from sae.dictionary import Dictionary
from sae.store import ActivationStore
from undertow.core.errors import DictionaryError
from undertow.core.record import run_record
from undertow.core.storage import create_artifact, refuse_existing, require_space, write_json

Phases = Callable[[str, int, int], None]
"""Called with (what is being done, units done, units in all)."""


@final
@dataclass(frozen=True, eq=False)
class Source:
    """What a store is built from.

    Attributes:
        sae: what the user typed for the SAE; it is opened by this when a prompt is read.
        name: how the SAE is called in the ids of its features.
        dictionary: the SAE.
        lens: tokenizer and unembedding of the subject.
        activations: activations of the SAE's site.
        seed: seed of every sample.
        options: command-line words by which subject, site and text were chosen; shown wherever a command is.
    """

    sae: str
    name: str
    dictionary: Dictionary
    lens: Lens
    activations: ActivationStore
    seed: int
    options: tuple[str, ...] = ()


class Built(NamedTuple):
    """A finished store: its folder and its size."""

    path: Path
    n_features: int
    n_tokens: int
    n_bytes: int


def build_store(source: Source, path: Path, cache: Path, phases: Phases | None = None) -> Built:
    """Write the feature store of `source` at `path`.

    Memory: BYTES_PER_FEATURE and the example tables (5 kB) a feature, one chunk's dense encoding, one block's logits.

    Args:
        source: SAE, subject's way out, activations.
        path: folder to write; it must not exist or be empty.
        cache: cache folder; the table of examples is kept there.
        phases: called with (phase, done, in all).

    Raises:
        ArtifactError: `path` is taken.
        DictionaryError: the SAE reads or writes another width.
        NumericsError: a code is NaN or infinite.
        StorageError: too little space.
    """
    refuse_existing(path)
    dictionary, store = source.dictionary, source.activations
    if dictionary.d_sae < 1:
        raise DictionaryError("the SAE has no latents")
    require_space(path, dictionary.d_sae * BYTES_PER_FEATURE + store.tokens.numel() * 24)
    table = cached_examples(dictionary, store, source.seed, cache, _named(phases, "examples"))
    look = look_again(dictionary, store, table, progress=_named(phases, "moments and intervals"))
    spec = {"sae": source.sae, "options": list(source.options),
            **{name: store.record["spec"][name] for name in ("text", "split", "tokens")}}
    record = run_record(spec, source.seed, format=FORMAT, name=source.name, dictionary=dictionary_digest(dictionary),
                        architecture=dictionary.architecture, d_in=dictionary.d_in, d_sae=dictionary.d_sae,
                        n_tokens=table.n_tokens, subject=store.record["subject"], site=store.record["site"],
                        subject_digest=store.record["subject_digest"], text_digest=store.record["text_digest"],
                        massive=store.record["massive"], norm_ceiling=store.record["norm_ceiling"],
                        chat_template=bool(getattr(source.lens.tokenizer, "chat_template", None)))
    with create_artifact(path, KIND, record) as folder:
        np.save(folder / "tokens.npy", table.tokens, allow_pickle=False)
        np.save(folder / "documents.npy", store.documents.numpy().astype(np.int32), allow_pickle=False)
        write_json(folder / "documents.json", store.document_ids)
        write_strings(folder, "passages", _passage_texts(table, source.lens.tokenizer, _named(phases, "texts")))
        write_strings(folder, "vocabulary", _vocabulary(source.lens))
        _write_features(folder, source, table, look, _named(phases, "directions and logits"))
    n_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Built(path, dictionary.d_sae, table.n_tokens, n_bytes)


def _named(phases: Phases | None, name: str) -> Callable[[int, int], None]:
    return (lambda done, total: None) if phases is None else (lambda done, total: phases(name, done, total))


def _passage_texts(table: ExampleTable, tokenizer: Tokenizer, progress: Callable[[int, int], None]) -> Iterator[str]:
    """What each position of each row reads as; padding reads as nothing."""
    for number, row in enumerate(table.tokens):
        texts = [""] * len(row)
        for piece in pieces(tokenizer, row[row >= 0].tolist()):
            texts[piece.start] = piece.text
        yield from texts
        progress(number + 1, len(table.tokens))


def _vocabulary(lens: Lens) -> Iterator[str]:
    """Every row of the unembedding as text; rows past the tokenizer's last entry are named by number."""
    known = len(lens.tokenizer) if isinstance(lens.tokenizer, Sized) else len(lens.unembed.W_U)
    for token in range(len(lens.unembed.W_U)):
        yield token_text(lens.tokenizer, token) if token < known else f"[no token {token}]"


def _write_features(folder: Path, source: Source, table: ExampleTable, look: SecondLook,
                    progress: Callable[[int, int], None]) -> None:
    d_sae = table.d_sae
    (folder / "columns").mkdir()
    columns = {name: open_memmap(folder / "columns" / f"{name}.npy", "w+", np.dtype(kind), (d_sae,))
               for name, kind in COLUMNS.items()}
    for name, values in (("count", table.counts), ("maximum", table.maxima), ("mean", table.means),
                         ("variance", look.variance), ("skewness", look.skewness), ("kurtosis", look.kurtosis),
                         ("peak_token", _peak_tokens(table))):
        columns[name][:] = values
    details = open_memmap(folder / "details.npy", "w+", DETAIL, (d_sae,))
    directions = all_directions(source.dictionary)
    for block in each_block(d_sae, progress):
        details[block] = _details(block, table, look)
        _weights_say(block, directions, source.lens, details, columns)
    for array in (details, *columns.values()):
        array.flush()


def _peak_tokens(table: ExampleTable) -> Int32[ndarray, "d_sae"]:
    rows, positions = table.top.rows[:, 0], table.top.positions[:, 0]
    return np.where(rows < 0, -1, table.tokens[rows, positions])


def _weights_say(block: slice, directions: Tensor, lens: Lens, details: Shaped[ndarray, "d_sae"],
                 columns: dict[str, np.memmap]) -> None:
    near, logits = nearest(directions, block), logit_block(directions[block], lens.unembed)
    columns["norm"][block], columns["nearest"][block] = near.norms, near.pairs["value"][:, 0]
    columns["promoted_token"][block] = logits.promoted["id"][:, 0]
    for name, values in (("neighbours", near.pairs), ("promoted", logits.promoted), ("suppressed", logits.suppressed),
                         ("logits", logits.histogram), ("logit_low", logits.low), ("logit_high", logits.high)):
        details[name][block] = values


def _details(block: slice, table: ExampleTable, look: SecondLook) -> Shaped[ndarray, "block"]:
    found = np.zeros(block.stop - block.start, dtype=DETAIL)
    found["histogram"], found["intervals"] = table.histogram[block], look.intervals[block]
    maxima = table.maxima[block]
    found["top"], found["uniform"] = (_packed(kind, block, maxima) for kind in (table.top, table.uniform))
    lists = slice(block.start * N_INTERVALS, block.stop * N_INTERVALS)
    strata = _packed(look.strata, lists, maxima.repeat(N_INTERVALS))
    found["strata"] = strata.reshape(-1, N_INTERVALS, PER_INTERVAL)
    return found


def _packed(examples: Examples, block: slice, maxima: Float32[ndarray, "block"]) -> Shaped[ndarray, "block n"]:
    found = np.zeros(examples.rows[block].shape, dtype=EXAMPLE)
    found["row"], found["position"], found["value"] = examples.rows[block], examples.positions[block], examples.values[block]
    scale = HEAT / np.where(maxima > 0, maxima, 1)[:, None, None]
    found["heat"] = np.minimum(np.ceil(examples.windows[block] * scale), HEAT)
    return found
