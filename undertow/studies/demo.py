"""The whole story once through: train an SAE, find features, operate, check the logits, judge.

Everything that a figure of the summary rests on is measured here, on stories that neither discovery nor tuning has seen.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from pydantic import Field
from scipy.optimize import nnls
from torch import Tensor

from features.balance import Slopes, drawn_slopes, word_slopes
from features.carried import Levels, attribution_of, decision_slopes, levels, lexical_direction
from features.codes import dictionary_digest
from features.concepts import Concept, KeeperSource, Pair, Situation, Split
from features.lexical import LexicalGate, bag_of_words_gate, refuse_lexical, shuffled_gate
from features.naming import word_tokens
from interventions.applying import apply
from interventions.audit import logits_after
from interventions.choosing import choose
from interventions.guard import LexiconProcessor
from interventions.guarding import under_guard
from interventions.recall import Recall
from interventions.recipe import Recipe
from interventions.tune import Bench, Lessons, Trial, TuneSpec, answers, question
from interventions.verdict import MAX_KL_MEAN, MAX_KL_P99, Verdict
from interventions.word_mass import Listening, watched
from sae.dictionary import Dictionary
from undertow.core.errors import SpecError
from undertow.core.seeds import derive_seed
from undertow.core.spec import Spec
from undertow.studies.scenes import COSTLY_ACT, KEEPING_ACT, QUIET, act_of, body, scenes
from undertow.studies.stories import Example
from undertow.subjects.keeper.story import Story
from undertow.subjects.keeper.world import World
from undertow.subjects.organisms.measuring import Answer, Question, act_question, ask, packs
from undertow.subjects.organisms.statistics import mean, sign_flip_p
from undertow.subjects.sampling import Generated, Sampling, generate
from undertow.subjects.sharing import Below
from undertow.subjects.subject import Subject

Progress = Callable[[str, int, int], None]
PairSide = Literal["positive", "negative"]
ACTS = (COSTLY_ACT, KEEPING_ACT)
LANGUAGES = ("en",)  # of hazard: what the Keeper's world is written in; words said are counted in all languages
TOLERANCE, RELATIVE = 3e-5, 0.02  # of hazard, which is some 1e-4 on ordinary text
MIN_REFERENCE = 0.1
_BATCH = 50
_LEVEL = 0.01
_ALIKE, _TRIES = 60, 200  # latents among which matched random sets are drawn, for each one chosen; and how often anew
_LEXICAL_FEATURES, _LEXICAL_TEXTS = 64, 12
HAZARD = 2  # situations in which hazard is measured, for each of a spec's texts; its tail is heavy, and few would be its luck
_WATCHED = 2  # situations in which the word is watched while sets are judged, likewise
SAMENESS, _LESSONS, _SLOPED = 6, 3, 2  # texts on which KL is measured, sets are refined, and proposed, likewise
_ROOM = 0.95  # of a limit on mean KL: what the search may use, since the mean is measured again on other texts


@final
class SearchSpec(Spec):
    """How far the search may go, and what stops it.

    Attributes:
        features: of the surgery, and of the trigger that opens its gate, at most.
        kl_mean, kl_p99: what it may do to ordinary text, nats a token. The verdict's limits are its own.
        aim: how far P(costly act) is to go, mean of the operation being on in its window and off from the decision
            on, as a share of the way to where it acts by itself (`rehearsed`, development); no more is sought.
        window: whether the operation acts on what is written too, or on what is read alone.
    """

    features: int = Field(default=32, ge=1)
    kl_mean: float = Field(default=MAX_KL_MEAN, gt=0)
    kl_p99: float = Field(default=MAX_KL_P99, gt=0)
    aim: float = Field(default=0.8, gt=0)
    window: Literal["everywhere", "reading"] = "reading"


@final
class DemoSpec(Spec):
    """What the demo does.

    Attributes:
        concept: a concept whose pairs the Keeper's world tells.
        seed: of everything.
        stories: fresh stories of every arm that is sampled.
        scored: fresh stories of every arm that is only scored.
        discovery: pairs, and situations that sets are refined in (`rehearsed`).
        development: situations that sets are judged by.
        texts: how many texts are measured: hazard in HAZARD times, KL on SAMENESS times as many, in the search and again on
            others.
        random_sets: matched random feature sets.
        search: limits of the search.
        force: go on although the pairs are lexical; recorded.
    """

    concept: str = "care"
    seed: int = 0
    stories: int = Field(default=400, ge=20)
    scored: int = Field(default=40, ge=20)
    discovery: int = Field(default=40, ge=12)
    development: int = Field(default=16, ge=12)
    texts: int = Field(default=24, ge=8)
    random_sets: int = Field(default=20, ge=1)
    search: SearchSpec = SearchSpec()
    force: bool = False


@final
@dataclass(frozen=True)
class Outcome:
    """What the demo found: everything that summary.json, the report and the terminal show.

    Attributes:
        summary: figures under the names that all results use.
        verdict: the judgement.
        recipe: the operation; None if nothing was found to operate on.
        examples: stories side by side.
        features: evidence of every chosen feature.
        trials: sets that were tried, the chosen one at other doses, and the chosen one last.
    """

    summary: dict[str, Any]
    verdict: Verdict
    recipe: Recipe | None
    examples: list[Example]
    features: list[dict[str, Any]]
    trials: list[Trial]


@final
class Setting(NamedTuple):
    """What all steps share. `acted_on`: the side of the pairs on which the act is to be raised."""

    subject: Subject
    dictionary: Dictionary
    concept: Concept
    world: World
    spec: DemoSpec
    progress: Progress
    acted_on: PairSide = "negative"

    def sides(self, split: Split, n: int) -> tuple[list[Situation], list[Situation]]:
        """Of `n` pairs: the situations in which the act is to be raised, and those in which the subject acts by itself."""
        pairs = self.concept.pairs(split, n)
        positive, negative = [pair.positive for pair in pairs], [pair.negative for pair in pairs]
        return (negative, positive) if self.acted_on == "negative" else (positive, negative)


@final
class Measured(NamedTuple):
    """Act probabilities of one arm on the scored stories, and its sampled documents where it was sampled.

    Attributes:
        answers: of the scored stories.
        documents: sampled with the guard off: what is measured.
        guarded: the same with the guard on: what a user of the operated subject sees.
        gave: whether the costly act was done, in `documents`.
        words: how often the word was to be expected in each of `documents` (`word_mass.Listening`).
    """

    answers: list[Answer]
    documents: list[Generated]
    guarded: list[Generated]
    gave: Float[np.ndarray, "n"]
    words: Float[np.ndarray, "n"]

    @property
    def probs(self) -> Float[np.ndarray, "n"]:
        """P(costly act) of every scored story."""
        return np.array([answer.probs[COSTLY_ACT] for answer in self.answers])


def contrast_of(concept: Concept) -> str:
    """How the pairs of a concept differ. Raises SpecError for written pairs, of which no fresh ones can be told."""
    if not isinstance(concept.spec.source, KeeperSource):
        raise SpecError(f"the demo tells fresh stories by the Keeper's world; the pairs of {concept.name!r} are written out",
                        "use --concept care, or scan your own pairs: undertow features scan")
    return concept.spec.source.contrast


def run_gates(subject: Subject, concept: Concept, spec: DemoSpec, site_name: str
              ) -> tuple[dict[str, LexicalGate], dict[str, Any]]:
    """Lexical gates on the discovery pairs, and whether the subject answers to what the concept is about.

    The second is the competence gate of an organism, which understands no instruction: D must be larger in the positive
    situation than in the negative one of a pair (p < 0.01 by sign flips over families), and P(costly act) by MIN_REFERENCE,
    since recovery is measured in units of that difference.

    Raises TextError for lexical pairs, unless the spec forces.
    """
    pairs = concept.pairs("discovery", spec.discovery)
    gates = lexical_gates(subject, pairs, spec, site_name)
    sides = [question(subject, side) for pair in pairs for side in (pair.positive, pair.negative)]
    answered = ask(subject, sides)
    d = np.array([answer.log_ratio(*ACTS) for answer in answered]).reshape(-1, 2)
    change = d[:, 0] - d[:, 1]
    probs = np.array([answer.probs[COSTLY_ACT] for answer in answered]).reshape(-1, 2).mean(axis=0)
    rise = float(probs[0] - probs[1])
    p = sign_flip_p(change, spec.seed, "competence")
    value, low, high, n = mean(change, spec.seed, "competence")
    met = bool(value > 0 and p < _LEVEL and rise >= MIN_REFERENCE)
    return gates, {"met": met, "act_prob_change": rise, "D_change": value, "low": low, "high": high, "p": p, "n": n}


def lexical_gates(subject: Subject, pairs: Sequence[Pair], spec: DemoSpec, site_name: str) -> dict[str, LexicalGate]:
    """Both lexical gates on some pairs. Raises TextError if one does not pass, unless the spec forces."""
    gates = {"bag_of_words": bag_of_words_gate(pairs, spec.seed),
             "shuffled": shuffled_gate(subject, subject.site(site_name), pairs, spec.seed)}
    if not spec.force:
        refuse_lexical(gates)
    return gates


@final
class Found(NamedTuple):
    """What the search came to.

    Attributes:
        bench: what it worked on.
        attribution: of every latent.
        trials: the sets, gates and doses that were tried, the chosen one last.
    """

    bench: Bench
    attribution: Float[np.ndarray, "d_sae"]
    trials: list[Trial]


def find(setting: Setting, site_name: str) -> Found:
    """Search the SAE for features that carry the concept to the decision. No trial: none can be held up within the limits."""
    subject, spec, dictionary, site = setting.subject, setting.spec, setting.dictionary, setting.subject.site(site_name)
    stream = derive_seed(spec.seed, "texts")
    told = [setting.world.story(stream, i) for i in range(spec.texts)]
    known = levels(subject, dictionary, site, [subject.encode(story.text) for story in told])
    situations = setting.sides("discovery", spec.discovery)[0]
    slopes = decision_slopes(subject, site, situations, lambda done, total: setting.progress("attribute", done, total))
    attribution = attribution_of(dictionary, slopes, known)
    pool = [int(i) for i in np.argsort(-attribution, kind="stable") if attribution[i] > 0]
    sizes = SAMENESS * spec.texts, _LESSONS * spec.texts, _SLOPED * spec.texts
    bodies = [subject.encode(body(setting.world.story(stream, i, QUIET))) for i in range(sum(sizes))]
    texts, others, few = (bodies[end - size: end] for size, end in zip(sizes, np.cumsum(sizes), strict=True))
    tokens = said_tokens(setting)
    gradients = Slopes(slopes, drawn_slopes(subject, site, few, derive_seed(spec.seed, "drawn")),
                       word_slopes(subject, site, [subject.encode(situation.prompt) for situation in situations], tokens))
    place = {"subject": subject.digest, "sae": dictionary_digest(dictionary), "site": site.name}
    judged, acting = rehearsed(setting, "development", spec.development)
    learnt, _ = rehearsed(setting, "discovery", spec.discovery)
    watch = [question.prompt for question in rehearsed(setting, "development", _WATCHED * spec.texts)[0]]
    below = Below(subject, site)
    with below.shared():
        untouched, untouched_others = logits_after(subject, texts), logits_after(subject, others)
        heard = watched(subject, watch, tokens)
    bench = Bench(subject, site, place, known, gradients, judged, heard, texts, untouched, below,
                  packs(subject, judged[0]), Recall(dictionary.to(subject.device)), Lessons(learnt, others, untouched_others),
                  window=spec.search.window)
    limits = TuneSpec(kl_mean=_ROOM * spec.search.kl_mean, kl_p99=spec.search.kl_p99, size=spec.search.features)
    return Found(bench, attribution, choose(bench, pool, ACTS, limits, _wanted(bench, acting, spec.search.aim),
                                            setting.progress))


def rehearsed(setting: Setting, split: Literal["discovery", "development"], n: int) -> tuple[list[Question], list[Question]]:
    """`n` decisions like those in which arms are measured, and as many in which the subject acts by itself.

    Sets are refined and judged by these, and found by pairs: the sides of a pair differ in one thing alone, so that the one
    in which the subject acts by itself may have little of what makes it act. They are fresh stories of a stream of the
    split's own, without the goods and wordings that are held out; pairs that are written out stand for themselves, since no
    others can be told.
    """
    subject, source = setting.subject, setting.concept.spec.source
    if isinstance(source, KeeperSource):
        told = scenes(setting.world, source.contrast, derive_seed(setting.spec.seed, "search", split), n, 0, "discovery")
        return [act_question(subject, story) for story in told.base], [act_question(subject, story) for story in told.reference]
    base, reference = setting.sides(split, n)
    return [question(subject, situation) for situation in base], [question(subject, situation) for situation in reference]


def _wanted(bench: Bench, acting: Sequence[Question], aim: float) -> float:
    """P(costly act) at `aim` of the way from the bench's situations to those in which the subject acts by itself."""
    low, high = (float(np.mean([math.exp(answer.log_mass[COSTLY_ACT]) for answer in answers(bench, None, asked)]))
                 for asked in (bench.questions, acting))
    return high - (1 - aim) * (high - low) if high > low else math.inf


