"""Applying a recipe, or a plain direction, to a subject while a `with` block runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interventions.operators import needs_activity, operate
from interventions.recall import Recall
from interventions.recipe import FeatureEdit, Recipe, Trigger, WindowRule, check
from sae.dictionary import Dictionary
from undertow.core.errors import DictionaryError, EditError, NumericsError
from undertow.subjects.sampling import Generated, Sampling
from undertow.subjects.sampling import generate as sample_all
from undertow.subjects.sites import Site
from undertow.subjects.splicing import EditResult, Memory, Splice, Window, splice
from undertow.subjects.subject import Subject


@final
@dataclass(frozen=True, eq=False)
class Gate:
    """Says of every token whether an edit may act on it: `opens`, or, with a memory, by how often it opened before."""

    opens: Callable[[Float[Tensor, "token d_model"]], Bool[Tensor, "token"]]
    memory: Memory | None = None


@final
class Operated:
    """A subject under the knife, inside the `with` block that opened it.

    Attributes:
        subject: the model. What runs on it inside the block is edited, plain `subject.hf_model` calls included.
        window: the columns that are edited now.
    """

    def __init__(self, subject: Subject, window: Window, rule: WindowRule, counts: Splice) -> None:
        self.subject, self.window = subject, window
        self._rule, self._counts = rule, counts

    @property
    def firings(self) -> int:
        """Tokens at which the gate was open so far, also where the change was zero."""
        return self._counts.firings

    @property
    def positions(self) -> int:
        """Tokens so far that could have been edited: inside the window, no padding, not the first, not massive."""
        return self._counts.positions

    def announce(self, column: int) -> None:
        """Move the window for prompts whose last token is in `column`; to be called before they are run.

        `reading` ends with that column, `before_decision` ends before it and `assistant` begins after it. Fits `announce` of
        `measuring.ask`.
        """
        if self._rule == "reading":
            self.window.start, self.window.stop = 0, column + 1
        elif self._rule == "before_decision":
            self.window.start, self.window.stop = 0, column
        elif self._rule == "assistant":
            self.window.start, self.window.stop = column + 1, None

    def generate(self, prompt: str | Sequence[int], sampling: Sampling | None = None, seed: int = 0) -> Generated:
        """Continue one prompt: a text, or token ids (as `chat.render` gives them)."""
        return self.generate_batch([prompt], sampling, [seed])[0]

    def generate_batch(self, prompts: Sequence[str | Sequence[int]], sampling: Sampling | None = None,
                       seeds: Sequence[int] = (0,)) -> list[Generated]:
        """Continue several prompts in one batch, one seed a prompt. A text does not depend on its neighbours."""
        encoded = [self.subject.encode(prompt) if isinstance(prompt, str) else list(prompt) for prompt in prompts]
        self.announce(max(map(len, encoded), default=1) - 1)
        return sample_all(self.subject, encoded, sampling or Sampling(), seeds)


@contextlib.contextmanager
def apply(recipe: Recipe, subject: Subject, dictionary: Dictionary, window: Window | None = None,
          must_act: bool = True, recall: Recall | None = None) -> Iterator[Operated]:
    """Edit every forward pass of `subject` by `recipe` while the block runs.

    The edit is x + Σ_i (f_i′ − f_i)·d_i, so that a recipe which changes nothing changes no bit. With the windows
    `before_decision` and `assistant` nothing is edited until `Operated.generate` or `Operated.announce` has placed them; with
    `reading` everything is until then, since all of a given text is read.

    Args:
        recipe: what to do.
        subject: the model.
        dictionary: the SAE whose latents the recipe names, on any device.
        window: the columns to edit, to be moved by the caller; the recipe's rule moves it too.
        must_act: False where the texts may hold nothing that the recipe's gate waits for, as ordinary text may.
        recall: codes of this very dictionary, for texts that are read under many recipes.

    Raises:
        SubjectError, DictionaryError, SiteError: the recipe belongs elsewhere (see `check`), or the recall does.
        EditError: the block ended and the recipe had acted nowhere.
    """
    check(recipe, subject, dictionary)
    if recall is not None and recall.dictionary is not dictionary:
        raise DictionaryError("the codes that are recalled are of another dictionary than the one to operate with")
    edit = FeatureSurgery(dictionary.to(subject.device), recipe.edits, recipe.trigger, recall)
    placed = first_window(recipe.window) if window is None else window
    with splice(subject, subject.site(recipe.site), edit, recipe.norm_ceiling, placed, recipe.memory, must_act) as counts:
        yield Operated(subject, placed, recipe.window, counts)


@contextlib.contextmanager
def apply_direction(subject: Subject, site: Site, direction: Float[Tensor, "d_model"], amount: float,
                    gate: Gate | None = None, window: Window | WindowRule = "everywhere",
                    norm_ceiling: float | None = None) -> Iterator[Operated]:
    """Add `amount` · `direction` while the block runs: the arms without an SAE (difference of means, constant addition).

    Args:
        subject: the model.
        site: where to add.
        direction: what to add, not normalised.
        amount: factor; 0 is a sham.
        gate: the tokens to act on, e.g. `trigger_gate(...)`; all if absent.
        window: as in a recipe, or a window of the caller's own.
        norm_ceiling: tokens whose activation norm (L2) is above it are left alone.

    Raises:
        EditError: a direction of another width, or no token was acted on. With a gate that has a memory the second is no
            error: what it waits for may be missing from a text.
        NumericsError: a direction or an amount that is not finite.
    """
    if direction.shape[0] != subject.d_model:
        raise EditError(f"a direction of width {direction.shape[0]} for {subject.name}, whose width is {subject.d_model}")
    delta = amount * direction.detach().to(subject.device)
    if not bool(torch.isfinite(delta).all()):
        raise NumericsError(f"{amount} times the direction is not finite")
    rule, placed = ("everywhere", window) if isinstance(window, Window) else (window, first_window(window))
    memory = None if gate is None else gate.memory
    with splice(subject, site, _Addition(delta, gate), norm_ceiling, placed, memory, memory is None) as counts:
        yield Operated(subject, placed, rule, counts)


def trigger_gate(trigger: Trigger, dictionary: Dictionary) -> Gate:
    """The gate of `trigger` for edits that are not a recipe. Raises DictionaryError, when it runs, for an unknown latent."""
    latents = torch.tensor(trigger.latents, dtype=torch.long)
    return Gate(lambda x: is_open(trigger, dictionary.latent_values(x, latents)), trigger.memory)


def is_open(trigger: Trigger, f: Float[Tensor, "token k"]) -> Bool[Tensor, "token"]:
    """Where the trigger fires, from the codes of its latents; what its memory makes of it is the splice's."""
    above = (f > trigger.above).any(dim=-1)
    return above if trigger.when == "above" else ~above


