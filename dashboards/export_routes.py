"""Files to keep over HTTP: the filtered table, and some features as one page or as Neuronpedia's upload."""

from __future__ import annotations

import json

from jaxtyping import Int64
from numpy import ndarray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboards.answering import dashboard_of, evidence_of, keep, store_of
from dashboards.evidence import Evidence
from dashboards.export import (
    NEURONPEDIA_BATCH,
    SOURCE_SET,
    csv_bytes,
    html_page,
    known_latents,
    neuronpedia,
    neuronpedia_vectors,
    parquet_bytes,
    table_of,
)
from dashboards.notes import Marks
from dashboards.store import FeatureStore, slug
from dashboards.table import PAGE, Query, select
from undertow.core.errors import SpecError


def routes() -> list[Route]:
    """The routes of the exports."""
    export = "/s/{store}/export"
    return [Route(f"{export}/features.csv", _csv), Route(f"{export}/features.parquet", _parquet),
            Route(f"{export}/features.html", _html), Route(f"{export}/neuronpedia.json", _neuronpedia),
            Route(f"{export}/neuronpedia-vectors.json", _vectors)]


def _csv(request: Request) -> Response:
    return keep(csv_bytes(table_of(*_filtered(request))), _name(store_of(request), "csv"), "text/csv; charset=utf-8")


def _parquet(request: Request) -> Response:
    name = _name(store_of(request), "parquet")
    return keep(parquet_bytes(table_of(*_filtered(request))), name, "application/vnd.apache.parquet")


def _html(request: Request) -> Response:
    store = store_of(request)
    return keep(html_page(store, _chosen(request, PAGE), dashboard_of(request).notes), _name(store, "html"), "text/html")


def _neuronpedia(request: Request) -> Response:
    store = store_of(request)
    marks = dashboard_of(request).notes.marks(store.dictionary)
    made = neuronpedia(store, marks, _chosen(request, NEURONPEDIA_BATCH), SOURCE_SET)
    if not made.batches:
        raise SpecError("none of these features ever fired, and Neuronpedia takes only features with an activation",
                        "choose others")
    return keep(json.dumps(made.batches[0], ensure_ascii=False), f"{slug(store.name)}-neuronpedia.json", "application/json")


def _vectors(request: Request) -> Response:
    store = store_of(request)
    latents = known_latents(store, request.query_params.get("latents", ""), NEURONPEDIA_BATCH)
    made = neuronpedia_vectors(store, dashboard_of(request).notes.marks(store.dictionary), latents)
    return keep(json.dumps(made, ensure_ascii=False), f"{slug(store.name)}-neuronpedia-vectors.json", "application/json")


def _filtered(request: Request) -> tuple[FeatureStore, Marks, Int64[ndarray, "n"], Evidence | None]:
    """The store, its marks, the features that pass the filters of the address, sorted, and what a search found of them."""
    store = store_of(request)
    marks = dashboard_of(request).notes.marks(store.dictionary)
    query = Query.read(request.query_params)
    evidence = evidence_of(request, query.sought.evidence)
    selection = select(store, marks, query, evidence)
    return store, marks, selection.window(0, len(selection.latents)), evidence


def _chosen(request: Request, most: int) -> list[int]:
    """The features that the address names by number, or else those of the table's page. Raises SpecError, DictionaryError."""
    store = store_of(request)
    if (typed := request.query_params.get("latents", "").strip()):
        return known_latents(store, typed, most)
    query = Query.read(request.query_params)
    selection = select(store, dashboard_of(request).notes.marks(store.dictionary), query,
                       evidence_of(request, query.sought.evidence))
    return [int(latent) for latent in selection.window((query.page - 1) * PAGE, query.page * PAGE)]


def _name(store: FeatureStore, ending: str) -> str:
    return f"{slug(store.name)}-features.{ending}"
