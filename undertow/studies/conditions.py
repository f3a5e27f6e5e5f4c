"""The arms of a study made ready: what is put before a text, and the block in which a subject is operated on."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from features.codes import dictionary_digest
from interventions.applying import Gate, apply, apply_direction, trigger_gate
from interventions.dosing import scaled
from interventions.recipe import Recipe
from sae.dictionary import Dictionary
from undertow.core.seeds import derive_seed
from undertow.core.spec import digest_json
from undertow.studies.arms import sham_of
from undertow.studies.preparing import Prepared, parameters
from undertow.studies.situations import Line, Side, Teller
from undertow.studies.trials import PROMPTED, TRAINED, UNTOUCHED
from undertow.studies.variants import (
    AbsentArmError,
    added,
    before_decision,
    part,
    renamed,
    shuffled_decoder,
    with_operator,
)
from undertow.studies.weights import Trained
from undertow.subjects.organisms.measuring import Announce
from undertow.subjects.subject import Subject

_VALUE_BITS = 16  # a figure of a recipe or a weight, in half precision
_COUNT_BITS = 8  # of how many tokens


@final
class Under(NamedTuple):
    """A subject as an arm has it, inside the block that opened it.

    Attributes:
        subject: the model; what runs on it is under the arm.
        announce: to be called with the column of the prompts' last tokens before they are run (see `measuring.ask`).
        firings: tokens at which the arm has acted so far; None for an arm that operates on nothing.
        moves: whether its window is placed at the decision, so that every question needs a row of its own.
    """

    subject: Subject
    announce: Announce
    firings: Callable[[], int] | None = None
    moves: bool = False


@final
class Cost(NamedTuple):
    """What a level of influence costs.

    Attributes:
        bits: to state it: a prompt by a uniform code over tokens, a recipe by the numbers of its features and half-precision
            values, a direction or weights at half precision.
        flops: to find it; 0 for what was written by hand.
    """

    bits: float
    flops: float


@final
class Condition(NamedTuple):
    """One arm.

    Attributes:
        arm: its name.
        side: which units it has.
        line: what stands before every text, if anything.
        before: a sentence that stands before the choice.
        open: opens the block.
        digest: 16 hex characters over what the arm is.
        cost: bits and FLOPs.
    """

    arm: str
    side: Side
    line: Line | None
    before: str
    open: Callable[[], AbstractContextManager[Under]]
    digest: str
    cost: Cost


@final
class Bench(NamedTuple):
    """What arms are made from. `prepared` is asked for by the arms that need the search alone, `trained` by those of the
    weight route, `frozen` by the control of the dictionary."""

    subject: Subject
    teller: Teller
    prepared: Callable[[], Prepared]
    trained: Callable[[str], Trained]
    frozen: Callable[[], Prepared]


def condition_of(arm: str, bench: Bench) -> Condition:
    """An arm made ready. Raises AbsentArmError if the search has nothing for it."""
    if arm in UNTOUCHED:
        return _untouched(arm, bench)
    if arm in TRAINED:
        return _trained(arm, bench)
    made = bench.prepared()
    if made.absent or made.dictionary is None:
        raise AbsentArmError(made.absent)
    if arm == "frozen":
        control = bench.frozen()
        if control.absent or control.dictionary is None:
            raise AbsentArmError(control.absent)
        return _operated(arm, bench, control, (control.recipes["L4"], control.dictionary))
    if arm in ("diffmean", "constant", "minus"):
        return _direction(arm, bench, made)
    if arm == "shuffled":
        recipe = made.recipes["L4"]
        seed = derive_seed(bench.teller.seed, "shuffled")
        other = shuffled_decoder(made.dictionary, seed, [edit.latent for edit in recipe.edits])
        return _operated(arm, bench, made, (renamed(recipe, arm, sae=dictionary_digest(other)), other))
    return _operated(arm, bench, made, (recipe_of(arm, made), made.dictionary))


def random_condition(bench: Bench, i: int) -> Condition:
    """Matched random set `i`."""
    made = bench.prepared()
    if made.absent or made.dictionary is None:
        raise AbsentArmError(made.absent)
    return _operated("random", bench, made, (made.random[i], made.dictionary))


def recipe_of(arm: str, made: Prepared) -> Recipe:
    """The recipe of an arm that is one. Raises AbsentArmError for a feature that the search did not choose."""
    l4 = made.recipes["L4"]
    kind, _, rest = arm.partition(":")
    match kind:
        case "L4" | "lexical":
            return made.recipes[kind]
        case "L4-before":
            return before_decision(l4, arm)
        case "sham":
            return sham_of(l4)
        case "dose":
            return scaled(l4, float(rest), arm)
        case "operator":
            return with_operator(l4, rest, arm, 1.0 + float(made.facts["chosen"]["dose"]))
        case "only" | "without":
            return part(l4, int(rest), arm, without=kind == "without")
        case _:
            raise AbsentArmError(f"no recipe is known for the arm {arm!r}")


def _untouched(arm: str, bench: Bench) -> Condition:
    line, before = bench.teller.line(arm), bench.teller.sentence(arm)
    texts = [line(i, "Ana") for i in range(16)] if line else [before]
    tokens = [len(bench.subject.encode(text)) - 1 for text in texts if text]
    bits = sum(tokens) / len(tokens) * math.log2(len(bench.subject.tokenizer)) if tokens else 0.0
    assert arm not in PROMPTED or line is not None

    @contextlib.contextmanager
    def opened() -> Iterator[Under]:
        yield Under(bench.subject, lambda _column: None)

    return Condition(arm, "reference" if arm == "bonded" else "base", line, before, opened, digest_json([arm, texts]),
                     Cost(bits, 0.0))


def _trained(arm: str, bench: Bench) -> Condition:
    made = bench.trained(arm)
    own = parameters(bench.subject)

    @contextlib.contextmanager
    def opened() -> Iterator[Under]:
        yield Under(made.subject, lambda _column: None)

    # 2 FLOPs a parameter and token forward and 2 for the gradients of activations; those of the base weights are not formed
    return Condition(arm, "base", None, "", opened, made.digest, Cost(_VALUE_BITS * made.parameters, 4.0 * own * made.tokens))


def _operated(arm: str, bench: Bench, made: Prepared, what: tuple[Recipe, Dictionary]) -> Condition:
    recipe, dictionary = what

    @contextlib.contextmanager
    def opened() -> Iterator[Under]:
        with apply(recipe, bench.subject, dictionary, must_act=recipe.trigger is None) as operated:
            yield Under(operated.subject, operated.announce, lambda: operated.firings, recipe.window != "everywhere")

    cost = Cost(recipe_bits(recipe, dictionary.d_sae), found_flops(made))
    return Condition(arm, "base", None, "", opened, recipe.digest(), cost)


def _direction(arm: str, bench: Bench, made: Prepared) -> Condition:
    """Plain directions as long as what the surgery adds where its features are silent."""
    assert made.dictionary is not None
    recipe, dictionary = made.recipes["L4"], made.dictionary
    own = added(recipe, dictionary)
    means = made.directions["means"]
    direction = means / means.norm() * own.norm() if arm == "diffmean" else own
    amount, window = -1.0 if arm == "minus" else 1.0, "everywhere" if arm == "constant" else recipe.window
    gate: Gate | None = None
    if recipe.trigger is not None and arm != "constant":
        gate = trigger_gate(recipe.trigger, dictionary)

    @contextlib.contextmanager
    def opened() -> Iterator[Under]:
        site = bench.subject.site(recipe.site)
        with apply_direction(bench.subject, site, direction, amount, gate, window, recipe.norm_ceiling) as operated:
            yield Under(operated.subject, operated.announce, lambda: operated.firings, window != "everywhere")

    looked_at = len(recipe.trigger.latents) if gate is not None and recipe.trigger is not None else 0
    bits = _VALUE_BITS * len(direction) + looked_at * math.log2(dictionary.d_sae)
    return Condition(arm, "base", None, "", opened, _digest(direction * amount, arm), Cost(bits, found_flops(made)))


def recipe_bits(recipe: Recipe, d_sae: int) -> float:
    """Bits that state a recipe: for every edit a feature's number and a half-precision value, for every trigger a number, and
    two small ones for the gate's memory."""
    gate = recipe.trigger
    looked_at = 0.0 if gate is None else len(gate.latents) * math.log2(d_sae) + (2 * _COUNT_BITS if recipe.memory else 0)
    return len(recipe.edits) * (math.log2(d_sae) + _VALUE_BITS) + looked_at


def found_flops(made: Prepared) -> float:
    """FLOPs of finding the surgery: harvest and training of the SAE (0 if one was given) and the search; 2 a parameter and
    token forward, 6 with a gradient."""
    facts: dict[str, Any] = made.facts
    training = facts.get("training", {})
    forward = facts.get("search_tokens", 0) + training.get("harvest_tokens", 0)
    return 2.0 * facts["parameters"] * (forward + 3 * facts.get("search_gradient_tokens", 0)) + training.get("flops", 0)


def _digest(direction: Float[Tensor, "d_model"], arm: str) -> str:
    data = direction.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()
    return hashlib.sha256(arm.encode() + data).hexdigest()[:16]
