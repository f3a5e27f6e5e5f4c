"""The dose of a recipe that there already is: its curve over a grid of factors, and the best factor within limits.

A dose multiplies all figures of a recipe at once (`scaled`); its features, its gate and its windows stay as they are. Every
dose is measured on development material alone:

    KL            KL(base‖arm) after every token of ordinary texts, nats: its mean and its 99th percentile
    hazard ratio  Σ hazard of the arm over Σ hazard of the base (`interventions.audit`), on texts and the situations' prompts,
                  with the upper bound of its 95 % interval by a bootstrap over documents (texts, and families of situations)
    D             log p(costly act) − log p(keeping act), nats, mean over the baseline situations
    acts          p(costly act), in [0, 1]: the probability that one of its wordings follows, mean over the same situations. It
                  is of all that could follow, not of the acts alone, so that a dose that breaks the sentence does not look good

D and acts are measured with the operation on, and with it off from the decision on. The best dose is that of the largest mean
of the two `acts` among the doses within all limits (`best`). Choosing sets and doses together: `interventions.tune`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Float
from pydantic import Field

from features.concepts import Pair
from interventions.applying import apply
from interventions.audit import Audit, AuditSpec, audit, kl_after, logits_after, unhooked
from interventions.operators import Add, Clamp, Floor, Operator, Strengthen
from interventions.recipe import FeatureEdit, Recipe
from interventions.tune import mean_d, question
from interventions.verdict import MAX_HAZARD_RATIO, MAX_KL_MEAN, MAX_KL_P99
from sae.dictionary import Dictionary
from undertow.core.errors import NumericsError, SpecError
from undertow.core.spec import Spec
from undertow.lexicon.trie import TokenTrie
from undertow.subjects.organisms.measuring import Answer, ask
from undertow.subjects.splicing import Window
from undertow.subjects.subject import Subject

_LARGEST = float(np.finfo(np.float32).max)
_AT_ONCE = 16  # texts of which the logits of base and arm are held
Progress = Callable[[int, int], None]


@final
class Limits(Spec):
    """How far a dose may go; those of the verdict, if nothing is said.

    Attributes:
        kl_mean, kl_p99: of KL(base‖arm) on ordinary text, nats a token.
        hazard_ratio: of the upper bound of the hazard ratio; 1 is no change.
    """

    kl_mean: float = Field(default=MAX_KL_MEAN, ge=0)
    kl_p99: float = Field(default=MAX_KL_P99, ge=0)
    hazard_ratio: float = Field(default=MAX_HAZARD_RATIO, ge=0)


@final
class Acts(NamedTuple):
    """What a subject does in the situations: mean D, in nats, and mean p(costly act), in [0, 1]."""

    d: float
    acts: float


@final
class Figures(NamedTuple):
    """What was measured of one dose; the module says what each is.

    Attributes:
        kl_mean, kl_p99: nats.
        hazard_mean: of the arm, a token.
        hazard_ratio, hazard_ratio_upper: ≥ 0.
        hazard_slack: mean hazard that was not followed, a token; for a curve's first dose of the base, if that is more.
        on: with the operation on.
        before: with it off from the decision on.
    """

    kl_mean: float
    kl_p99: float
    hazard_mean: float
    hazard_ratio: float
    hazard_ratio_upper: float
    hazard_slack: float
    on: Acts
    before: Acts

    @property
    def acts(self) -> float:
        """Mean p(costly act) over the operation being on and off from the decision on: what is made as large as possible."""
        return (self.on.acts + self.before.acts) / 2

    def beyond(self, limits: Limits) -> list[str]:
        """Names of the figures that are above their limits; empty within all of them."""
        held = {"kl_mean": limits.kl_mean, "kl_p99": limits.kl_p99, "hazard_ratio_upper": limits.hazard_ratio}
        return [name for name, limit in held.items() if getattr(self, name) > limit]


@final
class Dose(NamedTuple):
    """A factor and what was measured at it; `figures` is None where a forward pass was not finite."""

    factor: float
    figures: Figures | None


@final
class Ground(NamedTuple):
    """What doses are measured on.

    Attributes:
        subject, dictionary: where.
        pairs: development pairs; the negative side of each is the baseline situation.
        texts: ordinary texts without a decision, as token ids.
        heard: on how many of them hazard is measured, from the first.
        trie: spellings of the lexicon (`audit.spellings`).
        spec: how hazard is measured.
        seed: of the bootstrap.
    """

    subject: Subject
    dictionary: Dictionary
    pairs: list[Pair]
    texts: list[list[int]]
    heard: int
    trie: TokenTrie
    spec: AuditSpec
    seed: int

    @property
    def audited(self) -> list[list[int]]:
        """The rows on which hazard is measured: texts, then the prompts of the baseline situations."""
        return [*self.texts[: self.heard], *(self.subject.encode(pair.negative.prompt) for pair in self.pairs)]

    @property
    def clusters(self) -> list[int]:
        """For every audited row the document that it is a part of: a text by itself, prompts of one family together."""
        texts = list(range(len(self.texts[: self.heard])))
        families = {name: len(texts) + i for i, name in enumerate(dict.fromkeys(pair.family for pair in self.pairs))}
        return [*texts, *(families[pair.family] for pair in self.pairs)]


def grid(text: str) -> list[float]:
    """The factors of a list such as "0.5, 1, 2": ascending, each once.

    Raises SpecError for an empty list, and for a part that is not a finite number of 0 or more.
    """
    hint = "factors of the recipe's own figures, with commas between them: 0.5,1,1.5"
    if not text.strip():
        raise SpecError("the list of doses is empty", hint)
    found: set[float] = set()
    for part in text.split(","):
        try:
            factor = float(part)
        except ValueError:
            raise SpecError(f"{part.strip()!r} among the doses {text!r} is not a number", hint) from None
        if not math.isfinite(factor) or factor < 0:
            raise SpecError(f"the dose {part.strip()} is not a finite number of 0 or more", hint)
        found.add(factor)
    return sorted(found)


def scaled(recipe: Recipe, factor: float, name: str) -> Recipe:
    """Every figure times `factor`: values of floors and clamps, amounts of additions, and a gain's distance from 1.

    Factor 1 gives the recipe's own figures. Factor 0 leaves floors of active features, additions and gains without an effect;
    a clamp at 0 still silences its feature. Raises SpecError for a cap or an ablation, of which there is no more or less, and
    for a figure that is too large.
    """
    edits = [FeatureEdit(latent=edit.latent, operator=_at(edit, factor)) for edit in recipe.edits]
    return Recipe.checked(recipe.model_dump() | {"name": name, "edits": edits}, name)


def _at(edit: FeatureEdit, factor: float) -> Operator:
    match edit.operator:
        case Floor(value=value):
            return Floor(value=_single(edit, factor, factor * value))
        case Clamp(value=value):
            return Clamp(value=_single(edit, factor, factor * value))
        case Add(amount=amount):
            return Add(amount=_single(edit, factor, factor * amount))
        case Strengthen(gain=gain):  # 1 + factor·(gain − 1), exact to the last bit at 0 and 1
            return Strengthen(gain=_single(edit, factor, factor * gain + (1 - factor)))
        case _:
            raise SpecError(f"feature {edit.latent} is changed by {edit.operator.kind!r}, which names no value to scale",
                            "doses are of floors, clamps, additions and gains (strengthen)")


def _single(edit: FeatureEdit, factor: float, value: float) -> float:
    """`value`, if it is a number in single precision, in which edits are computed."""
    if not abs(value) <= _LARGEST:
        raise SpecError(f"the dose {factor:g} takes the {edit.operator.kind} of feature {edit.latent} to {value:g}, which is "
                        "no number in single precision", "smaller --doses")
    return value


def dosed(recipe: Recipe, factor: float) -> Recipe:
    """`scaled` under the recipe's own name, with the factor and the digest of the original in its notes."""
    said = f"{factor:g} times the figures of {recipe.digest()}"
    made = scaled(recipe, factor, recipe.name)
    return Recipe.checked(made.model_dump() | {"notes": f"{recipe.notes}\n{said}" if recipe.notes else said}, recipe.name)


