"""Choosing a set of features and its dose together, by what the whole operation does, within limits on ordinary text.

Features are put on a floor: f′ = max(f, dose · w · h), h being how active the latent typically is where it fires and w its
weight in the set, at tokens where a trigger fires. Sets of several sizes are proposed by what they move at what cost
(`features.balance`). For every set the dose is the largest of DOSES at which ordinary text stays the same (limits on KL), and
the set is judged by D on development situations with the operation off from the decision on, so that what is chosen is
carried by the model and not written at the decision.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from features.balance import Slopes, balance, balanced
from features.carried import Levels
from features.concepts import Situation
from interventions.applying import apply
from interventions.audit import kl_after, logits_after
from interventions.operators import Floor
from interventions.recipe import FeatureEdit, Recipe, WindowRule
from sae.dictionary import Dictionary
from undertow.core.spec import Spec
from undertow.subjects.organisms.measuring import Answer, Question, ask, tokens_of
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject

_STEP = 1.04
DOSES = tuple(round(0.1 * _STEP ** i, 4) for i in range(80))  # 0.1 to 2.2
Progress = Callable[[str, int, int], None]


@final
class TuneSpec(Spec):
    """Limits and size of the search.

    Attributes:
        kl_mean, kl_p99: limits on KL(base‖arm), nats a token, on development texts; stricter than a verdict's, which is
            measured on other texts.
        sizes: features in a set, at most; one set is tried for each.
        pool: features of the largest attribution that sets are made of.
    """

    kl_mean: float = Field(default=0.0095, gt=0)
    kl_p99: float = Field(default=0.09, gt=0)
    sizes: tuple[int, ...] = Field(default=(8, 16), min_length=1)
    pool: int = Field(default=64, ge=1)

    @property
    def most(self) -> int:
        """Features in the largest set, at most."""
        return max(self.sizes)


@final
class Bench(NamedTuple):
    """What a search works on.

    Attributes:
        subject, dictionary, site: where.
        place: the fields of a recipe that name them ("subject", "sae", "site").
        known: how active every latent typically is.
        slopes: gradients in discovery situations and ordinary texts, from which sets are proposed.
        questions: development situations.
        texts: development texts without a decision, as token ids.
        untouched: logits of the untouched subject after their tokens (`logits_after`).
    """

    subject: Subject
    dictionary: Dictionary
    site: Site
    place: dict[str, str]
    known: Levels
    slopes: Slopes
    questions: list[Question]
    texts: list[list[int]]
    untouched: list[Float[Tensor, "_ vocab"]]


@final
class Trial(NamedTuple):
    """One set at one dose.

    Attributes:
        latents: the set.
        trigger: the latents at whose firings it acts; none: everywhere.
        dose: in multiples of each latent's typical activation.
        kl_mean, kl_p99: on development texts.
        d: mean D on development situations with the operation off from the decision on; NaN where it was not measured.
        weights: of the latents, as parts of the dose; all 1 if there are none.
    """

    latents: tuple[int, ...]
    trigger: tuple[int, ...]
    dose: float
    kl_mean: float
    kl_p99: float
    d: float
    weights: tuple[float, ...] = ()

    def heights(self, known: Levels) -> list[float]:
        """The floor of every latent, in its own units."""
        weights = self.weights or (1.0,) * len(self.latents)
        return [float(self.dose * weight * known.high[latent]) for latent, weight in zip(self.latents, weights, strict=True)]


def question(subject: Subject, situation: Situation) -> Question:
    """A situation as token ids, all wordings of all acts."""
    return Question(subject.encode(situation.prompt), {act: tuple(tokens_of(subject, wording) for wording in wordings)
                                                       for act, wordings in situation.options.items()})


def floors(bench: Bench, trial: Trial, window: WindowRule = "everywhere", name: str = "floor") -> Recipe:
    """The recipe that puts every latent of a trial on its floor."""
    edits = [FeatureEdit(latent=latent, operator=Floor(value=round(height, 6)))
             for latent, height in zip(trial.latents, trial.heights(bench.known), strict=True)]
    trigger = {"trigger": {"latents": trial.trigger}} if trial.trigger else {}
    return Recipe.checked({**bench.place, "name": name, "edits": edits, "window": window, **trigger}, "floors")


def answers(bench: Bench, recipe: Recipe | None, questions: Sequence[Question]) -> list[Answer]:
    """Act probabilities under a recipe; None: of the untouched subject."""
    if recipe is None:
        return ask(bench.subject, questions)
    with apply(recipe, bench.subject, bench.dictionary) as operated:
        return ask(bench.subject, questions, announce=operated.announce)


def sameness(bench: Bench, recipe: Recipe) -> tuple[float, float]:
    """Mean and 99th percentile of KL(base‖arm) on the bench's texts, nats a token."""
    with apply(recipe, bench.subject, bench.dictionary) as operated:
        kl = kl_after(bench.untouched, logits_after(operated.subject, bench.texts))
    return float(kl.mean()), float(np.quantile(kl, 0.99))


