"""`undertow bench dashboard`: building a store, beside SAEDashboard where there is one; answering, at sizes of real SAEs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from undertow.cli.common import JsonOption, OptionalTextOption, console, emit

if TYPE_CHECKING:
    from dashboards.bench import Built, Material
    from dashboards.store import FeatureStore
    from sae.bench import Row

app = typer.Typer()
MODEL, SITE, TEXT, WIDTH, K = "hearth", "blocks.2.hook_resid_post", "keeper:600", 4096, 32
FIRST, MANY = 16_384, 1_048_576
OURS = "undertow: build and write"
VIEW = {"density_from": "0.1", "maximum_from": "0.5", "sort": "maximum", "order": "down"}
FIRST_MS, FILTER_MS, BYTES, TIMES = 300, 100, 2_000, 10


@app.command()
def dashboard(
    sae: Annotated[str, typer.Argument(metavar="[SAE]", help="A folder, or a packaged name. Default: random directions on "
                                                             "hearth, which need no training.")] = "",
    text: OptionalTextOption = None,
    tokens: Annotated[int, typer.Option("--tokens", min=512, help="Tokens to measure on.")] = 16_384,
    peer: Annotated[str | None, typer.Option("--peer", help="The Python that has SAEDashboard.")] = None,
    features: Annotated[int, typer.Option("--peer-features", min=0, help="SAEDashboard does this many; 0: all. Its time "
                                                                         "grows with them.")] = 0,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds; medians are reported.")] = 3,
    json_: JsonOption = False,
) -> None:
    """How fast a feature store is built, how large it is, and how fast pages of 16,384 and 1,048,576 features come.

    SAEDashboard reads the same SAE, token rows, machine and threads, with its own settings and its cache of activations on.
    """
    import torch

    from dashboards.bench import PEER_VENV, store_bytes
    from sae.bench import Row, describe_subject

    material = _material(sae, text, tokens)
    with tempfile.TemporaryDirectory() as folder:
        rows, remarks, store = _built(material, (peer, features), rounds, Path(folder))
        own, whole = store_bytes(store)
        rows += [Row("store, bytes a feature", own, own, own, "bytes", 1.0),
                 Row("store with its texts, bytes a feature", whole, whole, whole, "bytes", whole / own)]
        rows += _answered(store, rounds, Path(folder))
    if peer is None:
        remarks.append("SAEDashboard was not compared. To compare, make a Python that has it and name it with --peer "
                       "peer/bin/python:\n  " + "\n  ".join(PEER_VENV))
    rates = {row.name: row for row in rows}
    aims = {f"store ≤ {BYTES:,} bytes a feature": own <= BYTES,
            f"first page of {FIRST:,} ≤ {FIRST_MS} ms": rates[f"first page of {FIRST:,} features"].median <= FIRST_MS,
            f"filter and sort of {MANY:,} ≤ {FILTER_MS} ms": rates[f"filter and sort of {MANY:,} features"].median <= FILTER_MS}
    if rates[OURS].ratio != 1.0:
        aims[f"built ≥ {TIMES} times as fast as by SAEDashboard"] = rates[OURS].ratio >= TIMES
    title = (f"{material.dictionary.d_sae:,} features on {describe_subject(material.subject)}, {material.rows} token rows of "
             f"{material.corpus.spec.source}, torch {torch.__version__}")
    if json_:
        emit({"title": title, "rows": [row._asdict() for row in rows], "aims": aims, "notes": remarks}, as_json=True)
        return
    _print(title, rows, [*(f"{'met' if met else 'MISSED'}: {aim}" for aim, met in aims.items()), *remarks])


def _material(sae: str, text: str | None, tokens: int) -> Material:
    from dashboards.bench import Material, random_dictionary, whole_passes
    from sae.corpus import TextSpec, open_corpus
    from sae.dictionary import LinearDictionary
    from sae.formats import load
    from sae.plan import open_held_out
    from undertow.cli.opening import Place, open_place
    from undertow.core.errors import DictionaryError
    from undertow.subjects.load import load_subject

    if not sae:
        subject = load_subject(MODEL, "cpu")
        spec = TextSpec.checked({"source": text or TEXT}, "--text")
        corpus = open_corpus(spec, "train", subject.tokenizer, subject.bos_id)
        return Material(random_dictionary(subject, SITE, WIDTH, K), subject, subject.site(SITE), corpus,
                        whole_passes(subject, spec.context, tokens))
    dictionary = load(sae)
    if not isinstance(dictionary, LinearDictionary):
        raise DictionaryError(f"{sae} is a {dictionary.architecture} that this benchmark does not write for another program",
                              "name a topk, jumprelu or standard SAE without norms of its own")
    subject, site = open_place(sae, dictionary, Place(None, None, False), "cpu")
    held = open_held_out(dictionary.provenance, subject, text, None, False).spec
    corpus = open_corpus(held, "train", subject.tokenizer, subject.bos_id)
    return Material(dictionary, subject, site, corpus, whole_passes(subject, held.context, tokens))


def _built(material: Material, wanted: tuple[str | None, int], rounds: int, folder: Path
           ) -> tuple[list[Row], list[str], FeatureStore]:
    """Building rates of all contestants, in features a second; ours warms up once, SAEDashboard's process is new each time."""
    from dashboards.bench import PEER, ask_peer, build, write_job
    from sae.bench import ratios
    from undertow.cli.progress import Phases
    from undertow.core.errors import DictionaryError

    python, n = wanted[0], min(wanted[1] or material.dictionary.d_sae, material.dictionary.d_sae)
    store = build(material, folder / "warm").store
    ours: list[Built] = []
    theirs: list[dict[str, Any]] = []
    remarks: list[str] = []
    with Phases() as phases:
        for number in range(rounds):
            ours.append(build(material, folder / f"round-{number}"))
            if python is not None and not remarks:
                try:
                    theirs.append(ask_peer(python, write_job(material, n, folder / f"job-{number}")))
                except DictionaryError as error:
                    remarks.append(f"{PEER} was not compared: {error}")
            phases("rounds", number + 1, rounds)
    clock = {OURS: [store.d_sae / one.seconds for one in ours]}
    cpu = {f"{OURS}, by the processor": [store.d_sae / one.cpu_seconds for one in ours]}
    if theirs and not remarks:
        clock[f"{PEER}: data"] = [n / one["seconds"] for one in theirs]
        clock[f"{PEER}: data and page"] = [n / (one["seconds"] + one["page_seconds"]) for one in theirs]
        cpu[f"{PEER}: data, by the processor"] = [n / one["cpu_seconds"] for one in theirs]
        remarks.append(_about(theirs[0], n))
    return [row for found, unit in ((clock, "features/s"), (cpu, "features/CPU s"))
            for row in ratios(found, unit, list(found)[min(1, len(found) - 1)])], remarks, store