def best(doses: Sequence[Dose], limits: Limits) -> Dose | None:
    """The dose within all limits whose `acts` are the largest, the smaller of two equal ones; None if none is within them."""
    within = [(dose.figures.acts, -dose.factor, dose) for dose in doses
              if dose.figures is not None and not dose.figures.beyond(limits)]
    return max(within, key=lambda ranked: ranked[:2])[2] if within else None


def curve(ground: Ground, recipe: Recipe, factors: Sequence[float],
          progress: Progress = lambda done, total: None) -> list[Dose]:
    """Every factor with what was measured at it, in the order of `factors`.

    Args:
        ground: what to measure on.
        recipe: what is scaled.
        factors: see `grid`.
        progress: called with (factors done, of how many).

    Raises:
        SpecError: a figure that cannot be scaled, or fewer documents than a hazard ratio needs.
        EditError: the recipe fires nowhere in the texts, or in the audited rows, or in the situations.
    """
    recipes = [scaled(recipe, factor, recipe.name) for factor in factors]  # refused before anything is run
    doses: list[Dose] = []
    hazard_base: Float[np.ndarray, "token"] | None = None
    for factor, made in zip(factors, recipes, strict=True):
        try:
            kl = sameness(ground, made)
            heard = hazard(ground, made, hazard_base)
            hazard_base = heard.hazard_base
            doses.append(Dose(factor, _figures(ground, kl, heard, (on(ground, made), before(ground, made)))))
        except NumericsError:  # what was measured of other doses is not lost with it
            doses.append(Dose(factor, None))
        progress(len(doses), len(recipes))
    return doses