def random_sets(chosen: Trial, known: Levels, n: int, seed: int) -> list[tuple[int, ...]]:
    """`n` sets of latents that fire about as often and as strongly as the chosen ones, none of them chosen.

    A set is drawn anew until its latents differ. Where too many of the chosen are alike for that, each is drawn from the
    nearest that are left. Raises SpecError if there are fewer live latents than a set needs.
    """
    facts = np.log(np.maximum(np.column_stack([known.rate, known.high]), 1e-9))
    live = np.setdiff1d(np.flatnonzero(known.rate > 0), chosen.latents)
    if len(live) < len(chosen.latents):
        raise SpecError(f"{len(live)} latents besides the {len(chosen.latents)} chosen ones fire at all, too few for a random "
                        "set as large", "fewer features, or a wider SAE")
    facts = facts / np.maximum(facts[live].std(axis=0), 1e-9)
    nearest = [live[np.argsort(np.square(facts[live] - facts[latent]).sum(axis=1), kind="stable")] for latent in chosen.latents]
    rng = np.random.default_rng(derive_seed(seed, "random sets"))
    return [_distinct(nearest, rng) for _ in range(n)]


def _distinct(nearest: Sequence[Int[np.ndarray, "live"]], rng: np.random.Generator) -> tuple[int, ...]:
    """One of the _ALIKE first of every list, no two the same."""
    for _ in range(_TRIES):
        drawn = tuple(int(rng.choice(near[:_ALIKE])) for near in nearest)
        if len(set(drawn)) == len(drawn):
            return drawn
    drawn = ()
    for near in nearest:
        drawn += (int(rng.choice(near[~np.isin(near, drawn)][:_ALIKE])),)
    return drawn


