"""Recipes and dictionaries that a study makes out of the surgery: other operators and parts, and shuffled decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from interventions.operators import Add, Clamp, Floor, Strengthen
from interventions.recipe import FeatureEdit, Recipe, WindowRule
from sae.dictionary import Dictionary, LinearDictionary
from undertow.core.errors import DictionaryError, SpecError
from undertow.core.seeds import generator


class AbsentArmError(Exception):
    """An arm that this subject or this search does not have, with the reason; its trials are recorded as absent."""


def level_of(edit: FeatureEdit) -> float:
    """The value that an edit brings its latent to, in the latent's units. Raises SpecError for an operator without one."""
    match edit.operator:
        case Floor(value=value) | Clamp(value=value) | Add(amount=value):
            return value
        case _:
            raise SpecError(f"feature {edit.latent} is changed by {edit.operator.kind!r}, which names no value to scale",
                            "studies of doses and operators work on floors, clamps and additions")


def renamed(recipe: Recipe, name: str, **changes: Any) -> Recipe:
    """The recipe under another name, with some fields replaced."""
    return Recipe.checked(recipe.model_dump() | {"name": name} | changes, name)


def before_decision(recipe: Recipe, name: str) -> Recipe:
    """The same, off from the decision on."""
    window: WindowRule = "before_decision"
    return renamed(recipe, name, window=window)


def with_operator(recipe: Recipe, kind: str, name: str, gain: float) -> Recipe:
    """The same latents and values with another operator: floor, clamp, add, or strengthen (by `gain`, which has no value)."""
    made = {"floor": lambda value: Floor(value=value), "clamp": lambda value: Clamp(value=value),
            "add": lambda value: Add(amount=value), "strengthen": lambda value: Strengthen(gain=gain)}
    if kind not in made:
        raise SpecError(f"no operator is called {kind!r}", f"operators: {', '.join(made)}")
    return renamed(recipe, name, edits=[FeatureEdit(latent=edit.latent, operator=made[kind](level_of(edit)))
                                        for edit in recipe.edits])


def part(recipe: Recipe, place: int, name: str, without: bool = False) -> Recipe:
    """The edit at one place alone, or all others. Raises AbsentArmError if there is none."""
    if place >= len(recipe.edits):
        chose = f"{len(recipe.edits)} feature{'s' * (len(recipe.edits) != 1)}"
        raise AbsentArmError(f"the search chose {chose}, so there is no number {place}")
    edits = [edit for i, edit in enumerate(recipe.edits) if (i == place) != without]
    if not edits:
        raise AbsentArmError("the search chose 1 feature, and without it nothing is left")
    return renamed(recipe, name, edits=edits)


def added(recipe: Recipe, dictionary: Dictionary) -> Float[Tensor, "d_in"]:
    """What a recipe adds where its features are silent: Σ value · direction."""
    values = torch.tensor([level_of(edit) for edit in recipe.edits])
    latents = torch.tensor([edit.latent for edit in recipe.edits], dtype=torch.long)
    return values @ dictionary.directions(latents).float().cpu()


def shuffled_decoder(dictionary: Dictionary, seed: int, keep: Sequence[int] = ()) -> LinearDictionary:
    """The dictionary with its decoder rows exchanged at random, none left in place among `keep`.

    Raises DictionaryError for a dictionary whose decoder is not one matrix of its own.
    """
    if not isinstance(dictionary, LinearDictionary):
        raise DictionaryError(f"the decoder rows of a dictionary of architecture {dictionary.architecture} cannot be exchanged",
                              "the shuffled arm needs an SAE that Undertow trained")
    random, fixed = generator(seed, "shuffled decoder"), torch.tensor(list(keep), dtype=torch.long)
    while True:
        order = torch.randperm(dictionary.d_sae, generator=random)
        if not bool((order[fixed] == fixed).any()):
            return dataclasses.replace(dictionary, W_dec=dictionary.W_dec[order.to(dictionary.W_dec.device)].contiguous())
