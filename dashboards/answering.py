"""What every route shares: the dashboard behind the server, pages from templates, small JSON bodies, files to keep."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, final

from jinja2 import Environment
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from dashboards.evidence import Evidence, EvidenceShelf
from dashboards.finding import Collection
from dashboards.notes import Notes
from dashboards.prompting import Reader
from dashboards.recipes import RecipeShelf
from dashboards.rendering import environment
from dashboards.runs import RunShelf
from dashboards.saes import SaeShelf
from dashboards.store import FeatureStore
from dashboards.surgeon import Surgeon
from undertow.core.errors import SpecError

MAX_BODY = 65_536


@final
@dataclass(frozen=True, eq=False)
class Dashboard:
    """What the server shows.

    Attributes:
        collection: the stores, and what could not be opened.
        notes: labels, notes and stars; recipes are saved beside them.
        reader: reads prompts.
        surgeon: operates.
        runs: finished runs with their verdicts.
        where: the folder that was looked through, in words.
        evidence: what searches found of the features.
        saes: the SAEs that can be compared.
        templates: the pages' templates.
    """

    collection: Collection
    notes: Notes
    reader: Reader
    surgeon: Surgeon
    runs: RunShelf
    where: str
    evidence: EvidenceShelf = field(default_factory=lambda: EvidenceShelf(None))
    saes: SaeShelf = field(default_factory=lambda: SaeShelf(None))
    templates: Environment = field(default_factory=environment)

    @property
    def recipes(self) -> RecipeShelf:
        """Recipes of the runs, and those that were saved here."""
        return RecipeShelf(self.runs, self.notes.path.parent / "recipes")

    def store(self, key: str) -> FeatureStore:
        """The store of that name. Raises HTTPException 404; a name is only ever looked up, never a path."""
        found = self.collection.stores.get(key)
        if found is None:
            raise HTTPException(404, f"no store called {key!r}; those here: {', '.join(self.collection.stores) or 'none'}")
        return found

    def key_of(self, digest: str) -> str:
        """The name of the first store of the SAE with this digest; "" if there is none."""
        return next((key for key, store in self.collection.stores.items() if store.dictionary == digest), "")


def dashboard_of(request: Request) -> Dashboard:
    """The dashboard that the application was made for."""
    return request.app.state.dashboard


def store_of(request: Request) -> FeatureStore:
    """The store that the address names. Raises HTTPException 404."""
    return dashboard_of(request).store(request.path_params["store"])


def evidence_of(request: Request, key: str) -> Evidence | None:
    """What the search of that name found of the store that the address names. Raises SpecError if there is none of that name.
    """
    return dashboard_of(request).evidence.of(store_of(request)).named(key)


def respond(request: Request, template: str, status: int = 200, **values: Any) -> HTMLResponse:
    """A page; every template knows the stores, and the one that the address names."""
    dashboard = dashboard_of(request)
    key = request.path_params.get("store", "")
    store = dashboard.collection.stores.get(key)
    text = dashboard.templates.get_template(template).render(
        stores=dashboard.collection.stores, key=key if store else "", store=store, base=f"/s/{key}", **values)
    return HTMLResponse(text, status)


def keep(content: bytes | str, name: str, media_type: str) -> Response:
    """A file for the browser to save; `name` holds letters, digits, dots and hyphens only."""
    return Response(content, media_type=media_type, headers={"content-disposition": f'attachment; filename="{name}"'})


async def json_body(stream: AsyncIterator[bytes]) -> dict[str, Any]:
    """The JSON object in a small body. Raises HTTPException 413, or SpecError if it is none."""
    body = b""
    async for part in stream:
        body += part
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"a request has at most {MAX_BODY:,} bytes")
    try:
        found = json.loads(body)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise SpecError("the body of the request is no JSON object")
    return found
