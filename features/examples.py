"""When every latent fires: exact counts, its strongest contexts and a uniform sample, in one pass over a text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64
from numpy import ndarray
from safetensors.numpy import load_file, save_file

from features.codes import CHUNK, Activations, Progress, dictionary_digest, scan_codes
from features.ranking import AFTER, BEFORE, BestPerLatent, Examples, Firings, priorities
from sae.dictionary import Codes, Dictionary
from undertow.core.errors import SpecError
from undertow.core.record import run_record
from undertow.core.seeds import derive_seed
from undertow.core.spec import digest_json
from undertow.core.storage import MANIFEST, create_artifact, open_artifact

KIND = "examples"
FILE = "examples.safetensors"
_NOT_THE_TEXT = ("written", "git", "versions", "machine")  # parts of a record that say nothing of the activations
N_TOP = N_UNIFORM = 8
N_BINS = 64
BIN_EDGES = np.exp2(np.arange(N_BINS + 1) / 2 - 12)
"""Edges of the histogram of activations, two bins an octave from 2^-12 to 2^20; what lies outside is in an end bin."""


@final
@dataclass(frozen=True)
class ExampleTable:
    """Firing statistics and examples of every latent of one dictionary on one text.

    A latent fires on an activation if its code there is above 0. Size: `d_sae * (n_top + n_uniform)` examples of 156
    bytes, `d_sae * N_BINS` counts, and the token rows.

    Attributes:
        text: source of the text, as the harvest records it; "" if it does not.
        n_tokens: number of activations scanned.
        seed: seed of the uniform sample.
        counts: number of activations on which the latent fired; exact.
        maxima: largest activation; 0 if it never fired.
        means: mean of the activations on which it fired; 0 if it never fired.
        histogram: number of firings by activation, bins `BIN_EDGES`; a row sums to the latent's count.
        top: strongest firings, strongest first, at most one a token row.
        uniform: a uniform sample without replacement of all firings, in random order: its first m are one too.
        tokens: token rows that the examples point into; -1 after the last measured token of a row.
    """

    text: str
    n_tokens: int
    seed: int
    counts: Int64[ndarray, "d_sae"]
    maxima: Float32[ndarray, "d_sae"]
    means: Float64[ndarray, "d_sae"]
    histogram: Int64[ndarray, "d_sae bin"]
    top: Examples
    uniform: Examples
    tokens: Int32[ndarray, "row pos"]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.counts)

    @property
    def density(self) -> Float64[ndarray, "d_sae"]:
        """Share of activations on which the latent fired: `counts / n_tokens`, in [0, 1]."""
        return self.counts / self.n_tokens


@final
class _Statistics:
    """Running counts, maxima, sums and histograms; independent of how the firings are cut into pieces."""

    def __init__(self, d_sae: int) -> None:
        self.counts = np.zeros(d_sae, dtype=np.int64)
        self.maxima = np.zeros(d_sae, dtype=np.float32)
        self.sums = np.zeros(d_sae, dtype=np.float64)
        self.histogram = np.zeros(d_sae * N_BINS, dtype=np.int64)

    def add(self, firings: Firings) -> None:
        bins = np.clip(np.searchsorted(BIN_EDGES, firings.values, side="right") - 1, 0, N_BINS - 1)
        self.counts += np.bincount(firings.latents, minlength=len(self.counts))
        self.histogram += np.bincount(firings.latents * N_BINS + bins, minlength=len(self.histogram))
        np.maximum.at(self.maxima, firings.latents, firings.values)
        np.add.at(self.sums, firings.latents, firings.values)  # one after the other, so no dependence on the pieces

    def means(self) -> Float64[ndarray, "d_sae"]:
        return self.sums / np.maximum(self.counts, 1)


def collect_examples(dictionary: Dictionary, store: Activations, seed: int, n_top: int = N_TOP,
                     n_uniform: int = N_UNIFORM, *, chunk: int = CHUNK,
                     progress: Progress | None = None) -> ExampleTable:
    """Statistics, strongest and uniformly drawn examples of all latents, in one pass.

    The result does not depend on `chunk` (but for the last bits of the encoder's matrix product). Memory: the table
    (see ExampleTable) plus one chunk's dense encoding.

    Args:
        dictionary: the SAE.
        store: activations of the site that the SAE reads.
        seed: seed of the uniform sample.
        n_top: strongest firings kept a latent, at least 1.
        n_uniform: firings drawn a latent, at least 1.
        chunk: activations encoded at a time.
        progress: called with (activations done, activations in all).

    Raises:
        DictionaryError: the dictionary reads activations of another width.
        NumericsError: a code is NaN or infinite.
        SpecError: n_top or n_uniform below 1.
    """
    for name, n in (("n_top", n_top), ("n_uniform", n_uniform)):
        if n < 1:
            raise SpecError(f"{name} = {n}: at least 1 example a latent is needed")
    where = store.where.numpy().astype(np.int64, copy=False)
    statistics = _Statistics(dictionary.d_sae)
    top = BestPerLatent(dictionary.d_sae, n_top, np.float32(np.inf), True, where)
    uniform = BestPerLatent(dictionary.d_sae, n_uniform, np.uint64(2**64 - 1), False, where)
    stream = derive_seed(seed, "examples")
    for firings in scan_firings(dictionary, store, chunk, progress):
        statistics.add(firings)
        top.offer(firings, -firings.values)
        uniform.offer(firings, priorities(stream, firings.latents, firings.indices))
    return ExampleTable(_source(store), store.n, seed, statistics.counts, statistics.maxima, statistics.means(),
                        statistics.histogram.reshape(-1, N_BINS), top.examples(), uniform.examples(),
                        _readable_rows(store))


def scan_firings(dictionary: Dictionary, store: Activations, chunk: int = CHUNK,
                 progress: Progress | None = None) -> Iterator[Firings]:
    """All firings of all latents, some whole token rows at a time, in the order of the text.

    Raises as `scan_codes` does. Memory: one chunk's dense encoding.
    """
    where = store.where.numpy().astype(np.int64, copy=False)
    return _whole_rows(scan_codes(dictionary, store, chunk), where, progress)


def _source(store: Activations) -> str:
    return str(store.record.get("spec", {}).get("text", {}).get("source", ""))


def _readable_rows(store: Activations) -> Int32[ndarray, "row pos"]:
    """The token rows, with -1 after the last measured token of each: padding is no text."""
    ahead = store.measured.numpy()[:, ::-1].cumsum(axis=1)[:, ::-1]
    return np.where(ahead > 0, store.tokens.numpy(), -1).astype(np.int32)


class _Found(NamedTuple):
    """Firings in the order of the text."""

    latents: Int64[ndarray, "firing"]
    indices: Int64[ndarray, "firing"]
    values: Float32[ndarray, "firing"]


def _whole_rows(scan: Iterator[tuple[int, Codes]], where: Int64[ndarray, "n 2"],
                progress: Progress | None) -> Iterator[Firings]:
    """Firings by whole token rows, so that the context of a firing is never cut by the end of a chunk."""
    held = _Found(np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64), np.empty(0, dtype=np.float32))
    for first, codes in scan:
        if progress is not None:
            progress(first, len(where))
        fires = codes.values > 0
        fresh = (codes.latents[fires], codes.rows[fires] + first, codes.values[fires].float())
        held = _Found(*(np.concatenate([old, new.cpu().numpy()]) for old, new in zip(held, fresh, strict=True)))
        if len(held.indices):
            last_row = where[held.indices[-1], 0]
            done = int(np.searchsorted(where[held.indices, 0], last_row))
            yield _by_latent(_Found(*(part[:done] for part in held)), where)
            held = _Found(*(part[done:] for part in held))
    yield _by_latent(held, where)
    if progress is not None:
        progress(len(where), len(where))


def _by_latent(found: _Found, where: Int64[ndarray, "n 2"]) -> Firings:
    order = np.argsort(found.latents, kind="stable")  # the indices ascend already
    indices = found.indices[order]
    return Firings(found.latents[order], indices, found.values[order], where[indices, 0], where[indices, 1])


def save_examples(table: ExampleTable, path: Path) -> None:
    """Write `table` as an artifact of kind "examples". Raises ArtifactError if `path` is taken."""
    arrays = {"counts": table.counts, "maxima": table.maxima, "means": table.means, "histogram": table.histogram,
              "tokens": table.tokens}
    for name, examples in (("top", table.top), ("uniform", table.uniform)):
        arrays |= {f"{name}.{field}": value for field, value in zip(Examples._fields, examples, strict=True)}
    record = run_record({"text": table.text, "n_tokens": table.n_tokens}, table.seed)
    with create_artifact(path, KIND, record) as folder:
        save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, folder / FILE)


def load_examples(path: Path) -> ExampleTable:
    """Read what `save_examples` wrote. Raises ArtifactError if it is missing, incomplete or changed."""
    record = open_artifact(path, KIND).record
    arrays = load_file(path / FILE)
    top, uniform = (Examples(*(arrays[f"{name}.{field}"] for field in Examples._fields)) for name in ("top", "uniform"))
    return ExampleTable(record["spec"]["text"], record["spec"]["n_tokens"], record["seed"], arrays["counts"],
                        arrays["maxima"], arrays["means"], arrays["histogram"], top, uniform, arrays["tokens"])


def examples_path(cache: Path, dictionary: str, store: Activations, seed: int, n_top: int, n_uniform: int) -> Path:
    """Folder of the table of one dictionary (by digest), one store, one seed and one number of examples."""
    facts = {name: value for name, value in store.record.items() if name not in _NOT_THE_TEXT}
    key = digest_json({"store": facts, "seed": seed, "n_top": n_top, "n_uniform": n_uniform, "around": [BEFORE, AFTER],
                       "bins": N_BINS})
    return cache / KIND / dictionary / key


def cached_examples(dictionary: Dictionary, store: Activations, seed: int, cache: Path,
                    progress: Progress | None = None) -> ExampleTable:
    """`collect_examples` with its default numbers of examples, computed once and kept in `cache`.

    The key covers the dictionary, the harvest behind the store, and the seed.
    """
    path = examples_path(cache, dictionary_digest(dictionary), store, seed, N_TOP, N_UNIFORM)
    if path.exists():
        return load_examples(path)
    table = collect_examples(dictionary, store, seed, progress=progress)
    save_examples(table, path)
    return table


def find_examples(dictionary: Dictionary, cache: Path) -> ExampleTable | None:
    """The cached table of `dictionary` that was measured on most tokens, whatever the text; none if there is none."""
    folders = [path.parent for path in (cache / KIND / dictionary_digest(dictionary)).glob(f"[!.]*/{MANIFEST}")]
    sizes = [(open_artifact(folder, KIND).record["spec"]["n_tokens"], folder) for folder in folders]
    return load_examples(max(sizes)[1]) if sizes else None
