"""The dashboard as an ASGI application: routes to pages. Pages are values made elsewhere; here they meet HTTP."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable

from pydantic import Field
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dashboards import compare_routes, export_routes, run_routes, surgery_routes
from dashboards.answering import Dashboard, dashboard_of, evidence_of, json_body, respond, store_of
from dashboards.evidence import search_command
from dashboards.feature_page import Display, feature_page, to_json
from dashboards.finding import advice
from dashboards.guard import Access, Guard
from dashboards.notes import MAX_LABEL, MAX_NOTE
from dashboards.prompting import MAX_PROMPT, Ask, BusyError, prompt_page
from dashboards.rendering import STATIC, link
from dashboards.runs import ICONS
from dashboards.store import build_command
from dashboards.table import Query, select
from dashboards.table_page import table_page
from undertow.core.errors import DictionaryError, SpecError, StorageError, TextError, UserError
from undertow.core.spec import Spec

log = logging.getLogger(__name__)
_STATUS = ((BusyError, 503), (DictionaryError, 404), (SpecError, 400), (TextError, 400), (StorageError, 507))


class _Written(Spec):
    """Body of a request that writes a label or a note."""

    text: str = Field(max_length=MAX_NOTE)


class _Starred(Spec):
    """Body of a request that stars a feature or takes the star away."""

    on: bool


def create_app(dashboard: Dashboard, access: Access) -> Guard:
    """The application that serves `dashboard` to those whom `access` lets in.

    The guard stands outside everything, so that error pages carry its headers too.
    """
    feature = "/s/{store}/f/{latent:int}"
    routes = [
        Route("/", _home), Route("/healthz", _health),
        Route("/s/{store}", _about), Route("/s/{store}/features", _features), Route("/s/{store}/go", _go),
        Route("/s/{store}/random", _random), Route("/s/{store}/prompt", _prompt),
        Route(feature, _feature), Route(f"{feature}.json", _feature_json),
        Route(f"{feature}/label", _label, methods=["POST"]), Route(f"{feature}/note", _note, methods=["POST"]),
        Route(f"{feature}/star", _star, methods=["POST"]),
        *surgery_routes.routes(), *run_routes.routes(), *compare_routes.routes(), *export_routes.routes(),
        Mount("/static", StaticFiles(directory=STATIC), name="static"),
    ]
    app = Starlette(routes=routes, exception_handlers={UserError: _user_error, HTTPException: _http_error, Exception: _bug})
    app.state.dashboard = dashboard
    return Guard(app, access)


def _home(request: Request) -> Response:
    dashboard = dashboard_of(request)
    found = dashboard.collection
    return respond(request, "home.html", collection=found, where=dashboard.where, advice=[advice(sae) for sae in found.bare],
                   runs=dashboard.runs.list().found, icons=ICONS)


def _health(request: Request) -> Response:
    return JSONResponse({"stores": list(dashboard_of(request).collection.stores)})


def _about(request: Request) -> Response:
    store = store_of(request)
    return respond(request, "about.html", command=build_command(store.record))


def _features(request: Request) -> Response:
    dashboard = dashboard_of(request)
    store = store_of(request)
    query = Query.read(request.query_params)
    searches = dashboard.evidence.of(store)
    chosen = searches.named(query.sought.evidence)
    page = table_page(store, dashboard.notes.marks(store.dictionary), query, chosen)
    return respond(request, "features.html", query=query, typed=query.words(), page=page, words=query.params(page=query.page),
                   searches=searches, evidence=chosen, search=search_command(store))


def _feature(request: Request) -> Response:
    dashboard = dashboard_of(request)
    store, latent = store_of(request), request.path_params["latent"]
    query, display = Query.read(request.query_params), Display.read(request.query_params)
    searches = dashboard.evidence.of(store)
    page = feature_page(store, latent, dashboard.notes, display, list(searches.found.values()))
    marks = dashboard.notes.marks(store.dictionary)
    selection = select(store, marks, query, searches.named(query.sought.evidence))
    return respond(request, "feature.html", search=search_command(store), page=page, query=query, display=display,
                   words=query.params(page=query.page),
                   around=selection.around(latent), n_passing=len(selection.latents), starred=latent in marks.starred,
                   label=marks.labels.get(latent, ""), max_label=MAX_LABEL, max_note=MAX_NOTE)


def _feature_json(request: Request) -> Response:
    dashboard = dashboard_of(request)
    store, latent = store_of(request), request.path_params["latent"]
    page = feature_page(store, latent, dashboard.notes, Display.read(request.query_params),
                        list(dashboard.evidence.of(store).found.values()))
    return JSONResponse(to_json(page))


def _prompt(request: Request) -> Response:
    dashboard = dashboard_of(request)
    store = store_of(request)
    ask = Ask.read(request.query_params)
    page = None
    if ask.text.strip():
        labels = dashboard.notes.marks(store.dictionary).labels
        page = prompt_page(store, labels, ask, dashboard.reader.read(store, ask.text))
    return respond(request, "prompt.html", ask=ask, page=page, max_prompt=MAX_PROMPT)


def _go(request: Request) -> Response:
    """To a feature by number, as typed."""
    store = store_of(request)
    typed = request.query_params.get("latent", "").strip().rpartition(":")[2]
    if not (typed.isascii() and typed.isdigit()):
        raise SpecError(f"{typed!r} is no feature", f"type a number from 0 to {store.d_sae - 1}")
    return RedirectResponse(f"/s/{request.path_params['store']}/f/{store.known(int(typed))}", 303)


def _random(request: Request) -> Response:
    """To a feature drawn at random from those that fire and pass the filters."""
    dashboard = dashboard_of(request)
    store = store_of(request)
    query = Query.read(request.query_params)
    selection = select(store, dashboard.notes.marks(store.dictionary), query, evidence_of(request, query.sought.evidence))
    live = selection.latents[store.columns["count"][selection.latents] > 0]
    if not len(live):
        raise SpecError("no feature that fires passes the filters", f"clear them: /s/{request.path_params['store']}/features")
    chosen = int(live[secrets.randbelow(len(live))])
    return RedirectResponse(link(f"/s/{request.path_params['store']}/f/{chosen}", query.params(page=query.page)), 303)


async def _label(request: Request) -> Response:
    return await _write(request, _Written, lambda notes, sae, latent, body: notes.add_label(sae, latent, body.text))


async def _note(request: Request) -> Response:
    return await _write(request, _Written, lambda notes, sae, latent, body: notes.add_note(sae, latent, body.text))


async def _star(request: Request) -> Response:
    return await _write(request, _Starred, lambda notes, sae, latent, body: notes.star(sae, latent, body.on))


async def _write(request: Request, kind: type[Spec], act: Callable[..., None]) -> Response:
    """Read a small JSON body and act on a feature that exists."""
    dashboard = dashboard_of(request)
    store = store_of(request)
    latent = store.known(request.path_params["latent"])
    body = kind.checked(await json_body(request.stream()), "the request")
    await run_in_threadpool(act, dashboard.notes, store.dictionary, latent, body)
    return JSONResponse({"latent": latent})


def _error(request: Request, status: int, what: str, hint: str) -> Response:
    if request.method == "POST" or request.url.path.endswith(".json"):
        return JSONResponse({"error": what, "hint": hint}, status)
    return respond(request, "error.html", status, code=status, what=what, hint=hint)


def _user_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, UserError)
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 409)
    return _error(request, status, error.what, error.hint)


def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(request, error.status_code, error.detail, "")


def _bug(request: Request, error: Exception) -> Response:
    log.error("a bug while answering %s", request.url.path, exc_info=error)
    return _error(request, 500, "this page met a bug", "the terminal that undertow dashboard runs in has the traceback")
