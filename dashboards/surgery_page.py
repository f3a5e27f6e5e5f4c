"""The operating table as one value."""

from __future__ import annotations

import shlex
from typing import NamedTuple
from urllib.parse import urlencode

from dashboards.notes import Marks
from dashboards.operation import Edit, Operation, apply_command, unit
from dashboards.recipes import RecipeShelf, Shelved
from dashboards.store import FeatureStore
from interventions.recipe import Recipe

SLIDER = {"strengthen": (-1.0, 5.0), "add": (-2.0, 2.0)}
_DOSES = (0.0, 3.0)


class Row(NamedTuple):
    """One edit, and what is known of its feature.

    Attributes:
        edit: the edit.
        label: what a person called it, else what it peaks on.
        unit: what dose 1 is in the feature's own units; `fired` says whether that is its maximum.
        density: share of tokens on which it fires.
        amount: the strength in the feature's own units; None for operators without one.
        low, high: ends of the slider.
    """

    edit: Edit
    label: str
    unit: float
    fired: bool
    density: float
    amount: float | None
    low: float
    high: float


class SurgeryPage(NamedTuple):
    """The operating table.

    Attributes:
        operation: everything that the address says.
        rows: the edits.
        recipe: the recipe; None without an edit.
        words: what it does, in words.
        shelf: recipes that can be loaded.
        chat: whether the subject has a chat template; None if that is not known yet.
        command: what writes the same two texts on the command line, "" where there is none.
        whole: what prints all figures of the run on the command line.
        languages: whose words' hazard is followed, in words.
        ceiling: the norm above which tokens are left alone if the address says nothing; None if the store does not know.
    """

    operation: Operation
    rows: tuple[Row, ...]
    recipe: Recipe | None
    words: str
    shelf: tuple[Shelved, ...]
    chat: bool | None
    command: str
    whole: str
    languages: str
    ceiling: float | None


def surgery_page(store: FeatureStore, operation: Operation, marks: Marks, shelf: RecipeShelf, chat: bool | None) -> SurgeryPage:
    """The page. Raises DictionaryError for an unknown feature, SpecError for a recipe that its spec refuses."""
    rows = tuple(_row(store, marks, edit) for edit in operation.known(store).edits)
    recipe = operation.recipe(store) if rows else None
    languages = "English, as the tokenizer writes it" if operation.words == "en" else "every language and every spelling"
    return SurgeryPage(operation, rows, recipe, recipe.explain() if recipe else "", shelf.list(store.dictionary), chat,
                       apply_command(operation, store, shelf.folder), whole_command(operation, store), languages,
                       store.record.get("norm_ceiling"))


def whole_command(operation: Operation, store: FeatureStore) -> str:
    """The command that operates as the page does and prints every figure."""
    words = ["undertow", "dashboard", "operate", str(store.path), urlencode(operation.pairs())]
    return shlex.join(words) if operation.edits and any(turn.text.strip() for turn in operation.turns) else ""


def _row(store: FeatureStore, marks: Marks, edit: Edit) -> Row:
    of = unit(store, edit.latent)
    peak = store.token(int(store.columns["peak_token"][edit.latent]))
    label = marks.labels.get(edit.latent, "") or (f"peaks on “{peak}”" if peak else "never fired")
    amount = None if edit.kind == "ablate" else edit.dose if edit.kind == "strengthen" else edit.dose * of.value
    low, high = SLIDER.get(edit.kind, _DOSES)
    return Row(edit, label, of.value, of.fired, float(store.density[edit.latent]), amount, min(low, edit.dose),
               max(high, edit.dose))