def largest_dose(bench: Bench, trial: Trial, spec: TuneSpec) -> Trial | None:
    """`trial` at the largest of DOSES within the limits, or None if the smallest is beyond them.

    KL grows about as the dose squared, which says where to look next; as in a bisection, the doses next to the answer's
    ends are measured.
    """
    low, high, at = -1, len(DOSES), len(DOSES) // 2
    best: Trial | None = None
    while high - low > 1:
        dosed = trial._replace(dose=DOSES[at])
        mean, p99 = sameness(bench, floors(bench, dosed))
        room = min(spec.kl_mean / max(mean, 1e-12), spec.kl_p99 / max(p99, 1e-12))
        if room >= 1:
            low, best = at, dosed._replace(kl_mean=mean, kl_p99=p99)
        else:
            high = at
        guess = at + round(math.log(room) / (2 * math.log(_STEP)))
        at = min(max(guess, low + 1), high - 1)
    return best


def mean_d(answered: Sequence[Answer], costly: str, keep: str) -> float:
    """Mean of D = log p(costly) − log p(keep), nats."""
    return float(np.mean([answer.log_ratio(costly, keep) for answer in answered]))


def choose(bench: Bench, pool: Sequence[int], acts: tuple[str, str], spec: TuneSpec,
           progress: Progress = lambda phase, done, total: None) -> list[Trial]:
    """Every set that was tried at its largest dose, the best last; empty if no dose of any set is within the limits.

    Args:
        bench: what to work on.
        pool: candidates, best first; the first `spec.pool` are used.
        acts: the costly and the keeping act.
        spec: limits.
        progress: called with ("select", sets tried, of how many).
    """
    if not pool:
        return []
    made = balance(bench.dictionary, bench.slopes, pool[: spec.pool], bench.known)
    trials: list[Trial] = []
    for done, size in enumerate(spec.sizes, start=1):
        found = balanced(made, size)
        if found.latents and found.latents not in {trial.latents for trial in trials}:
            unknown = float("nan")
            proposed = Trial(found.latents, found.trigger, 1.0, unknown, unknown, unknown, found.weights)
            trial = largest_dose(bench, proposed, spec)
            if trial is not None:
                recipe = floors(bench, trial, "before_decision")
                trials.append(trial._replace(d=mean_d(answers(bench, recipe, bench.questions), *acts)))
        progress("select", done, len(spec.sizes))
    return sorted(trials, key=lambda trial: trial.d)


def response(bench: Bench, chosen: Trial, acts: tuple[str, str], factors: Sequence[float]) -> list[Trial]:
    """The chosen set at other doses, as multiples of its own: KL on the bench's texts, and D as `choose` measures it."""
    found = []
    for factor in factors:
        dosed = chosen._replace(dose=factor * chosen.dose)
        mean, p99 = sameness(bench, floors(bench, dosed))
        given = answers(bench, floors(bench, dosed, "before_decision"), bench.questions)
        found.append(dosed._replace(kl_mean=mean, kl_p99=p99, d=mean_d(given, *acts)))
    return found