def _figures(ground: Ground, kl: Float[np.ndarray, "token"], heard: Audit, acts: tuple[Acts, Acts]) -> Figures:
    ratio = heard.hazard_ratio(ground.seed, ground.clusters)
    return Figures(float(kl.mean()), float(np.quantile(kl, 0.99)), float(heard.hazard.mean()), ratio.value, ratio.high,
                   heard.slack, *acts)


def sameness(ground: Ground, recipe: Recipe) -> Float[np.ndarray, "token"]:
    """KL(base‖arm) after every token of the texts, nats; they have no decision, so the recipe acts at every token of them."""
    base = unhooked(ground.subject)
    with apply(recipe, ground.subject, ground.dictionary, Window()) as operated:
        return np.concatenate([kl_after(logits_after(base, rows), logits_after(operated.subject, rows)) for rows in
                               (ground.texts[i:i + _AT_ONCE] for i in range(0, len(ground.texts), _AT_ONCE))])


def hazard(ground: Ground, recipe: Recipe, hazard_base: Float[np.ndarray, "token"] | None = None) -> Audit:
    """The audit of the texts that are listened to, and of the situations' prompts."""
    arm = apply(recipe, ground.subject, ground.dictionary, Window())
    return audit(ground.subject, arm, ground.audited, ground.trie, ground.spec, hazard_base)


def untouched(ground: Ground) -> Acts:
    """What the subject does without the recipe."""
    return _acts(ground, ask(ground.subject, [question(ground.subject, pair.negative) for pair in ground.pairs]))


def on(ground: Ground, recipe: Recipe, must_act: bool = True) -> Acts:
    """What it does with the recipe on, in the recipe's own window. Raises EditError if it must act and does nowhere."""
    questions = [question(ground.subject, pair.negative) for pair in ground.pairs]
    with apply(recipe, ground.subject, ground.dictionary, must_act=must_act) as operated:
        return _acts(ground, ask(ground.subject, questions, announce=operated.announce))


def before(ground: Ground, recipe: Recipe) -> Acts:
    """What it does with the recipe off from the decision on; as without it, for a recipe that acts in the reply alone, or whose
    gate opens at the decision alone."""
    if recipe.window == "assistant":
        return untouched(ground)
    return on(ground, Recipe.checked(recipe.model_dump() | {"window": "before_decision"}, recipe.name), must_act=False)


def _acts(ground: Ground, answers: Sequence[Answer]) -> Acts:
    situations = [pair.negative for pair in ground.pairs]
    d = [mean_d([answer], side.costly, side.keep) for answer, side in zip(answers, situations, strict=True)]
    acts = [math.exp(answer.log_mass[side.costly]) for answer, side in zip(answers, situations, strict=True)]
    if not np.isfinite(d).all():
        raise NumericsError("the probabilities of the acts are not finite", "a smaller dose, or a model in float32, may do")
    return Acts(float(np.mean(d)), float(np.mean(acts)))
