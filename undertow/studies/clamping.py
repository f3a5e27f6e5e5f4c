"""The re-entry test: what is left of an arm's effect when the word may not come back in later blocks.

At every block after the edit the projection of the stream on the word's axes is held at the value that it has, at the same
token, in the untouched subject. So what the arm does there cannot pass by those axes. The unsaid ratio is
(D with the axes held − D untouched) / (D of the arm − D untouched); axes drawn at random, as many of them, are the control.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from undertow.core.errors import EditError
from undertow.core.seeds import generator
from undertow.studies.conditions import Condition, Under
from undertow.studies.measures import by_unit, questions
from undertow.studies.situations import Teller
from undertow.subjects.organisms.measuring import ask
from undertow.subjects.sites import Site
from undertow.subjects.splicing import EditResult, splice
from undertow.subjects.subject import Subject

Axes = Mapping[int, Float[Tensor, "axis d_model"]]
"""Orthonormal rows for every block that is held, by its number."""


@final
class Held:
    """Edits that first note the projections of one run, pass by pass, and then hold another run of the same passes to them."""

    def __init__(self, axes: Axes) -> None:
        self.axes = axes
        self._noted: dict[int, list[Tensor]] = {layer: [] for layer in axes}
        self._at: dict[int, int] = dict.fromkeys(axes, 0)

    @contextlib.contextmanager
    def noting(self, subject: Subject) -> Iterator[None]:
        """Note the projections of what runs in the block; nothing is changed."""
        with self._spliced(subject, self._note):
            yield

    @contextlib.contextmanager
    def holding(self, subject: Subject) -> Iterator[None]:
        """Hold what runs in the block, which must be the same passes in the same order. Raises EditError if it is not."""
        self._at = dict.fromkeys(self.axes, 0)
        with self._spliced(subject, self._hold):
            yield

    @contextlib.contextmanager
    def _spliced(self, subject: Subject, edit: Any) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for layer in self.axes:
                stack.enter_context(splice(subject, Site(layer, "resid_post"), _At(edit, layer)))
            yield

    def _note(self, layer: int, x: Tensor, editable: Tensor) -> EditResult:
        self._noted[layer].append((x @ self.axes[layer].to(x).T).detach())
        return EditResult(torch.zeros_like(x), editable)

    def _hold(self, layer: int, x: Tensor, editable: Tensor) -> EditResult:
        place = self._at[layer]
        axes, noted = self.axes[layer].to(x), self._noted[layer]
        if place >= len(noted) or noted[place].shape[:2] != x.shape[:2]:
            raise EditError(f"pass {place} over block {layer} is not the one that was noted, so nothing can be held to it",
                            "the arm must run the same prompts in the same batches as the untouched subject")
        self._at[layer] = place + 1
        return EditResult((noted[place] - x @ axes.T) @ axes, editable)


class _At(NamedTuple):
    """An edit of one block."""

    edit: Any
    layer: int

    def __call__(self, x: Float[Tensor, "batch pos d_model"], editable: Bool[Tensor, "batch pos"]) -> EditResult:
        return self.edit(self.layer, x, editable)


def random_axes(axes: Axes, seed: int) -> dict[int, Tensor]:
    """As many orthonormal rows in every block, drawn at random."""
    return {layer: torch.linalg.qr(torch.randn(rows.shape[1], rows.shape[0], generator=generator(seed, "axes", layer))).Q.T
            for layer, rows in axes.items()}


def unsaid(condition: Condition, teller: Teller, stories: Sequence[int], untouched: Subject, axes: Axes) -> dict[str, Any]:
    """D of every unit (mean over its tellings), nats: of the untouched subject, of the arm, with the word's axes held, and with
    random ones held."""
    asked, _ = questions(condition, teller, stories, untouched)

    def d(under: Under) -> list[float]:
        answers = ask(under.subject, asked, announce=under.announce)
        return by_unit([answer.log_ratio(*teller.acts()) for answer in answers], len(stories))

    found: dict[str, Any] = {"story": list(stories)}
    for name, chosen in (("D_held", axes), ("D_random_held", random_axes(axes, teller.seed))):
        held = Held(chosen)
        with held.noting(untouched):
            found["D_untouched"] = d(Under(untouched, lambda _column: None))
        with condition.open() as under, held.holding(under.subject):
            found[name] = d(under)
    with condition.open() as under:
        found["D"] = d(under)
    return found
