"""Recipes at hand: those of the runs, and those that were saved here. A name is looked up among them and never a path."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, final

import yaml

from dashboards.operation import recipe_file
from dashboards.runs import RunShelf
from interventions.recipe import Recipe
from undertow.core.errors import DictionaryError, SpecError


class Shelved(NamedTuple):
    """A recipe, its name in addresses, and where it comes from in words."""

    key: str
    recipe: Recipe
    origin: str


@final
class RecipeShelf:
    """Recipes of `runs`, and in `folder`, the only place that recipes are written to."""

    def __init__(self, runs: RunShelf, folder: Path) -> None:
        self._runs = runs
        self.folder = folder

    def list(self, sae: str) -> tuple[Shelved, ...]:
        """Those that name features of the SAE with digest `sae`; files that are no recipes are passed over."""
        runs = [(f"run.{run.key}", run.path / "recipe.yaml", f"run {run.key}") for run in self._runs.list().found.values()]
        saved = [(f"saved.{path.stem}", path, "saved here")
                 for path in (sorted(self.folder.glob("*.yaml")) if self.folder.is_dir() else [])]
        return tuple(Shelved(key, recipe, origin) for key, path, origin in (*runs, *saved)
                     if (recipe := _read(path)) is not None and recipe.sae == sae)

    def get(self, sae: str, key: str) -> Recipe:
        """The recipe of that name. Raises DictionaryError, which a page answers as not found."""
        at_hand = self.list(sae)
        found = next((shelved.recipe for shelved in at_hand if shelved.key == key), None)
        if found is None:
            raise DictionaryError(f"no recipe called {key!r} for this SAE",
                                  f"those here: {', '.join(shelved.key for shelved in at_hand) or 'none'}")
        return found

    def save(self, recipe: Recipe) -> Path:
        """Write a recipe, unless the same one is there already. Raises StorageError."""
        path = self.folder / recipe_file(recipe)
        if not path.exists():
            recipe.save(path)
        return path


def recipe_yaml(recipe: Recipe) -> str:
    """The recipe as the text of a file that `Recipe.load` reads."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _read(path: Path) -> Recipe | None:
    try:
        return Recipe.load(path) if path.is_file() else None
    except SpecError:
        return None
