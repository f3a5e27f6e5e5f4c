"""`undertow dashboard`: a local page with every feature of an SAE; `build` makes what it shows, `list` prints its table,
`export` writes files, `operate` does what the operating table does."""

from __future__ import annotations

import logging
import socket
import sys
import threading
import time
import webbrowser
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from undertow.cli.common import (
    ChatOption,
    ColumnOption,
    JsonOption,
    OptionalModelOption,
    OptionalTextOption,
    OutOption,
    SeedOption,
    console,
    emit,
)
from undertow.cli.opening import Place, SaeArgument, SameModelOption, SiteOption, open_place

if TYPE_CHECKING:
    from dashboards.building import Built
    from dashboards.finding import Collection
    from dashboards.notes import Notes
    from dashboards.store import FeatureStore
    from features.searching import Query as Search

log = logging.getLogger(__name__)
PORT = 8777
TOKENS = 65_536


class _OpenByDefault(TyperGroup):
    """`undertow dashboard runs/x` means `undertow dashboard open runs/x`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = args and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else ["open", *args])


app = typer.Typer(cls=_OpenByDefault, help="A local page that shows the features of an SAE: undertow dashboard [DIR]. "
                                           "Without a command's name it is `open`.")


NotesOption = Annotated[Path | None, typer.Option("--notes", help="File of labels, notes and stars; recipes go beside it.")]
LexiconOption = Annotated[str, typer.Option("--lexicon", help="The word not to be said: a packaged lexicon or a YAML file.")]
StoreArgument = Annotated[Path, typer.Argument(metavar="STORE", help="A feature store.")]


class _Text(NamedTuple):
    """What the user said about the text; `source` None means the one that the SAE was trained on."""

    source: str | None
    column: str | None
    chat: bool
    split: str
    tokens: int

    def words(self) -> list[str]:
        """The same as options of a command."""
        return ([] if self.source is None else ["--text", self.source]) + (
            [] if self.column is None else ["--column", self.column]) + (["--chat"] if self.chat else [])


@app.command("open")
def open_(
    target: Annotated[str | None, typer.Argument(metavar="[DIR]", help="A store, a folder that holds some, or an SAE (its "
                                                 "store is built if there is none). Default: runs, or this folder.")] = None,
    host: Annotated[str, typer.Option("--host", help="Address; any but this machine alone needs --token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65_535, help="Port; 0 takes any free one.")] = PORT,
    token: Annotated[str, typer.Option("--token", help="Secret that every request has to carry.")] = "",
    notes: NotesOption = None,
    lexicon: LexiconOption = "love",
    build: Annotated[bool | None, typer.Option("--build/--no-build", help="Build a store of every SAE in DIR that has none, in "
                                               "the cache. Default: if DIR holds no store at all.")] = None,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser.")] = False,
    json_: JsonOption = False,
) -> None:
    """Serve the dashboard on this machine until Ctrl-C."""
    from dashboards.answering import Dashboard
    from dashboards.evidence import EvidenceShelf
    from dashboards.guard import access_for
    from dashboards.models import Models
    from dashboards.notes import Notes, notes_path
    from dashboards.prompting import Reader
    from dashboards.runs import RunShelf
    from dashboards.saes import SaeShelf
    from dashboards.server import create_app
    from dashboards.surgeon import Surgeon
    from undertow.lexicon.forms import Lexicon

    access_for(host, port, token)  # refused before anything is built
    word = Lexicon.load(lexicon)
    listening = _listen(host, port)
    try:
        where = target or ("runs" if Path("runs").is_dir() else ".")
        collection = _collection(where, build)
        for trouble in collection.trouble:
            log.warning("not opened: %s", trouble)
        port = listening.getsockname()[1]
        models = Models(_open_search)
        dashboard = Dashboard(collection, Notes(notes or notes_path()), Reader(models), Surgeon(models, word),
                              RunShelf(*_searched(where)), where, EvidenceShelf(*_searched(where)),
                              SaeShelf(*_searched(where)))
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/{f'?token={token}' if token else ''}"
        if json_:
            emit({"url": url, "stores": list(collection.stores)}, as_json=True)
        else:
            console().print(f"{len(collection.stores)} feature stores at {url}   (Ctrl-C stops)", markup=False)
        if not no_open and sys.stdout.isatty():
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
        _serve(create_app(dashboard, access_for(host, port, token)), listening)
    finally:
        listening.close()


@app.command()
def build(
    sae: SaeArgument,
    out: OutOption,
    model: OptionalModelOption = None,
    site: SiteOption = None,
    same_model: SameModelOption = False,
    text: OptionalTextOption = None,
    column: ColumnOption = None,
    chat: ChatOption = False,
    split: Annotated[str, typer.Option("--split", help="Part of the text: held_out, or train.")] = "held_out",
    tokens: Annotated[int, typer.Option("--tokens", min=1, help="Tokens to measure on; all there are, if fewer.")] = TOKENS,
    seed: SeedOption = 0,
    json_: JsonOption = False,
) -> None:
    """Measure every feature on a text and write a feature store. An interrupted build goes on where the reading stopped."""
    began = time.perf_counter()
    built = _build(sae, Place(model, site, same_model), _Text(text, column, chat, split, tokens), seed, out)
    facts = {"path": built.path, "features": built.n_features, "tokens": built.n_tokens, "bytes": built.n_bytes,
             "wall_s": round(time.perf_counter() - began, 2)}
    emit(facts, as_json=json_)
    if not json_:
        console().print(f"\nLook at it: undertow dashboard {built.path}", markup=False)


@app.command("list")
def list_(
    store: StoreArgument,
    q: Annotated[str, typer.Option("--q", help="Words in the label, the peak token or the promoted token.")] = "",
    sort: Annotated[str, typer.Option("--sort", help="Column: id, density, maximum, mean, nearest, label; with --evidence "
                                          "chosen, effect, p, effect_on_d, attribution, act_writer_share, naming_p.")] = "id",
    order: Annotated[str, typer.Option("--order", help="up or down.")] = "up",
    density_from: Annotated[float | None, typer.Option(help="Least density, % of tokens.")] = None,
    density_to: Annotated[float | None, typer.Option(help="Largest density, % of tokens.")] = None,
    maximum_from: Annotated[float | None, typer.Option(help="Least maximum.")] = None,
    maximum_to: Annotated[float | None, typer.Option(help="Largest maximum.")] = None,
    state: Annotated[str, typer.Option(help="any, live, dead, rare or dense.")] = "any",
    labelled: Annotated[str, typer.Option(help="any, yes or no.")] = "any",
    starred: Annotated[str, typer.Option(help="any, yes or no.")] = "any",
    evidence: Annotated[Path | None, typer.Option(help="What features scan or select, or demo wrote of this SAE.")] = None,
    chosen: Annotated[str, typer.Option(help="Selected by it: any, yes or no.")] = "any",
    effect_from: Annotated[float | None, typer.Option(help="Least contrast.")] = None,
    effect_to: Annotated[float | None, typer.Option(help="Largest contrast.")] = None,
    p_to: Annotated[float | None, typer.Option(help="Largest family-wise p.")] = None,
    d_from: Annotated[float | None, typer.Option(help="Least effect on D, nats.")] = None,
    writer_to: Annotated[float | None, typer.Option(help="Largest act-writer share.")] = None,
    naming_from: Annotated[float | None, typer.Option(help="Least p of the naming screens.")] = None,
    page: Annotated[int, typer.Option(min=1, help="Page, 100 features each.")] = 1,
    notes: NotesOption = None,
    json_: JsonOption = False,
) -> None:
    """Print a page of the features table, filtered and sorted as in the browser."""
    from dashboards.evidence import read_evidence
    from dashboards.notes import Marks, Notes, notes_path
    from dashboards.store import open_feature_store
    from dashboards.table import Query
    from dashboards.table_page import table_page

    found = {"chosen": chosen, "effect_from": effect_from, "effect_to": effect_to, "p_to": p_to, "d_from": d_from,
             "writer_to": writer_to, "naming_from": naming_from}
    query = Query.checked({"q": q, "sort": sort, "order": order, "density_from": density_from, "density_to": density_to,
                           "maximum_from": maximum_from, "maximum_to": maximum_to, "state": state, "labelled": labelled,
                           "starred": starred, "page": page, "sought": found}, "undertow dashboard list")
    opened = open_feature_store(store)
    file = notes or notes_path()
    table = table_page(opened, Notes(file).marks(opened.dictionary) if file.is_file() else Marks({}, frozenset()), query,
                       read_evidence(evidence, opened) if evidence else None)
    if json_:
        rows = [{"feature": row.latent, "label": row.label, "starred": row.starred, "count": row.n_firings,
                 "density": row.density, "maximum": row.maximum, "mean": row.mean, "nearest": row.nearest,
                 "promoted": row.promoted, "chosen": row.rank, "evidence": row.found,
                 "context": row.passage.text if row.passage else ""} for row in table.rows]
        emit({"passing": table.n_passing, "pages": table.n_pages, "page": page, "rows": rows}, as_json=True)
        return
    from undertow.cli.dashboard_view import table_view

    console().print(table_view(table, opened, page))


@app.command()
def export(
    store: StoreArgument,
    out: Annotated[Path, typer.Option("--out", help="File to write (a folder for neuronpedia); it must not exist.")],
    format_: Annotated[str, typer.Option("--format", help="csv, parquet, html, neuronpedia or "
                                                          "neuronpedia-vectors.")] = "csv",
    latents: Annotated[str, typer.Option("--latents", help="Features, e.g. 1,2,3; html and vectors need them, others take "
                                                           "all.")] = "",
    source_set: Annotated[str, typer.Option("--source-set", help="neuronpedia: name of the source set.")] = "undertow-res",
    notes: NotesOption = None,
    json_: JsonOption = False,
) -> None:
    """Write features as a table, as one HTML page, or as Neuronpedia's upload format. Nothing is uploaded."""
    from dashboards.export import known_latents
    from dashboards.notes import Notes, notes_path
    from dashboards.store import open_feature_store
    from undertow.core.errors import SpecError
    from undertow.core.storage import disk_errors, refuse_existing

    if format_ not in ("csv", "parquet", "html", "neuronpedia", "neuronpedia-vectors"):
        raise SpecError(f"unknown --format {format_!r}", "choose csv, parquet, html, neuronpedia or neuronpedia-vectors")
    refuse_existing(out)
    opened = open_feature_store(store)
    file = notes or notes_path()
    chosen = known_latents(opened, latents, opened.d_sae) if latents else None
    files, facts = _exported(opened, chosen, Notes(file) if file.is_file() else None, format_, source_set)
    with disk_errors(out):
        for name, content in files.items():
            (out / name if name else out).parent.mkdir(parents=True, exist_ok=True)
            (out / name if name else out).write_bytes(content)
    emit({"path": out, "format": format_, **facts, "bytes": sum(map(len, files.values()))}, as_json=json_)


