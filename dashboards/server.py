"""The dashboard as an ASGI application: routes to pages. Pages are values made elsewhere; here they meet HTTP."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any, final

from jinja2 import Environment
from pydantic import Field
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dashboards.feature_page import Display, feature_page, to_json
from dashboards.finding import Collection, advice
from dashboards.guard import Access, Guard
from dashboards.notes import MAX_LABEL, MAX_NOTE, Notes
from dashboards.prompting import MAX_PROMPT, Ask, BusyError, Reader, prompt_page
from dashboards.rendering import STATIC, environment, link
from dashboards.store import FeatureStore, build_command
from dashboards.table import Query, select
from dashboards.table_page import table_page
from undertow.core.errors import DictionaryError, SpecError, StorageError, TextError, UserError
from undertow.core.spec import Spec

log = logging.getLogger(__name__)
MAX_BODY = 65_536
_STATUS = ((BusyError, 503), (DictionaryError, 404), (SpecError, 400), (TextError, 400), (StorageError, 507))


@final
@dataclass(frozen=True, eq=False)
class Dashboard:
    """What the server shows.

    Attributes:
        collection: the stores, and what could not be opened.
        notes: labels, notes and stars.
        reader: reads prompts.
        where: the folder that was looked through, in words.
        templates: the pages' templates.
    """

    collection: Collection
    notes: Notes
    reader: Reader
    where: str
    templates: Environment = field(default_factory=environment)

    def store(self, key: str) -> FeatureStore:
        """The store of that name. Raises HTTPException 404; a name is only ever looked up, never a path."""
        found = self.collection.stores.get(key)
        if found is None:
            raise HTTPException(404, f"no store called {key!r}; those here: {', '.join(self.collection.stores) or 'none'}")
        return found


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
        Mount("/static", StaticFiles(directory=STATIC), name="static"),
    ]
    app = Starlette(routes=routes, exception_handlers={UserError: _user_error, HTTPException: _http_error, Exception: _bug})
    app.state.dashboard = dashboard
    return Guard(app, access)


def _dashboard(request: Request) -> Dashboard:
    return request.app.state.dashboard


def _page(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    dashboard = _dashboard(request)
    key = request.path_params.get("store", "")
    store = dashboard.collection.stores.get(key)
    text = dashboard.templates.get_template(template).render(
        stores=dashboard.collection.stores, key=key if store else "", store=store, base=f"/s/{key}", **values)
    return HTMLResponse(text, status)


def _home(request: Request) -> Response:
    found = _dashboard(request).collection
    return _page(request, "home.html", collection=found, where=_dashboard(request).where,
                 advice=[advice(sae) for sae in found.bare])


def _health(request: Request) -> Response:
    return JSONResponse({"stores": list(_dashboard(request).collection.stores)})


def _about(request: Request) -> Response:
    store = _dashboard(request).store(request.path_params["store"])
    return _page(request, "about.html", command=build_command(store.record))


def _features(request: Request) -> Response:
    dashboard = _dashboard(request)
    store = dashboard.store(request.path_params["store"])
    query = Query.read(request.query_params)
    page = table_page(store, dashboard.notes.marks(store.dictionary), query)
    return _page(request, "features.html", query=query, page=page, words=query.params(page=query.page))


def _feature(request: Request) -> Response:
    dashboard = _dashboard(request)
    store, latent = dashboard.store(request.path_params["store"]), request.path_params["latent"]
    query, display = Query.read(request.query_params), Display.read(request.query_params)
    page = feature_page(store, latent, dashboard.notes, display)
    marks = dashboard.notes.marks(store.dictionary)
    selection = select(store, marks, query)
    return _page(request, "feature.html", page=page, query=query, display=display, words=query.params(page=query.page),
                 around=selection.around(latent), n_passing=len(selection.latents), starred=latent in marks.starred,
                 label=marks.labels.get(latent, ""), max_label=MAX_LABEL, max_note=MAX_NOTE)


def _feature_json(request: Request) -> Response:
    dashboard = _dashboard(request)
    store, latent = dashboard.store(request.path_params["store"]), request.path_params["latent"]
    return JSONResponse(to_json(feature_page(store, latent, dashboard.notes, Display.read(request.query_params))))


def _prompt(request: Request) -> Response:
    dashboard = _dashboard(request)
    store = dashboard.store(request.path_params["store"])
    ask = Ask.read(request.query_params)
    page = None
    if ask.text.strip():
        labels = dashboard.notes.marks(store.dictionary).labels
        page = prompt_page(store, labels, ask, dashboard.reader.read(store, ask.text))
    return _page(request, "prompt.html", ask=ask, page=page, max_prompt=MAX_PROMPT)


def _go(request: Request) -> Response:
    """To a feature by number, as typed."""
    store = _dashboard(request).store(request.path_params["store"])
    typed = request.query_params.get("latent", "").strip().rpartition(":")[2]
    if not (typed.isascii() and typed.isdigit()):
        raise SpecError(f"{typed!r} is no feature", f"type a number from 0 to {store.d_sae - 1}")
    return RedirectResponse(f"/s/{request.path_params['store']}/f/{store.known(int(typed))}", 303)


def _random(request: Request) -> Response:
    """To a feature drawn at random from those that fire and pass the filters."""
    dashboard = _dashboard(request)
    store = dashboard.store(request.path_params["store"])
    query = Query.read(request.query_params)
    selection = select(store, dashboard.notes.marks(store.dictionary), query)
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
    dashboard = _dashboard(request)
    store = dashboard.store(request.path_params["store"])
    latent = store.known(request.path_params["latent"])
    body = kind.checked(_json_object(await _small_body(request.stream())), "the request")
    await run_in_threadpool(act, dashboard.notes, store.dictionary, latent, body)
    return JSONResponse({"latent": latent})


async def _small_body(stream: AsyncIterator[bytes]) -> bytes:
    body = b""
    async for part in stream:
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"a request has at most {MAX_BODY:,} bytes")
    return body


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SpecError("the body of the request is no JSON object")
    return found


def _error(request: Request, status: int, what: str, hint: str) -> Response:
    if request.method == "POST" or request.url.path.endswith(".json"):
        return JSONResponse({"error": what, "hint": hint}, status)
    return _page(request, "error.html", status, code=status, what=what, hint=hint)


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