@final
@dataclass(frozen=True, eq=False)
class FeatureSurgery:
    """The edit of a recipe, for `splice`: delta Σ_i (f_i′ − f_i)·d_i, fired where the gate is open.

    The gate is the trigger. Without one it is open everywhere, unless every operator only scales: then a token fires where
    one of the edited latents is active, so that a recipe on silent latents is not taken for one that acted.
    """

    dictionary: Dictionary
    edits: tuple[FeatureEdit, ...]
    trigger: Trigger | None = None
    recall: Recall | None = None

    def __call__(self, x: Float[Tensor, "batch pos d_model"], editable: Bool[Tensor, "batch pos"]) -> EditResult:
        fired = torch.zeros_like(editable)
        delta = torch.zeros(x.shape, dtype=self.dictionary.W_dec.dtype, device=x.device)
        if not bool(editable.any()):
            return EditResult(delta, fired)
        delta[editable], fired[editable] = self.change(x[editable])
        return EditResult(delta, fired)

    def change(self, x: Float[Tensor, "token d_model"]) -> tuple[Float[Tensor, "token d_model"], Bool[Tensor, "token"]]:
        """What is added to each activation if its gate is open, and whether it is."""
        edited = list(dict.fromkeys(edit.latent for edit in self.edits))
        looked_at = [] if self.trigger is None else list(self.trigger.latents)
        wanted = torch.tensor([*edited, *looked_at], dtype=torch.long, device=self.dictionary.W_dec.device)
        values = (self.recall or self.dictionary).latent_values(x, wanted)
        f = values[:, :len(edited)]
        after = dict(zip(edited, f.unbind(dim=1), strict=True))
        for edit in self.edits:
            after[edit.latent] = operate(edit.operator, after[edit.latent])
        shift = torch.stack([after[latent] for latent in edited], dim=1) - f
        delta = shift @ self.dictionary.directions(wanted[:len(edited)])
        if self.trigger is not None:
            return delta, is_open(self.trigger, values[:, len(edited):])
        if all(needs_activity(edit.operator) for edit in self.edits):
            return delta, (f != 0).any(dim=1)
        return delta, torch.ones(len(x), dtype=torch.bool, device=x.device)


@final
@dataclass(frozen=True, eq=False)
class _Addition:
    """Adds one vector wherever the gate is open."""

    delta: Float[Tensor, "d_model"]
    gate: Gate | None

    def __call__(self, x: Float[Tensor, "batch pos d_model"], editable: Bool[Tensor, "batch pos"]) -> EditResult:
        fired = editable.clone()
        if self.gate is not None and bool(editable.any()):
            fired[editable] = self.gate.opens(x[editable]).to(fired.device)
        return EditResult(self.delta.expand_as(x), fired)


def first_window(rule: WindowRule) -> Window:
    """Where a rule acts until the prompt is known."""
    return Window() if rule in ("everywhere", "reading") else Window(0, 0)