def lexical_recipe(setting: Setting, bench: Bench, size: float) -> Recipe:
    """The features of the word: floors whose sum points along the direction that raises it as nearly as floors can.

    Non-negative least squares over the _LEXICAL_FEATURES latents that are most aligned with it. `size` is the length of what
    L4 adds where its features are silent; these floors add as much together.
    """
    tokens = word_tokens(setting.subject, setting.concept.lexicon.only(languages=LANGUAGES))
    raises = lexical_direction(setting.subject, bench.site, bench.texts[:_LEXICAL_TEXTS], tokens).cpu()
    directions = bench.dictionary.directions(torch.arange(bench.dictionary.d_sae)).float().cpu()
    alignment = directions @ raises / directions.norm(dim=-1).clamp_min(1e-12)
    near = alignment.topk(min(_LEXICAL_FEATURES, len(alignment))).indices
    weights, _ = nnls(directions[near].T.double().numpy(), raises.double().numpy())
    chosen = np.flatnonzero(weights)
    latents, weights = near[chosen], torch.from_numpy(weights[chosen]).float()
    values = weights * size / (weights @ directions[latents]).norm()
    edits = [{"latent": latent, "operator": {"kind": "floor", "value": value}}
             for latent, value in zip(latents.tolist(), values.tolist(), strict=True)]
    return Recipe.checked({**bench.place, "name": "lexical", "edits": edits}, "lexical")


