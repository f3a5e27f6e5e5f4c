"""Harvest: subject × text × site → activations, streamed or stored.

Direct forward hooks, and the pass stops at the last site wanted; several sites are stored from one pass. Position 0,
special tokens and padding are left out, and so are massive activations: tokens whose norm is above ten times the median of
the first shard. They are rare, they carry norms two hundred times the median, and they fake every variance figure; they are
counted and reported.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import torch
from jaxtyping import Float
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.corpus import Corpus, TokenBatch
from sae.store import KIND, ActivationStore, open_store
from sae.team import Team
from undertow.core.errors import ArtifactError, NumericsError, SpecError, TextError
from undertow.core.record import run_record
from undertow.core.spec import Spec, digest_json
from undertow.core.storage import disk_errors, place, require_space, seal, sha256_file, write_json
from undertow.subjects.sites import Site, site_width
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import tap_sites

log = logging.getLogger(__name__)
SHARD_ROWS = 64
MASSIVE = 10.0
COPIES = 4  # of a shard in float32 that are alive while it is written
Progress = Callable[[int, int], None]


class StoreSpec(Spec):
    """How activations are stored.

    Attributes:
        dtype: on disk; bfloat16 costs about 1e-6 of the activations' power.
        memory_mb: what the activations of one site may take up while they are harvested, in MB (10^6 bytes): shards and
            passes become smaller. Absent: shards of 64 rows.
    """

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    memory_mb: float | None = Field(default=None, gt=0)

    def shard_rows(self, context: int, width: int) -> int:
        """Token rows a shard, a power of two. Raises SpecError if not even one row of activations fits."""
        if self.memory_mb is None:
            return SHARD_ROWS
        row = COPIES * 4 * context * width
        fit = int(self.memory_mb * 1e6 / row)
        if not fit:
            raise SpecError(f"one row of {context} activations of width {width} takes {row / 1e6:.3g} MB while it is "
                            f"harvested, more than --memory {self.memory_mb:g}", "allow more, or choose a smaller --context")
        return min(SHARD_ROWS, 1 << (fit.bit_length() - 1))


DEFAULT = StoreSpec()


class Source(NamedTuple):
    """Where activations come from: a subject, a site, and one split of a text."""

    subject: Subject
    site: Site
    corpus: Corpus


class Tapped(NamedTuple):
    """One batch of rows and its activations at the site."""

    batch: TokenBatch
    acts: Float[Tensor, "batch pos width"]


def rows_per_pass(subject: Subject, context: int) -> int:
    """Token rows in one forward pass: about 1,024 tokens on a CPU (its caches), 16,384 on a GPU.

    Always a power of two that divides SHARD_ROWS, so that passes fill shards exactly.
    """
    budget = (16384 if subject.device.type == "cuda" else 1024) // context
    return min(SHARD_ROWS, 1 << max(0, budget.bit_length() - 1))


def stream(subject: Subject, site: Site, corpus: Corpus, skip_rows: int = 0) -> Iterator[Tapped]:
    """Activations of `corpus` at `site`, a few rows at a time, in order.

    Raises NumericsError on NaN or infinity at a measured position, naming the row, the position and the document.
    """
    for tapped in stream_sites(subject, [site], corpus, skip_rows):
        yield tapped[0]


def stream_sites(subject: Subject, sites: Sequence[Site], corpus: Corpus, skip_rows: int = 0,
                 most_rows: int = SHARD_ROWS) -> Iterator[list[Tapped]]:
    """As `stream`, at several sites from one pass of the subject, of `most_rows` rows at most; in the order of `sites`."""
    for batch in corpus.batches(min(most_rows, rows_per_pass(subject, corpus.spec.context)), skip_rows):
        taps = tap_sites(subject, batch.tokens, sites, batch.attend)
        for site, acts in zip(sites, taps, strict=True):
            _require_finite(acts, batch, corpus, site)
        yield [Tapped(batch, acts) for acts in taps]


def _require_finite(acts: Float[Tensor, "batch pos width"], batch: TokenBatch, corpus: Corpus, site: Site) -> None:
    bad = ~torch.isfinite(acts).all(dim=-1).cpu() & batch.measured
    if not bad.any():
        return
    row, position = (int(i) for i in bad.nonzero()[0])
    document = int(batch.documents[row, position])
    raise NumericsError(
        f"{int(bad.sum())} activations at {site.name} are not finite, the first in row {batch.first_row + row}, "
        f"position {position}, document {corpus.document_ids[document]!r}",
        "the weights of the model are broken, or the text at that row is")


def store_key(subject: Subject, site: Site, corpus: Corpus, n_tokens: int, form: StoreSpec) -> str:
    """Digest of everything that the stored activations depend on."""
    rows = form.shard_rows(corpus.spec.context, site_width(subject.blocks, site, subject.d_model))
    return digest_json({"subject": subject.digest, "site": site.name, "text": corpus.digest, "tokens": n_tokens,
                        "dtype": form.dtype, "shard_rows": rows, "massive": MASSIVE})


def store_folder(subject: Subject, site: Site, corpus: Corpus, n_tokens: int, cache: Path, form: StoreSpec = DEFAULT) -> Path:
    """Where the store of these activations lies or will lie."""
    return cache / "activations" / store_key(subject, site, corpus, n_tokens, form)


def harvest(subject: Subject, site: Site, corpus: Corpus, n_tokens: int, cache: Path, progress: Progress | None = None,
            form: StoreSpec = DEFAULT) -> ActivationStore:
    """Store at least `n_tokens` activations (to the end of a pass; all there are, if fewer), or reopen the store made earlier.

    An interrupted harvest keeps its finished shards and goes on from there. Memory: one shard and one pass.

    Args:
        subject: the model.
        site: where to read.
        corpus: one split of a text.
        n_tokens: number of activations wanted.
        cache: cache folder; stores live in its `activations/`.
        progress: called with (activations done, wanted).
        form: how they are stored, and in how much memory.

    Raises:
        NumericsError: NaN or infinity, named by row.
        SpecError: not even one row fits into the memory allowed.
        StorageError: too little space.
        ArtifactError: a stored shard has changed.
        TextError: the text has no token to measure.
    """
    return harvest_sites(subject, [site], corpus, n_tokens, cache, progress, form)[0]


def harvest_sites(subject: Subject, sites: Sequence[Site], corpus: Corpus, n_tokens: int, cache: Path,
                  progress: Progress | None = None, form: StoreSpec = DEFAULT) -> list[ActivationStore]:
    """As `harvest`, at several sites: one pass of the subject fills a store each, and those that lie there are left out.

    Memory: one shard a site. Every store is the same as if it had been harvested alone.
    """
    folders = [store_folder(subject, site, corpus, n_tokens, cache, form) for site in sites]
    wanted = {folder: site for folder, site in zip(folders, sites, strict=True) if not folder.exists()}
    filling = _begin(Source(subject, sites[0], corpus), wanted, n_tokens, cache, form)
    with disk_errors(cache):
        _fill(filling, progress)
    _end(filling, list(wanted))
    return [open_store(folder) for folder in folders]


def _begin(source: Source, wanted: dict[Path, Site], n_tokens: int, cache: Path, form: StoreSpec) -> list[_Filling]:
    """What fills the stores that are wanted, from where an interrupted harvest left each. Raises StorageError without space."""
    subject, _, corpus = source
    width = sum(site_width(subject.blocks, site, subject.d_model) for site in wanted.values())
    require_space(cache, n_tokens * width * (2 if form.dtype == "bfloat16" else 4))
    filling: list[_Filling] = []
    for folder, site in wanted.items():
        work = folder.with_name(f".{folder.name}.partial")
        with disk_errors(work):
            work.mkdir(parents=True, exist_ok=True)
            filling.append(_Filling(Source(subject, site, corpus), work, n_tokens, form))
    return filling


def _end(filling: Sequence[_Filling], folders: Sequence[Path]) -> None:
    """Seal the stores and put them in their places."""
    for one, folder in zip(filling, folders, strict=True):
        with disk_errors(folder):
            one.finish()
            place(one.work, folder)


@final
class _Filling:
    """A store that is being filled, from wherever an interrupted harvest left it."""

    def __init__(self, source: Source, work: Path, n_tokens: int, form: StoreSpec) -> None:
        self.source, self.work, self.n_tokens, self.dtype = source, work, n_tokens, form.dtype
        subject, site, corpus = source
        self.shard_rows = form.shard_rows(corpus.spec.context, site_width(subject.blocks, site, subject.d_model))
        self.shards = _finished_shards(work)
        self.pending: list[Tapped] = []
        self.waiting = 0

    @property
    def rows(self) -> int:
        """Token rows that lie in finished shards."""
        return sum(shard["rows"] for shard in self.shards)

    @property
    def stored(self) -> int:
        """Activations in finished shards."""
        return sum(shard["n"] for shard in self.shards)

    @property
    def full(self) -> bool:
        return self.stored >= self.n_tokens

    def add(self, tapped: Tapped) -> None:
        """Take one pass; rows that an earlier harvest has stored already are let go."""
        if self.full or tapped.batch.first_row < self.rows:
            return
        self.pending.append(tapped)
        self.waiting += int(tapped.batch.measured.sum())
        if self.stored + self.waiting >= self.n_tokens or sum(len(t.batch.tokens) for t in self.pending) == self.shard_rows:
            self.write()

    def write(self) -> None:
        """Make a shard of what is pending."""
        if self.pending:
            self.shards.append(_write_shard(self.pending, self.work, self.shards, self.dtype))
            write_json(self.work / "progress.json", self.shards)
            self.pending, self.waiting = [], 0

    def finish(self) -> None:
        """Seal the folder."""
        _finish(self.source, self.work, self.shards, self.n_tokens)


def _finished_shards(work: Path) -> list[dict[str, Any]]:
    """Finished shards of an interrupted harvest. Raises ArtifactError, naming the file, if one has changed."""
    ledger = work / "progress.json"
    if not ledger.is_file():
        return []
    entries = json.loads(ledger.read_text(encoding="utf-8"))
    for name, digest in (item for entry in entries for item in entry["files"].items()):
        if not (work / name).is_file() or sha256_file(work / name) != digest:
            raise ArtifactError(f"{work / name} of an interrupted harvest has changed since it was written",
                                f"remove it and start again: rm -r {work}")
    log.info("going on after %d finished shards of an earlier harvest", len(entries))
    return entries


def harvest_together(source: Source, n_tokens: int, cache: Path, form: StoreSpec, team: Team,
                     watch: tuple[Progress, Callable[[], bool]]) -> ActivationStore | None:
    """As `harvest`, by a team: each member runs the subject on its own rows, the first one makes the shards.

    The store is the one that a single process makes, digests included. Every member calls this, and all see the same `cache`.
    `watch`: whom to tell (activations done, wanted), and what says whether to stop, asked after a shard of every member.
    Returns None where any of them was stopped; finished shards are kept.

    Raises as `harvest` does; on members where nothing failed, UserError.
    """
    subject, site, corpus = source
    folder = store_folder(subject, site, corpus, n_tokens, cache, form)
    filling: list[_Filling] = []
    if team.any(team.is_first and not folder.exists()):
        team.first(lambda: filling.extend(_begin(source, {folder: site}, n_tokens, cache, form)))
        if not _fill_together(source, filling, folder, form, (team, *watch)):
            return None
        team.first(lambda: _end(filling, [folder]))
    return open_store(folder)


def _fill_together(source: Source, filling: Sequence[_Filling], folder: Path, form: StoreSpec,
                   around: tuple[Team, Progress, Callable[[], bool]]) -> bool:
    """Fill the first member's store, a shard's rows of each member at a time; False where one was stopped."""
    (subject, site, corpus), (team, progress, stop) = source, around
    share = form.shard_rows(corpus.spec.context, site_width(subject.blocks, site, subject.d_model))
    start = int(team.totals([filling[0].rows if filling else 0])[0])
    if team.any(any(one.full for one in filling)):
        return True
    batches = corpus.batches(min(share, rows_per_pass(subject, corpus.spec.context)), start)
    for _, group in groupby(batches, key=lambda batch: (batch.first_row - start) // (share * team.size)):
        passes = list(group)
        mine = [batch for batch in passes if (batch.first_row - start) // share % team.size == team.rank]
        kept: dict[int, Float[Tensor, "batch pos width"]] = {}
        team.each(lambda mine=mine, kept=kept: _tap_share(source, mine, _part(folder), kept if team.is_first else None))
        team.first(lambda passes=passes, kept=kept: _take_parts(filling, passes, _part(folder), kept))
        for one in filling:
            progress(min(one.stored + one.waiting, one.n_tokens), one.n_tokens)
        if team.any(stop()):
            return False
        if team.any(any(one.full for one in filling)):
            return True
    team.first(lambda: _write_all(filling))
    return True


def _part(folder: Path) -> Path:
    """Where members leave activations for the first one: this, and the number of the pass's first row."""
    return folder.with_name(f".{folder.name}.partial") / "part"


