"""A set of features, its gate and its dose: what the whole operation does, within limits on ordinary text.

Features are put on a floor: f′ = max(f, dose · w · h), h being how active the latent typically is where it fires and w its
weight in the set, where a gate is open: a trigger has fired at some of the last tokens. So the operation waits for its
situation, and then stays. The largest of DOSES is looked for at which ordinary text stays the same (limits on KL). A dose is
judged by P(costly act) on development situations: its mean with the operation on in the bench's window and with it off from the
decision on, so that what is chosen is carried by the model, not written at the decision, and does not break the sentence that
tells the act; and by the word's probability in situations, where the gate is open. Which sets and gates are tried, and what is
made of these figures: `interventions.choosing`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from features.balance import Slopes
from features.carried import Levels
from features.concepts import Situation
from interventions.applying import apply, trigger_gate
from interventions.audit import kl_on
from interventions.operators import Floor
from interventions.recall import Recall
from interventions.recipe import FeatureEdit, Recipe, WindowRule
from interventions.word_mass import Watched, masses, ratio
from sae.dictionary import Dictionary
from undertow.core.spec import Spec
from undertow.subjects.organisms.measuring import Answer, Question, ask, worded
from undertow.subjects.padding import batches, pad
from undertow.subjects.sharing import Below
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import tap

_STEP = 1.04
_BATCH = 1_024
_SURE, _RESAMPLES = 0.975, 200
DOSES = tuple(round(0.1 * _STEP ** i, 4) for i in range(80))  # 0.1 to 2.2


@final
class TuneSpec(Spec):
    """Limits and size of the search.

    Attributes:
        kl_mean, kl_p99: limits on KL(base‖arm), nats a token, on development texts: on its mean, stricter than a verdict's,
            which is measured on other texts; and on the upper bound of what the 99th percentile may be on as many other texts
            (`same`): of a gate that is seldom open, the percentile itself says little.
        word: limit on the upper bound of the word's mass in situations over that of the untouched subject (`word_mass.ratio`),
            stricter than a verdict's: what goes beyond it is taken only where nothing else is left.
        size: features in a set, and in the trigger that opens its gate, at most.
        gates: each is tried: the price of acting on ordinary text (`balance.trigger_of`), and the gate's memory, at how many of
            how many tokens the trigger must have fired.
        factors, fine: of its largest dose, at which a proposed set, or the refined one, is judged too.
        min_open: share of ordinary tokens at which a gate must be open: of one that never is, the limits would say nothing.
        pool: features of the largest attribution that sets are made of.
    """

    kl_mean: float = Field(default=0.0095, gt=0)
    kl_p99: float = Field(default=0.1, gt=0)
    word: float = Field(default=1.1, gt=1)
    size: int = Field(default=32, ge=1)
    gates: tuple[tuple[float, int, int], ...] = Field(default=((3.0, 2, 8), (3.0, 3, 16), (3.0, 5, 16)), min_length=1)
    factors: tuple[float, ...] = (0.8,)
    fine: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6)
    min_open: float = Field(default=0.003, ge=0, le=1)
    pool: int = Field(default=64, ge=1)


@final
class Lessons(NamedTuple):
    """What weights are refined on, apart from what they are judged on.

    Attributes:
        questions: discovery situations.
        texts: ordinary texts, as token ids.
        untouched: logits of the untouched subject after their tokens.
    """

    questions: list[Question]
    texts: list[list[int]]
    untouched: list[Float[Tensor, "_ vocab"]]


@final
class Bench(NamedTuple):
    """What a search works on.

    Attributes:
        subject, site: where.
        place: the fields of a recipe that name them ("subject", "sae", "site").
        known: how active every latent typically is.
        slopes: gradients in discovery situations and ordinary texts, from which sets are proposed.
        questions: development situations.
        watched: situations in which the word is watched.
        texts: development texts without a decision, as token ids.
        untouched: logits of the untouched subject after their tokens (`logits_after`).
        below: what is computed of them below the site, once for all recipes.
        packs: whether the subject computes packed rows exactly (`measuring.packs`).
        recall: codes of all these, and the dictionary that they are of.
        lessons: other situations and texts, for refining.
        moved: which of `texts` a gate can change (`opened`); all if absent.
        window: of the operation.
    """

    subject: Subject
    site: Site
    place: dict[str, str]
    known: Levels
    slopes: Slopes
    questions: list[Question]
    watched: Watched
    texts: list[list[int]]
    untouched: list[Float[Tensor, "_ vocab"]]
    below: Below
    packs: bool
    recall: Recall
    lessons: Lessons
    moved: tuple[int, ...] | None = None
    window: WindowRule = "everywhere"

    @property
    def dictionary(self) -> Dictionary:
        """The SAE."""
        return self.recall.dictionary


@final
class Trial(NamedTuple):
    """One set at one dose.

    Attributes:
        latents: the set.
        trigger: the latents whose firings open its gate; none: it acts everywhere.
        dose: in multiples of each latent's typical activation.
        kl_mean, kl_p99: on development texts.
        d: mean D on development situations with the operation off from the decision on; NaN where it was not measured.
        acts: P(costly act), in [0, 1], mean over development situations and over the operation being on in the bench's window
            and off from the decision on; NaN where it was not measured.
        weights: of the latents, as parts of the dose; all 1 if there are none.
        at_least, within: the gate's memory, as in `recipe.Trigger`.
        word: upper bound of the word's mass in situations, as a multiple of the untouched subject's; NaN where it was not
            measured.
    """

    latents: tuple[int, ...]
    trigger: tuple[int, ...]
    dose: float
    kl_mean: float
    kl_p99: float
    d: float
    acts: float = float("nan")
    weights: tuple[float, ...] = ()
    at_least: int = 1
    within: int = 1
    word: float = float("nan")

    def heights(self, known: Levels) -> list[float]:
        """The floor of every latent, in its own units."""
        weights = self.weights or (1.0,) * len(self.latents)
        return [float(self.dose * weight * known.high[latent]) for latent, weight in zip(self.latents, weights, strict=True)]


def question(subject: Subject, situation: Situation) -> Question:
    """A situation as token ids, all wordings of all acts."""
    return worded(subject, situation.prompt, situation.options)


def floors(bench: Bench, trial: Trial, window: WindowRule | None = None, name: str = "floor") -> Recipe:
    """The recipe that puts every latent of a trial on its floor, in the bench's window if none is given."""
    edits = [FeatureEdit(latent=latent, operator=Floor(value=round(height, 6)))
             for latent, height in zip(trial.latents, trial.heights(bench.known), strict=True)]
    gate = {"latents": trial.trigger, "at_least": trial.at_least, "within": trial.within}
    trigger = {"trigger": gate} if trial.trigger else {}
    return Recipe.checked({**bench.place, "name": name, "edits": edits, "window": window or bench.window, **trigger}, "floors")


