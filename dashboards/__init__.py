"""The local page that shows the features of an SAE: store, pages, notes, server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undertow.core.lazy import lazy_names

if TYPE_CHECKING:
    from dashboards.building import Built, Source, build_store
    from dashboards.finding import Collection, collect
    from dashboards.guard import Access, access_for
    from dashboards.notes import Notes
    from dashboards.prompting import Reader
    from dashboards.server import Dashboard, create_app
    from dashboards.store import FeatureStore, open_feature_store

__all__ = ["Access", "Built", "Collection", "Dashboard", "FeatureStore", "Notes", "Reader", "Source", "access_for",
           "build_store", "collect", "create_app", "open_feature_store"]
__getattr__ = lazy_names(__name__, {
    "Built": "building", "Source": "building", "build_store": "building",
    "Collection": "finding", "collect": "finding", "Access": "guard", "access_for": "guard",
    "Notes": "notes", "Reader": "prompting", "Dashboard": "server", "create_app": "server",
    "FeatureStore": "store", "open_feature_store": "store",
})
