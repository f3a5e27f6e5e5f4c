"""The operating table over HTTP: the page, its stream, recipes to load, save and download."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, final

import anyio
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from dashboards.answering import dashboard_of, json_body, keep, respond, store_of
from dashboards.operating import Event
from dashboards.operation import KINDS, MAX_EDITS, MAX_NAME, Edit, Operation, Turn, defaults, from_recipe, recipe_file
from dashboards.prompting import MAX_PROMPT
from dashboards.recipes import recipe_yaml
from dashboards.rendering import link_pairs
from dashboards.surgeon import Running
from dashboards.surgery_page import surgery_page
from undertow.core.errors import SpecError, UserError
from undertow.core.spec import Spec

log = logging.getLogger(__name__)
_NDJSON = b"application/x-ndjson"


class _Asked(Spec):
    """Body of a request to operate or to save: the words of the page's address, and a word that the open page drew for itself.

    A page that operates again means to replace its own operation, which may not have been seen to be cancelled yet.
    """

    query: str
    page: str = Field(default="", max_length=100)


def routes() -> list[Route]:
    """The routes of the operating table."""
    table = "/s/{store}/surgery"
    return [Route("/surgery", _anywhere), Route(table, _table), Route(f"{table}/recipe.yaml", _download),
            Route(f"{table}/run", _run, methods=["POST"]), Route(f"{table}/save", _save, methods=["POST"])]


def _anywhere(request: Request) -> Response:
    """To the operating table of the only store, or of the one that `store` names; else a choice."""
    dashboard = dashboard_of(request)
    words = [(name, value) for name, value in request.query_params.multi_items() if name != "store"]
    keys = [request.query_params["store"]] if "store" in request.query_params else list(dashboard.collection.stores)
    if len(keys) == 1:
        dashboard.store(keys[0])
        return RedirectResponse(link_pairs(f"/s/{keys[0]}/surgery", words), 303)
    return respond(request, "surgery_choose.html", words=words)


def _table(request: Request) -> Response:
    dashboard, store = dashboard_of(request), store_of(request)
    params = request.query_params
    operation = Operation.read(params)
    if (moved := _moved(operation, params)) is None and (key := params.get("load")):
        moved = from_recipe(dashboard.recipes.get(store.dictionary, key), store, operation)
    if moved is not None:
        return RedirectResponse(link_pairs(request.url.path, moved.known(store).pairs()), 303)
    shown = surgery_page(store, operation, dashboard.notes.marks(store.dictionary), dashboard.recipes,
                         dashboard.surgeon.models.has_chat(store))
    here = request.url.path
    return respond(request, "surgery.html", page=shown, operation=operation, here=here, kinds=KINDS, max_prompt=MAX_PROMPT,
                   max_name=MAX_NAME, defaults=defaults(), permalink=link_pairs(here, operation.pairs()),
                   as_chat=link_pairs(here, operation.pairs(turns=(Turn(role="user", text=operation.turns[0].text),))),
                   as_text=link_pairs(here, operation.pairs(turns=(Turn(text=operation.turns[-1].text),))),
                   lexicon=dashboard.surgeon.lexicon.name)


def _moved(operation: Operation, params: QueryParams) -> Operation | None:
    """The operating table after a button that moves an edit or a turn; None if none was pressed."""
    if (add := params.get("add", "").strip().rpartition(":")[2]):
        if not (add.isascii() and add.isdigit()):
            raise SpecError(f"{add!r} is no feature's number", "type a number and press Add")
        if len(operation.edits) >= MAX_EDITS:
            raise SpecError(f"there are {MAX_EDITS} edits on the table, and no room for more", "remove one first")
        return operation.model_copy(update={"edits": (*operation.edits, Edit(latent=int(add)))})
    for name, field, parts in (("drop", "edits", operation.edits), ("unsay", "turns", operation.turns)):
        if (at := params.get(name, "")).isascii() and at.isdigit() and int(at) < len(parts):
            left = tuple(part for number, part in enumerate(parts) if number != int(at))
            return operation.model_copy(update={field: left or ((Turn(role="user"),) if field == "turns" else ())})
    if params.get("turn") in ("system", "user", "assistant"):
        return operation.model_copy(update={"turns": (*operation.turns, Turn.checked({"role": params["turn"]}))})
    return None


def _download(request: Request) -> Response:
    recipe = Operation.read(request.query_params).recipe(store_of(request))
    return keep(recipe_yaml(recipe), recipe_file(recipe), "application/yaml")


async def _save(request: Request) -> Response:
    store, dashboard = store_of(request), dashboard_of(request)
    operation = (await _asked(request))[0]
    recipe = operation.recipe(store)
    path = await run_in_threadpool(dashboard.recipes.save, recipe)
    return JSONResponse({"path": str(path), "file": path.name, "digest": recipe.digest()})


async def _run(request: Request) -> _Stream:
    """Operate, and stream what happens: one JSON object a line. Refused with 409 while another page's operation runs."""
    store, surgeon = store_of(request), dashboard_of(request).surgeon
    operation, page = await _asked(request)
    operation.recipe(store)  # what can be refused at once is
    loop, queue = asyncio.get_running_loop(), asyncio.Queue[Event | None]()

    def put(event: Event | None) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(queue.put_nowait, event)

    running = await run_in_threadpool(surgeon.slot.start, lambda stopped: surgeon.events(store, operation, stopped), put,
                                      page)
    return _Stream(queue, running)


async def _asked(request: Request) -> tuple[Operation, str]:
    body = _Asked.checked(await json_body(request.stream()), "the request")
    return Operation.read(QueryParams(body.query)), body.page


@final
class _Stream:
    """The answer that carries an operation; the operation stops when the client goes, for whatever reason."""

    def __init__(self, queue: asyncio.Queue[Event | None], running: Running) -> None:
        self._queue, self._running = queue, running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(self._until_gone, receive, group.cancel_scope)
                await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", _NDJSON)]})
                while (event := await self._queue.get()) is not None:
                    await send(_line(event))
                if (failure := self._running.failure()) is not None:
                    await send(_line(_failed(failure)))
                await send({"type": "http.response.body", "body": b"", "more_body": False})
                group.cancel_scope.cancel()
        finally:
            self._running.stop()

    async def _until_gone(self, receive: Receive, scope: anyio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        scope.cancel()


def _line(event: dict[str, Any]) -> Message:
    return {"type": "http.response.body", "body": json.dumps(event, allow_nan=False).encode() + b"\n", "more_body": True}


def _failed(failure: BaseException) -> Event:
    if isinstance(failure, UserError):
        return {"kind": "error", "error": failure.what, "hint": failure.hint}
    log.error("a bug while operating", exc_info=failure)
    return {"kind": "error", "error": "this operation met a bug",
            "hint": "the terminal that undertow dashboard runs in has the traceback"}
