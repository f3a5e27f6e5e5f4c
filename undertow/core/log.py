"""Logging set-up. Library code calls `logging.getLogger(__name__)`; only the command line calls `configure`."""

from __future__ import annotations

import logging
import sys


def configure(verbose: bool) -> None:
    """Send the log of our rooms to standard error: information always, debugging with `verbose`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    for room in ("undertow", "sae", "features", "interventions", "dashboards"):
        logger = logging.getLogger(room)
        logger.handlers = [handler]
        logger.setLevel(logging.DEBUG if verbose else logging.INFO)
        logger.propagate = False