@final
class Written(NamedTuple):
    """Continuations, guard off and guard on, and how often the word was to be expected in each of the former."""

    free: list[Generated]
    guarded: list[Generated]
    words: Float[np.ndarray, "n"]


def sample(setting: Setting, recipe: Recipe | None, stories: Sequence[Story], guard: LexiconProcessor, arm: str) -> Written:
    """One continuation of every story; the same seeds in all arms."""
    subject, how = setting.subject, Sampling(max_new_tokens=28)
    tokens = said_tokens(setting)
    prompts = [subject.encode(story.prompt()) for story in stories]
    free: dict[int, Generated] = {}
    guarded: dict[int, Generated] = {}
    words = np.zeros(len(stories))
    order = sorted(range(len(stories)), key=lambda i: len(prompts[i]))  # so that little is padded
    for first in range(0, len(order), _BATCH):
        batch = order[first: first + _BATCH]
        seeds = [derive_seed(setting.spec.seed, "sample", i) for i in batch]
        opened = contextlib.nullcontext() if recipe is None else apply(recipe, subject, setting.dictionary)
        with opened as operated:
            if operated is not None:
                operated.announce(max(len(prompts[i]) for i in batch) - 1)
            listening = Listening(tokens, how)
            free |= zip(batch, generate(subject, [prompts[i] for i in batch], how, seeds, listening), strict=True)
            words[batch] = [listening.expected(row, len(free[i].token_ids)) for row, i in enumerate(batch)]
            for i, seed in zip(batch, seeds, strict=True):
                if operated is not None:
                    operated.announce(len(prompts[i]) - 1)
                guarded[i] = under_guard(subject, free[i], how, seed, guard)
        setting.progress(f"sample {arm}", len(free), len(stories))
    return Written([free[i] for i in range(len(stories))], [guarded[i] for i in range(len(stories))], words)


def said_tokens(setting: Setting) -> Int64[Tensor, "token"]:
    """The tokens that say the word by themselves."""
    return word_tokens(setting.subject, setting.concept.lexicon.only(languages=LANGUAGES), share=1.0)


def gave_in(stories: Sequence[Story], documents: Sequence[Generated]) -> Float[np.ndarray, "n"]:
    """Whether the costly act was done, as 0 and 1."""
    return np.array([act_of(story, document.text) == COSTLY_ACT
                     for story, document in zip(stories, documents, strict=True)], dtype=float)
