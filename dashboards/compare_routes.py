"""SAEs side by side over HTTP: which ones is in the address."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboards.answering import dashboard_of, respond
from dashboards.compare_page import WORDS, compare_page
from dashboards.saes import MOST, Sae
from undertow.core.errors import SpecError


def routes() -> list[Route]:
    """The route of the comparison."""
    return [Route("/compare", _compare)]


def _compare(request: Request) -> Response:
    """The SAEs that the address names, and a list to choose from; with fewer than two of them only the list."""
    dashboard = dashboard_of(request)
    known = dashboard.saes.all(dashboard.collection.stores)
    chosen = _chosen(request, known)
    page = None
    if len(chosen) > 1:
        wanted = request.query_params.get("overlap") == "yes"
        page = compare_page(chosen, dashboard.saes.overlap(chosen) if wanted else None)
    return respond(request, "compare.html", known=known, chosen=[sae.key for sae in chosen], page=page, cues=WORDS, most=MOST,
                   where=dashboard.where)


def _chosen(request: Request, known: dict[str, Sae]) -> list[Sae]:
    """Each once, in the order of the address. Raises HTTPException 404; a name is only ever looked up, never a path."""
    keys = [key for key in dict.fromkeys(request.query_params.getlist("s")) if key]
    unknown = next((key for key in keys if key not in known), None)
    if unknown is not None:
        raise HTTPException(404, f"no SAE called {unknown!r}; those here: {', '.join(known) or 'none'}")
    if len(keys) > MOST:
        raise SpecError(f"{len(keys)} SAEs are too many for one page; at most {MOST}", "choose fewer: /compare")
    return [known[key] for key in keys]