@app.command()
def operate(
    store: StoreArgument,
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What follows the ? in the address of an operating table.")],
    lexicon: LexiconOption = "love",
    json_: JsonOption = False,
) -> None:
    """Operate as the operating table does, and print both texts and every figure."""
    from starlette.datastructures import QueryParams

    from dashboards.models import Models
    from dashboards.operation import Operation
    from dashboards.store import open_feature_store
    from dashboards.surgeon import Surgeon
    from undertow.cli.dashboard_view import operated_view
    from undertow.lexicon.forms import Lexicon

    opened = open_feature_store(store)
    operation = Operation.read(QueryParams(query.rpartition("?")[2]))
    surgeon = Surgeon(Models(_open_search), Lexicon.load(lexicon))
    tokens, summary = [], {}
    for event in surgeon.events(opened, operation):
        kind = event.pop("kind")
        if kind == "token":
            tokens.append(event)
        elif kind == "done":
            summary = event
    if json_:
        texts = {side: "".join(text for text, _ in pieces) for side, pieces in summary.pop("pieces").items()}
        emit({**summary, "texts": texts, "tokens": tokens}, as_json=True)
        return
    console().print(operated_view(summary, tokens))


def _exported(store: FeatureStore, chosen: list[int] | None, notes: Notes | None, kind: str,
              source_set: str) -> tuple[dict[str, bytes], dict[str, Any]]:
    """Files by name ("" for the file itself), and what to say about them."""
    import json

    import numpy as np

    from dashboards.export import csv_bytes, html_page, neuronpedia, neuronpedia_vectors, parquet_bytes, table_of
    from dashboards.notes import Marks

    marks = notes.marks(store.dictionary) if notes else Marks({}, frozenset())
    if kind == "html":
        return {"": html_page(store, chosen or [], notes).encode()}, {"features": len(chosen or [])}
    if kind == "neuronpedia-vectors":
        made = neuronpedia_vectors(store, marks, chosen or [])
        return {"": json.dumps(made, ensure_ascii=False).encode()}, {"features": len(made)}
    every = list(range(store.d_sae)) if chosen is None else chosen
    if kind == "neuronpedia":
        upload = neuronpedia(store, marks, every, source_set)
        files = {f"batch-{number}.json": json.dumps(batch, ensure_ascii=False).encode()
                 for number, batch in enumerate(upload.batches)}
        return files, {"features": len(every) - len(upload.dead), "skipped_dead": len(upload.dead), "files": len(files)}
    table = table_of(store, marks, np.array(every, dtype=np.int64))
    return {"": (csv_bytes if kind == "csv" else parquet_bytes)(table)}, {"features": len(every)}


