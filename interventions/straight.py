"""The straight path: what an operation writes through the unembedding alone, with all later blocks' outputs held fixed.

Held fixed, the delta of an operation stands unchanged at the end of the last block, at the token where it was made and nowhere
else. So the delta is computed at the recipe's site and added there instead: the blocks between see nothing of it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interventions.applying import FeatureSurgery, Operated, first_window
from interventions.recipe import Recipe, check
from sae.dictionary import Dictionary
from undertow.subjects.sites import Site
from undertow.subjects.splicing import EditResult, splice
from undertow.subjects.subject import Subject


@contextlib.contextmanager
def straight(recipe: Recipe, subject: Subject, dictionary: Dictionary) -> Iterator[Operated]:
    """As `apply`, but only the straight path of the edit acts: (change of D under it) / (change of D under `apply`) is the
    act-writer share of the operation. Exactly 0 for a recipe that ends before the decision.

    Raises what `apply` raises.
    """
    check(recipe, subject, dictionary)
    site, last = subject.site(recipe.site), Site(subject.n_layers - 1, "resid_post")
    window = first_window(recipe.window)
    made = _Made(FeatureSurgery(dictionary.to(subject.device), recipe.edits, recipe.trigger))
    with (splice(subject, site, made.at_site, recipe.norm_ceiling, window, recipe.memory) as counts,
          splice(subject, last, made.at_end, None, window, recipe.memory)):
        yield Operated(subject, window, recipe.window, counts)


@final
@dataclass
class _Made:
    """The delta of the pass under way, on its way from the site to the end."""

    edit: FeatureSurgery
    result: list[EditResult] = field(default_factory=list)

    def at_site(self, x: Float[Tensor, "batch pos d_model"], editable: Bool[Tensor, "batch pos"]) -> EditResult:
        found = self.edit(x, editable)
        fired = found.fired & editable
        self.result[:] = [EditResult(found.delta, fired)]
        return EditResult(torch.zeros_like(found.delta), fired)

    def at_end(self, x: Float[Tensor, "batch pos d_model"], editable: Bool[Tensor, "batch pos"]) -> EditResult:
        return self.result[0]