def _tap_share(source: Source, mine: Sequence[TokenBatch], part: Path, kept: dict[int, Tensor] | None) -> None:
    subject, site, corpus = source
    for batch in mine:
        acts = tap_sites(subject, batch.tokens, [site], batch.attend)[0]
        _require_finite(acts, batch, corpus, site)
        if kept is not None:
            kept[batch.first_row] = acts
            continue
        with disk_errors(part):
            save_file({"acts": acts[batch.measured.to(acts.device)].contiguous().cpu()},
                      f"{part}-{batch.first_row}.safetensors")


def _take_parts(filling: Sequence[_Filling], passes: Sequence[TokenBatch], part: Path, kept: dict[int, Tensor]) -> None:
    for batch in passes:
        acts = kept.get(batch.first_row)
        if acts is None:
            file = Path(f"{part}-{batch.first_row}.safetensors")
            measured = load_file(file)["acts"]
            acts = measured.new_zeros(*batch.tokens.shape, measured.shape[1])
            acts[batch.measured] = measured
            file.unlink()
        for one in filling:
            one.add(Tapped(batch, acts))


def _fill(filling: Sequence[_Filling], progress: Progress | None) -> None:
    open_ = [one for one in filling if not one.full]
    if not open_:
        return
    subject, _, corpus = open_[0].source
    start = min(one.rows for one in open_)
    most_rows = min(one.shard_rows for one in open_)
    for tapped in stream_sites(subject, [one.source.site for one in open_], corpus, start, most_rows):
        for one, mine in zip(open_, tapped, strict=True):
            one.add(mine)
        last = min(open_, key=lambda one: one.stored + one.waiting)
        if progress is not None:
            progress(min(last.stored + last.waiting, last.n_tokens), last.n_tokens)
        if last.full:
            return
    _write_all(open_)