def _listen(host: str, port: int) -> socket.socket:
    """A socket bound to the address. Raises SpecError if it is taken or not this machine's."""
    from undertow.core.errors import SpecError

    made = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host, port))
        made.listen()
    except OSError as error:
        made.close()
        raise SpecError(f"cannot listen on {host}, port {port}: {error.strerror or error}",
                        "choose another: --port 0 takes any free one") from None
    return made


def _serve(served: Any, listening: socket.socket) -> None:
    import uvicorn

    config = uvicorn.Config(served, log_level="warning", lifespan="off", server_header=False, timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listening])


def _collection(where: str, build: bool | None) -> Collection:
    """The stores that `where` means; `build` None builds missing ones if there is none. Raises ArtifactError for anything else.
    """
    from dashboards.finding import Collection, collect, is_store, named
    from dashboards.store import open_feature_store
    from sae.formats import CFG, packaged_names
    from undertow.core.errors import ArtifactError, near_matches

    folder = Path(where)
    if folder.is_dir() and is_store(folder):
        return Collection(named([open_feature_store(folder)]))
    if where in packaged_names() or (folder / CFG).is_file():
        return Collection(named([open_feature_store(_cached_store(where))]))
    if not folder.is_dir():
        raise ArtifactError(f"{where} is neither a folder nor an SAE that comes with the package",
                            near_matches(where, packaged_names()) or "type: undertow dashboard DIR, or smollm2/12 for DIR")
    found = collect(folder)
    return _with_built(found) if build or (build is None and not found.stores) else found