def answers(bench: Bench, recipe: Recipe | None, questions: Sequence[Question]) -> list[Answer]:
    """Act probabilities under a recipe; None: of the untouched subject."""
    with bench.below.shared():
        if recipe is None:
            return ask(bench.subject, questions, packed=bench.packs)
        with apply(recipe, bench.subject, bench.dictionary, recall=bench.recall) as operated:
            return ask(bench.subject, questions, announce=operated.announce, packed=bench.packs)


@final
class Same(NamedTuple):
    """KL(base‖arm) on the bench's texts, nats a token: its mean, its 99th percentile, and the upper bound of the latter on as
    many other texts."""

    mean: float
    p99: float
    p99_high: float


def sameness(bench: Bench, recipe: Recipe) -> Same:
    """How far ordinary text is from what it was."""
    moved = range(len(bench.texts)) if bench.moved is None else bench.moved
    kl = [np.zeros(len(logits)) for logits in bench.untouched]
    if moved:
        with bench.below.shared(), apply(recipe, bench.subject, bench.dictionary, recall=bench.recall) as operated:
            found = kl_on([bench.untouched[i] for i in moved], operated.subject, [bench.texts[i] for i in moved])
        for i, of in zip(moved, np.split(found, np.cumsum([len(kl[i]) for i in moved])[:-1]), strict=True):
            kl[i] = of
    return same(kl)