def _about(answer: dict[str, Any], n: int) -> str:
    from dashboards.bench import PEER

    versions = ", ".join(f"{name} {said}" for name, said in answer["versions"].items())
    return (f"{PEER} read {n:,} features ({versions}); its activations differ from ours by {answer['difference']:.1e} of the "
            f"largest; its page has {answer['bytes'] / n:,.0f} bytes a feature. Ratios are against its data alone, without its "
            "page; ours reads the text, and writes the store.")


def _answered(store: FeatureStore, rounds: int, folder: Path) -> list[Row]:
    """Milliseconds of whole answers of a real server: the first of a new one, and later ones."""
    from dashboards.bench import served, timed, widened
    from dashboards.notes import Marks
    from dashboards.rendering import link
    from dashboards.table import Query, select
    from sae.bench import ratios

    wide, many = widened(store, FIRST, folder / "first"), widened(store, MANY, folder / "many")
    first, later, feature = [], [], []
    for _ in range(rounds):
        with served(wide) as ask:
            first.append(ask("features"))
            later += [ask("features") for _ in range(3)]
            feature += [ask(f"f/{latent}") for latent in range(1, 4)]
    query, nothing = Query.read(VIEW), Marks({}, frozenset())
    select(many, nothing, query).window(0, 100)
    alone = [timed(lambda: select(many, nothing, query).window(0, 100)) for _ in range(3 * rounds)]
    with served(many) as ask:
        ask(link("features", VIEW))
        whole = [ask(link("features", VIEW)) for _ in range(3 * rounds)]
    return [row for name, found in (
        (f"first page of {FIRST:,} features", first), ("the same, asked again", later), ("page of one feature", feature),
        (f"filter and sort of {MANY:,} features", alone), ("the same, the whole page of 100", whole))
        for row in ratios({name: found}, "ms", name)]


def _print(title: str, rows: list[Row], remarks: list[str]) -> None:
    from rich.table import Table

    table = Table("", "median", "min", "max", "unit", "ratio", title=title, box=None)
    for row in rows:
        table.add_row(row.name, *(f"{value:,.1f}" for value in row[1:4]), row.unit, f"{row.ratio:.2f}")
    console().print(table)
    for remark in remarks:
        console().print(remark, markup=False)