def _with_built(found: Collection) -> Collection:
    """The same with a store, kept in the cache, of every SAE that had none; what cannot be built is reported."""
    from dashboards.finding import Collection, named
    from dashboards.store import open_feature_store
    from undertow.core.errors import UserError

    opened, trouble, bare = list(found.stores.values()), list(found.trouble), []
    for sae in found.bare:
        try:
            store = open_feature_store(_cached_store(sae))
            opened += [] if any(store.dictionary == known.dictionary for known in opened) else [store]
        except UserError as error:
            trouble.append(f"no store of {sae}: {error}")
            bare.append(sae)
    return Collection(named(opened), tuple(trouble), tuple(bare))


def _searched(where: str) -> tuple[Path | None, int]:
    """Where the runs and searches lie that belong to `where`: in the folder, or beside a store or an SAE; and how deep."""
    from dashboards.finding import is_store
    from sae.formats import CFG

    folder = Path(where)
    if not folder.is_dir():
        return None, 0
    beside = is_store(folder) or (folder / CFG).is_file()
    return (folder.resolve().parent, 1) if beside else (folder, 3)


def _cached_store(sae: str) -> Path:
    """The store of an SAE in the cache; built there, with the text that the SAE was trained on, if it is missing."""
    from features.codes import dictionary_digest
    from sae.formats import load
    from undertow.core.storage import cache_dir

    path = cache_dir() / "dashboards" / dictionary_digest(load(sae))
    if not path.exists():
        log.info("no store of %s yet: building one in %s", sae, path)
        _build(sae, Place(None, None, False), _Text(None, None, False, "held_out", TOKENS), 0, path)
    return path


