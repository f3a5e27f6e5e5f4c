"""The local page that shows the features of an SAE, and operates on them: store, pages, surgery, runs, notes, server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undertow.core.lazy import lazy_names

if TYPE_CHECKING:
    from dashboards.answering import Dashboard
    from dashboards.building import Built, Source, build_store
    from dashboards.finding import Collection, collect
    from dashboards.guard import Access, access_for
    from dashboards.models import Models
    from dashboards.notes import Notes
    from dashboards.operation import Operation
    from dashboards.prompting import Reader
    from dashboards.runs import RunShelf
    from dashboards.server import create_app
    from dashboards.store import FeatureStore, open_feature_store
    from dashboards.surgeon import Surgeon

__all__ = ["Access", "Built", "Collection", "Dashboard", "FeatureStore", "Models", "Notes", "Operation", "Reader", "RunShelf",
           "Source", "Surgeon", "access_for", "build_store", "collect", "create_app", "open_feature_store"]
__getattr__ = lazy_names(__name__, {
    "Built": "building", "Source": "building", "build_store": "building",
    "Collection": "finding", "collect": "finding", "Access": "guard", "access_for": "guard",
    "Models": "models", "Notes": "notes", "Operation": "operation", "Reader": "prompting", "RunShelf": "runs",
    "Dashboard": "answering", "create_app": "server", "FeatureStore": "store", "open_feature_store": "store",
    "Surgeon": "surgeon",
})
