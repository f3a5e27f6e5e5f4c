"""Features as files: the table as CSV or Parquet, Neuronpedia's upload format, and pages in one file.

Neuronpedia's `POST /api/feature/upload-batch` takes at most 128 features a request, each with at least one activation, at most
1,024 tokens in it, and at most 20 logits a side; dead features cannot be sent. Nothing is ever uploaded from here.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from markupsafe import Markup
from numpy import ndarray

from dashboards.evidence import Evidence
from dashboards.feature_page import Display, feature_page
from dashboards.layout import HEAT, N_INTERVALS
from dashboards.notes import Marks, Notes
from dashboards.rendering import STATIC, environment
from dashboards.saes import open_sae
from dashboards.store import FeatureStore
from features.cards import feature_id
from features.ranking import AFTER, BEFORE
from undertow.core.errors import SpecError

if TYPE_CHECKING:
    import pyarrow

NEURONPEDIA_BATCH = 128
SOURCE_SET = "undertow-res"
MOST_CHANNELS, MOST_STRENGTH = 24_576, 100.0
"""Limits of its vectors: their length, and the size of their default strength."""
MOST_PAGES = 500
"""Features in one HTML file, at most: about 40 kB each."""
_DIGITS = 5
_FIGURES = ("count", "density", "maximum", "mean", "variance", "skewness", "kurtosis", "norm", "nearest")


def known_latents(store: FeatureStore, typed: str, most: int) -> list[int]:
    """Features as typed: "1,2,3". Raises SpecError for what is no number and for too many, DictionaryError for an unknown one.
    """
    parts = [part.strip() for part in typed.split(",") if part.strip()]
    wrong = next((part for part in parts if not (part.isascii() and part.isdigit())), None)
    if wrong is not None:
        raise SpecError(f"{wrong!r} is no feature's number", "write them as 1,2,3")
    if len(parts) > most:
        raise SpecError(f"{len(parts):,} features are too many; at most {most}", "choose fewer")
    return [store.known(int(part)) for part in dict.fromkeys(parts)]


def table_of(store: FeatureStore, marks: Marks, latents: Int64[ndarray, "n"], evidence: Evidence | None = None
             ) -> pyarrow.Table:
    """The features table: one row a feature, in the order of `latents`; figures as in `layout.COLUMNS`.

    With `evidence` also its measures, named as in `evidence.MEASURES`, and `chosen`: the order of choice, from 1.
    """
    import pyarrow

    vocabulary = np.array([*store.vocabulary.between(0, len(store.vocabulary)), ""], dtype=object)  # −1 is the last: ""
    columns: dict[str, Any] = {
        "feature": latents, "label": [marks.labels.get(int(latent), "") for latent in latents],
        "starred": [int(latent) in marks.starred for latent in latents],
        **{name: (store.density if name == "density" else store.columns[name])[latents] for name in _FIGURES},
        "peak_token": vocabulary[store.columns["peak_token"][latents]],
        "promoted_token": vocabulary[store.columns["promoted_token"][latents]]}
    if evidence is not None:
        for name in ("chosen", *evidence.columns):
            columns[name] = pyarrow.array(evidence.column(name, store.d_sae)[latents], from_pandas=True)  # NaN is no value
    return pyarrow.table(columns, metadata={"sae": store.name, "dictionary": store.dictionary, "n_tokens": str(store.n_tokens),
                                            "text": store.record["spec"]["text"]["source"]})


def csv_bytes(table: pyarrow.Table) -> bytes:
    """The table as CSV, UTF-8, with a header."""
    import pyarrow.csv

    sink = io.BytesIO()
    pyarrow.csv.write_csv(table, sink)
    return sink.getvalue()


def parquet_bytes(table: pyarrow.Table) -> bytes:
    """The table as Parquet."""
    import pyarrow.parquet

    sink = io.BytesIO()
    pyarrow.parquet.write_table(table, sink)
    return sink.getvalue()


def html_page(store: FeatureStore, latents: Sequence[int], notes: Notes | None) -> str:
    """The pages of some features in one file that needs nothing else: no script, no network.

    Raises SpecError for none or for more than MOST_PAGES, DictionaryError for an unknown one.
    """
    if not latents:
        raise SpecError("no feature was chosen", "name some: --latents 1,2,3")
    if len(latents) > MOST_PAGES:
        raise SpecError(f"{len(latents):,} features are too many for one page; at most {MOST_PAGES}",
                        "choose fewer with --latents, or export the table: --format csv")
    pages = [feature_page(store, latent, notes, Display()) for latent in latents]
    sheet = Markup((STATIC / "style.css").read_text(encoding="utf-8"))  # ours, and no text of a store
    return environment().get_template("export.html").render(store=store, pages=pages, sheet=sheet)


class Upload(NamedTuple):
    """Bodies of upload requests, and the features that cannot be sent because they never fired."""

    batches: tuple[dict[str, Any], ...]
    dead: tuple[int, ...]


def model_id(store: FeatureStore) -> str:
    """The subject's name as Neuronpedia writes one: lower-case letters, digits, - and _."""
    last = str(store.record["subject"]).rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"[^a-z0-9_-]+", "-", last.lower()).strip("-") or "model"


