"""Names of the places in a forward pass that can be read and edited.

The names are TransformerLens' canonical ones. We check them ourselves: on a TransformerBridge a misspelt hook name runs
silently unchanged, which is a perfect and false null result.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple, cast, final

from undertow.core.errors import SiteError, near_matches

SiteKind = Literal["resid_pre", "resid_post"]
_PATTERN = re.compile(r"blocks\.(\d+)\.hook_(resid_pre|resid_post)")


@final
class Site(NamedTuple):
    """One place: the residual stream before or after block `layer` (0-based)."""

    layer: int
    kind: SiteKind

    @property
    def name(self) -> str:
        """TransformerLens' name, e.g. `blocks.12.hook_resid_post`."""
        return f"blocks.{self.layer}.hook_{self.kind}"


def site_names(n_layers: int) -> list[str]:
    """Every site of a model with `n_layers` blocks."""
    return [f"blocks.{layer}.hook_{kind}" for layer in range(n_layers) for kind in ("resid_pre", "resid_post")]


def parse_site(name: str, n_layers: int, subject: str) -> Site:
    """Site called `name`. Raises SiteError with near matches if the subject has none of that name."""
    match = _PATTERN.fullmatch(name)
    if match is None:
        hint = near_matches(name, site_names(n_layers)) or "write it as blocks.LAYER.hook_resid_post"
        raise SiteError(f"unknown site {name!r} for {subject}", hint)
    layer = int(match[1])
    if layer >= n_layers:
        raise SiteError(f"{name!r} is out of range: {subject} has {n_layers} blocks",
                        f"choose a layer from 0 to {n_layers - 1}")
    return Site(layer, cast(SiteKind, match[2]))
