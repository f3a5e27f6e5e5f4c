"""Choosing a set of features and its dose together, by what the whole operation does, within limits on ordinary text.

Features are put on a floor: f′ = max(f, dose · h), h being how active the latent typically is where it fires, at tokens where
a trigger fires: the latents that mark where the floor acts on the decision and ordinary text seldom is (`trigger_of`). The set
grows one feature at a time. For every set the dose is the largest of DOSES at which ordinary text stays the same (limits on
KL), and the set is judged by D on development situations with the operation off from the decision on, so that what is chosen
is carried by the model and not written at the decision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from features.carried import Levels, Slope, trigger_of
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
from undertow.subjects.tapping import tap

DOSES = tuple(round(0.1 * 1.08 ** i, 3) for i in range(40))  # 0.1 to 2
Progress = Callable[[str, int, int], None]


@final
class TuneSpec(Spec):
    """Limits and size of the search.

    Attributes:
        kl_mean, kl_p99: limits on KL(base‖arm), nats a token, on development texts; stricter than a verdict's, which is
            measured on other texts.
        most: features in a set, at most.
        shortlist: features of the largest attribution that are tried.
    """

    kl_mean: float = Field(default=0.009, gt=0)
    kl_p99: float = Field(default=0.09, gt=0)
    most: int = Field(default=2, ge=1)
    shortlist: int = Field(default=3, ge=1)


@final
class Bench(NamedTuple):
    """What a search works on.

    Attributes:
        subject, dictionary, site: where.
        place: the fields of a recipe that name them ("subject", "sae", "site").
        known: how active every latent typically is.
        slopes: of discovery situations, which say where a floor acts on the decision.
        questions: development situations.
        texts: development texts without a decision, as token ids.
        untouched: logits of the untouched subject after their tokens (`logits_after`).
    """

    subject: Subject
    dictionary: Dictionary
    site: Site
    place: dict[str, str]
    known: Levels
    slopes: list[Slope]
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
    """

    latents: tuple[int, ...]
    trigger: tuple[int, ...]
    dose: float
    kl_mean: float
    kl_p99: float
    d: float


def question(subject: Subject, situation: Situation) -> Question:
    """A situation as token ids, all wordings of all acts."""
    return Question(subject.encode(situation.prompt), {act: tuple(tokens_of(subject, wording) for wording in wordings)
                                                       for act, wordings in situation.options.items()})


def floors(bench: Bench, trial: Trial, window: WindowRule = "everywhere", name: str = "floor") -> Recipe:
    """The recipe that puts every latent of a trial on a floor of its dose times its typical activation."""
    edits = [FeatureEdit(latent=latent, operator=Floor(value=round(float(trial.dose * bench.known.high[latent]), 6)))
             for latent in trial.latents]
    trigger = {"trigger": {"latents": trial.trigger}} if trial.trigger else {}
    return Recipe.checked({**bench.place, "name": name, "edits": edits, "window": window, **trigger}, "floors")


def with_trigger(bench: Bench, latents: Sequence[int]) -> Trial:
    """A set with its trigger, at dose 1 and not measured yet."""
    ordinary = [tap(bench.subject, torch.tensor([ids]), bench.site)[0, 1:] for ids in bench.texts]
    trigger = trigger_of(bench.dictionary, bench.slopes, latents, bench.known, ordinary)
    return Trial(tuple(latents), trigger, 1.0, float("nan"), float("nan"), float("nan"))


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


def largest_dose(bench: Bench, trial: Trial, spec: TuneSpec) -> tuple[Trial | None, list[Trial]]:
    """`trial` at the largest of DOSES within the limits, by bisection (KL grows with the dose), and all that were tried."""
    low, high, tried = -1, len(DOSES), []
    best: Trial | None = None
    while high - low > 1:
        middle = (low + high) // 2
        dosed = trial._replace(dose=DOSES[middle])
        mean, p99 = sameness(bench, floors(bench, dosed))
        tried.append(dosed._replace(kl_mean=mean, kl_p99=p99))
        if mean <= spec.kl_mean and p99 <= spec.kl_p99:
            low, best = middle, tried[-1]
        else:
            high = middle
    return best, tried


def mean_d(answered: Sequence[Answer], costly: str, keep: str) -> float:
    """Mean of D = log p(costly) − log p(keep), nats."""
    return float(np.mean([answer.log_ratio(costly, keep) for answer in answered]))


def choose(bench: Bench, pool: Sequence[int], acts: tuple[str, str], spec: TuneSpec,
           progress: Progress = lambda phase, done, total: None) -> list[Trial]:
    """Every set that was tried at its largest dose, the best last; empty if no dose of any feature is within the limits.

    Args:
        bench: what to work on.
        pool: candidates, best first; the first `spec.shortlist` are used.
        acts: the costly and the keeping act.
        spec: limits.
        progress: called with ("select", sets tried, of how many at most).
    """
    shortlist = list(pool[: spec.shortlist])
    total = sum(len(shortlist) - size for size in range(min(spec.most, len(shortlist))))
    trials: list[Trial] = []
    best: Trial | None = None
    for _ in range(spec.most):
        found: list[Trial] = []
        for latent in [latent for latent in shortlist if best is None or latent not in best.latents]:
            trial, _ = largest_dose(bench, with_trigger(bench, (*(best.latents if best else ()), latent)), spec)
            if trial is not None:
                recipe = floors(bench, trial, "before_decision")
                found.append(trial._replace(d=mean_d(answers(bench, recipe, bench.questions), *acts)))
            progress("select", len(trials) + len(found), total)
        trials += found
        top = max(found, key=lambda trial: trial.d, default=None)
        if top is None or (best is not None and top.d <= best.d):
            break
        best = top
    return sorted((trial for trial in trials if trial is not best), key=lambda trial: trial.d) + ([best] if best else [])