def _write_all(filling: Sequence[_Filling]) -> None:
    for one in filling:
        one.write()


def _write_shard(full: list[Tapped], work: Path, shards: list[dict[str, Any]], dtype: str) -> dict[str, Any]:
    measured = torch.cat([t.batch.measured for t in full])
    acts = torch.cat([t.acts[t.batch.measured.to(t.acts.device)].float().cpu() for t in full])
    if not len(acts) and not shards:
        raise TextError("the text's first rows have no token to measure")
    norms = acts.norm(dim=-1)
    ceiling = shards[0]["ceiling"] if shards else MASSIVE * float(norms.median())
    kept = norms <= ceiling
    measured[measured.clone()] = kept
    names = [f"{kind}-{len(shards):05d}.safetensors" for kind in ("acts", "rows")]
    save_file({"acts": acts[kept].to(getattr(torch, dtype))}, work / names[0])
    save_file({"tokens": torch.cat([t.batch.tokens for t in full]).int(), "measured": measured,
               "documents": torch.cat([t.batch.documents for t in full]).int()}, work / names[1])
    return {"rows": len(measured), "n": int(kept.sum()), "massive": int((~kept).sum()), "ceiling": ceiling,
            "norm_sum": float(norms[kept].sum()), "files": {name: sha256_file(work / name) for name in names}}


def _finish(source: Source, work: Path, shards: list[dict[str, Any]], n_tokens: int) -> None:
    subject, site, corpus = source
    parts = [load_file(work / f"rows-{number:05d}.safetensors") for number in range(len(shards))]
    save_file({name: torch.cat([part[name] for part in parts]) for name in ("tokens", "measured", "documents")},
              work / "rows.safetensors")
    write_json(work / "documents.json", list(corpus.document_ids))
    # The ledger goes first: a harvest killed here must not take for whole what has lost its rows.
    for leftover in (work / "progress.json", *work.glob("rows-*.safetensors"), *work.glob("part-*.safetensors")):
        leftover.unlink(missing_ok=True)
    total = sum(shard["n"] for shard in shards)
    record = run_record({"text": corpus.spec.model_dump(), "split": corpus.split, "tokens": n_tokens}, seed=0,
                        subject=subject.name, subject_digest=subject.digest, site=site.name, text_digest=corpus.digest,
                        n=total, massive=sum(shard["massive"] for shard in shards), norm_ceiling=shards[0]["ceiling"],
                        norm_mean=sum(shard["norm_sum"] for shard in shards) / max(total, 1))
    seal(work, KIND, record)