def _build(sae: str, place: Place, text: _Text, seed: int, out: Path) -> Built:
    from dashboards.building import Source, build_store
    from dashboards.layout import BYTES_PER_FEATURE
    from features.cards import Lens
    from features.codes import dictionary_name
    from sae.corpus import open_corpus
    from sae.formats import load
    from sae.harvesting import harvest
    from sae.plan import open_held_out
    from undertow.cli.progress import Phases
    from undertow.core.errors import SpecError
    from undertow.core.storage import cache_dir, refuse_existing
    from undertow.subjects.unembed import final_norm_and_unembed

    refuse_existing(out)
    if text.split not in ("held_out", "train"):
        raise SpecError(f"unknown --split {text.split!r}", "choose held_out or train")
    dictionary = load(sae)
    subject, site = open_place(sae, dictionary, place)
    corpus = open_held_out(dictionary.provenance, subject, text.source, text.column, text.chat)
    if text.split == "train":
        corpus = open_corpus(corpus.spec, "train", subject.tokenizer, subject.bos_id)
    log.info("%s features; up to %s tokens of %s are read once with %s and kept in the cache (%.2f GB); the store takes about "
             "%.0f MB", f"{dictionary.d_sae:,}", f"{text.tokens:,}", corpus.spec.source, subject.name,
             text.tokens * subject.d_model * 2 / 1e9, (dictionary.d_sae * BYTES_PER_FEATURE + text.tokens * 24) / 1e6)
    options = ([] if place.model is None else ["--model", place.model]) + ([] if place.site is None else ["--site", place.site])
    options += ["--same-model"] if place.same_model else []
    with Phases() as phases:
        activations = harvest(subject, site, corpus, text.tokens, cache_dir(),
                              lambda done, total: phases(f"reading {corpus.spec.source} with {subject.name}", done, total))
        source = Source(str(Path(sae).resolve()) if Path(sae).is_dir() else sae, dictionary_name(sae, dictionary), dictionary,
                        Lens(subject.tokenizer, final_norm_and_unembed(subject)), activations, seed,
                        (*options, *text.words()))
        return build_store(source, out, cache_dir(), phases)


def _open_search(record: Mapping[str, Any]) -> Search:
    """What reads prompts for the store with this record. Raises SubjectError if the model is another one by now."""
    from features.searching import Query
    from sae.formats import load
    from undertow.core.errors import SubjectError

    sae = record["spec"]["sae"]
    dictionary = load(sae)
    subject, site = open_place(sae, dictionary, Place(record["subject"], record["site"], True))
    if subject.digest != record["subject_digest"]:
        raise SubjectError(f"the store was built with {record['subject']} of digest {record['subject_digest']}; it is now "
                           f"{subject.digest}", f"build it again: undertow dashboard build {sae} --out DIR")
    return Query(subject, site, dictionary, record["name"], None)