def source_id(store: FeatureStore, source_set: str) -> str:
    """{layer}-{set}. Raises SpecError for a set that Neuronpedia would refuse."""
    if not re.fullmatch(r"[a-zA-Z0-9_-]+", source_set):
        raise SpecError(f"{source_set!r} is no name of a source set", "use letters, digits, - and _")
    return f"{re.sub(r'[^0-9]', '', str(store.record['site']).split('hook')[0]) or '0'}-{source_set}"


def neuronpedia(store: FeatureStore, marks: Marks, latents: Sequence[int], source_set: str) -> Upload:
    """Features in the format of Neuronpedia's upload. Raises DictionaryError for an unknown one, SpecError for a bad name."""
    live = [latent for latent in latents if store.columns["count"][store.known(latent)] > 0]
    head = {"modelId": model_id(store), "source": source_id(store, source_set)}
    batches = tuple({**head, "features": [_upload(store, marks, latent) for latent in live[at:at + NEURONPEDIA_BATCH]]}
                    for at in range(0, len(live), NEURONPEDIA_BATCH))
    return Upload(batches, tuple(latent for latent in latents if store.columns["count"][latent] == 0))


def neuronpedia_vectors(store: FeatureStore, marks: Marks, latents: Sequence[int]) -> list[dict[str, Any]]:
    """Directions of features as Neuronpedia's steering vectors: one body of its route for new vectors each.

    A vector is what one unit of the feature writes, so that the default strength is the feature's largest activation.

    Raises:
        SpecError: no feature, too many, or a site other than the residual stream before or after a block.
        DictionaryError: an unknown feature, or the SAE is no longer the one the store was built from.
    """
    if not 0 < len(latents) <= NEURONPEDIA_BATCH:
        raise SpecError(f"{len(latents):,} features; vectors are written of 1 to {NEURONPEDIA_BATCH}", "name some: 1,2,3")
    site = re.fullmatch(r"blocks\.(\d+)\.hook_(resid_pre|resid_post)", str(store.record["site"]))
    if site is None or store.record["d_in"] > MOST_CHANNELS:
        raise SpecError(f"{store.record['site']} with {store.record['d_in']:,} channels: Neuronpedia takes vectors of "
                        f"resid_pre and resid_post, of at most {MOST_CHANNELS:,} channels",
                        "the upload of features works for this one")
    rows = open_sae(store).directions(torch.tensor([store.known(latent) for latent in latents])).double()
    return [{"modelId": model_id(store), "layerNumber": int(site[1]), "hookType": site[2].replace("_", "-"),
             "vector": [round(value, _DIGITS) for value in row.tolist()],
             "vectorDefaultSteerStrength": round(min(float(store.columns["maximum"][latent]), MOST_STRENGTH), 2),
             "vectorLabel": marks.labels.get(latent) or feature_id(store.name, latent)}
            for latent, row in zip(latents, rows, strict=True)]


def _upload(store: FeatureStore, marks: Marks, latent: int) -> dict[str, Any]:
    detail = store.details[latent]
    label = marks.labels.get(latent, "")
    maximum, count = float(store.columns["maximum"][latent]), int(store.columns["count"][latent])
    groups = [(detail["top"], (-1.0, maximum, -1.0))]
    for number in reversed(range(N_INTERVALS)):
        low, high = (maximum * edge / N_INTERVALS for edge in (number, number + 1))
        groups.append((detail["strata"][number], (low, high, float(detail["intervals"][number]) / count)))
    return {"index": latent, "density": float(store.density[latent]),
            "topLogits": _logits(store, detail["promoted"]), "bottomLogits": _logits(store, detail["suppressed"]),
            "explanations": [{"text": label, "methodName": None, "modelName": None}] if label else [],
            "activations": [_activation(store, latent, example, group) for examples, group in groups for example in examples
                            if example["row"] >= 0]}


def _logits(store: FeatureStore, pairs: Any) -> list[dict[str, Any]]:
    return [{"token": store.token(int(pair["id"])), "value": round(float(pair["value"]), _DIGITS)}
            for pair in pairs if pair["id"] >= 0]


def _activation(store: FeatureStore, latent: int, example: Any, group: tuple[float, float, float]) -> dict[str, Any]:
    """A context: 20 tokens before the firing to 10 after it. The top group has −1 for its least value and its share."""
    row, position = int(example["row"]), int(example["position"])
    texts = store.row_texts(row)
    n = int((store.tokens[row] >= 0).sum())
    start, stop = max(0, position - BEFORE), min(n, position + AFTER + 1)
    scale = float(store.columns["maximum"][latent]) / HEAT
    values = [round(float(heat) * scale, _DIGITS) for heat in example["heat"][start - (position - BEFORE):][:stop - start]]
    values[position - start] = round(float(example["value"]), _DIGITS)
    low, high, share = (round(value, _DIGITS) for value in group)
    return {"tokens": texts[start:stop], "values": values, "quantileMin": low, "quantileMax": high, "quantileFraction": share}
