"""Runs and their verdicts over HTTP."""

from __future__ import annotations

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashboards.answering import dashboard_of, keep, respond
from dashboards.runs import ICONS, MEANINGS, Run, run_page
from dashboards.store import slug
from undertow.core.errors import ArtifactError


def routes() -> list[Route]:
    """The routes of the runs."""
    return [Route("/runs", _list), Route("/runs/{run}", _run), Route("/runs/{run}/report.html", _report),
            Route("/runs/{run}/summary.json", _summary)]


def _list(request: Request) -> Response:
    dashboard = dashboard_of(request)
    return respond(request, "runs.html", runs=dashboard.runs.list(), where=dashboard.where, icons=ICONS, meanings=MEANINGS)


def _run(request: Request) -> Response:
    dashboard = dashboard_of(request)
    shown = run_page(_known(request))
    of_recipe = dashboard.key_of(shown.recipe.sae) if shown.recipe else ""
    return respond(request, "run.html", page=shown, icons=ICONS, meanings=MEANINGS, of_recipe=of_recipe)


def _report(request: Request) -> Response:
    return _file(_known(request), "report.html", "text/html")


def _summary(request: Request) -> Response:
    return _file(_known(request), "summary.json", "application/json")


def _file(run: Run, name: str, media_type: str) -> Response:
    try:
        return keep((run.path / name).read_bytes(), f"{slug(run.key)}-{name}", media_type)
    except OSError as error:
        raise ArtifactError(f"{run.path / name} cannot be read: {error.strerror}") from None


def _known(request: Request) -> Run:
    """The run of that name. Raises HTTPException 404; a name is only ever looked up, never a path."""
    runs = dashboard_of(request).runs.list().found
    if (found := runs.get(request.path_params["run"])) is None:
        raise HTTPException(404, f"no run called {request.path_params['run']!r}; those here: {', '.join(runs) or 'none'}")
    return found