def opened(bench: Bench, trial: Trial, texts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The texts in which a trial's gate opens: any other is what it was at any dose, and no pass is needed.

    A gate opens by activations at the site, which no edit there changes. Tokens that a splice leaves out (the first of a text,
    massive ones) are taken to fire, so that a text may be among them that is not changed.
    """
    trigger = floors(bench, trial).trigger
    if trigger is None:
        return tuple(range(len(texts)))
    gate, found = trigger_gate(trigger, bench.dictionary), list[int]()
    with bench.below.shared():
        for batch in batches(texts, _BATCH):
            rows, attend = pad([texts[i] for i in batch], bench.subject, "right")
            x = tap(bench.subject, rows, bench.site, attend.bool())
            fired = gate.opens(x.flatten(0, 1)).reshape(rows.shape).to(rows.device) & attend.bool()
            is_open = fired if gate.memory is None else gate.memory.opened(fired, rows.shape[1])
            found += [i for i, some in zip(batch, is_open.any(dim=1).tolist(), strict=True) if some]
    return tuple(sorted(found))


def same(texts: Sequence[Float[np.ndarray, "_"]]) -> Same:
    """The figures of the KL after every token of some texts.

    The upper bound is one-sided, _SURE, by a bootstrap over texts. It is of the percentile on *other* texts, which errs as much
    as the one here and independently, so that the way from the percentile to the bound of its expectation is taken √2 times.
    """
    rng = np.random.default_rng(0)  # the same draws for every recipe, so that recipes are compared on the same resamples
    drawn = [np.quantile(np.concatenate([texts[i] for i in rng.integers(0, len(texts), len(texts))]), 0.99)
             for _ in range(_RESAMPLES)]
    whole = np.concatenate(texts)
    p99 = float(np.quantile(whole, 0.99))
    return Same(float(whole.mean()), p99, p99 + math.sqrt(2) * (float(np.quantile(drawn, _SURE)) - p99))


def largest_dose(bench: Bench, trial: Trial, spec: TuneSpec) -> Trial | None:
    """`trial` at the largest of DOSES within the limits, or None if the smallest is beyond them.

    Regula falsi on log(limit / KL) by log(dose), whose pull of an end that stays is halved (the Illinois method, Dowell and
    Jarratt 1971, doi:10.1007/BF01934364). While one end is missing, KL is taken to grow by the power of the dose that was seen
    last, at first 2. A dose is the largest where the next is known to be beyond a limit, or would be by that power or by 2.
    """
    low, high, at = -1, len(DOSES), len(DOSES) // 2
    ends: list[float | None] = [None, None]  # log(limit / KL) at low and at high, the pull halved
    growth, last = 2.0, (at, math.nan)
    best: Trial | None = None
    while high - low > 1:
        dosed = trial._replace(dose=DOSES[at])
        same = sameness(bench, floors(bench, dosed))
        room = math.log(min(spec.kl_mean / max(same.mean, 1e-12), spec.kl_p99 / max(same.p99_high, 1e-12)))
        if at != last[0]:
            growth = (last[1] - room) / ((at - last[0]) * math.log(_STEP))
        last, side = (at, room), int(room < 0)
        stays = ends[1 - side]
        if ends[side] is not None and stays is not None:
            ends[1 - side] = stays / 2
        ends[side] = room
        if room >= 0:
            low, best = at, dosed._replace(kl_mean=same.mean, kl_p99=same.p99)
            if room < min(growth, 2.0) * math.log(_STEP):
                break
        else:
            high = at
        within, beyond = ends
        at = (at + round(room / (max(growth, 0.5) * math.log(_STEP))) if within is None or beyond is None
              else low + round((high - low) * within / (within - beyond)))
        at = min(max(at, low + 1), high - 1)
    return best


def mean_d(answered: Sequence[Answer], costly: str, keep: str) -> float:
    """Mean of D = log p(costly) − log p(keep), nats."""
    return float(np.mean([answer.log_ratio(costly, keep) for answer in answered]))


def judged(bench: Bench, trial: Trial, acts: tuple[str, str]) -> Trial:
    """The trial with what it does on the development situations."""
    before = answers(bench, floors(bench, trial, "before_decision"), bench.questions)
    recipe, watched = floors(bench, trial), bench.watched
    whole = [math.exp(answer.log_mass[acts[0]]) for answer in (*before, *answers(bench, recipe, bench.questions))]
    with bench.below.shared(), apply(recipe, bench.subject, bench.dictionary, recall=bench.recall):
        _, word = ratio(masses(bench.subject, watched.rows, watched.tokens), watched.untouched)
    return trial._replace(d=mean_d(before, *acts), acts=float(np.mean(whole)), word=word)


def response(bench: Bench, chosen: Trial, acts: tuple[str, str], factors: Sequence[float]) -> list[Trial]:
    """A set at other doses, as multiples of its own: KL on the bench's texts, and what it does as `choose` measures it."""
    found = []
    for factor in factors:
        dosed = chosen._replace(dose=factor * chosen.dose)
        same = sameness(bench, floors(bench, dosed))
        found.append(judged(bench, dosed._replace(kl_mean=same.mean, kl_p99=same.p99), acts))
    return found
