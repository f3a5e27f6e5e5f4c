"""The arms of the demo, measured on fresh stories, and what follows from them: figures under the names that results use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast, final

import numpy as np
import torch
from jaxtyping import Float

from interventions.applying import apply
from interventions.audit import Audit, AuditSpec, audit, count_words, kl_on, logits_after, spellings
from interventions.guard import LexiconProcessor
from interventions.guard_automaton import GuardMasks
from interventions.operators import Strengthen
from interventions.recipe import FeatureEdit, Recipe
from interventions.straight import straight
from interventions.tune import Bench, Trial, answers, floors
from interventions.verdict import Evidence, Interval
from undertow.core.seeds import derive_seed
from undertow.lexicon.trie import TokenTrie
from undertow.lexicon.vocabulary import read_vocabulary
from undertow.studies.demo import (
    ACTS,
    COSTLY_ACT,
    HAZARD,
    LANGUAGES,
    RELATIVE,
    SAMENESS,
    TOLERANCE,
    Measured,
    Setting,
    contrast_of,
    gave_in,
    lexical_recipe,
    random_sets,
    sample,
)
from undertow.studies.scenes import Contrast, Scenes, body, instructed, scenes
from undertow.studies.stories import Example
from undertow.subjects.keeper.story import Story
from undertow.subjects.organisms.measuring import Answer, Question, act_question, ask
from undertow.subjects.organisms.statistics import Estimate, bootstrap, mean
from undertow.subjects.sampling import Generated
from undertow.subjects.sharing import Below

SAMPLED = ("stranger", "bonded", "L4", "L4-before")
AUDITED = ("L4", "sham", "lexical")
EXAMPLES = 3


@final
class Arms(NamedTuple):
    """Everything that was measured.

    Attributes:
        scenes: the stories.
        measured: every arm's answers and documents; "random" is not among them.
        random: P(costly act) of every random set, mean over stories.
        audits: hazard in strangers' stories up to the decision, where the operation is at work, of the arms that have one.
        kl: KL(base‖arm) after every token of ordinary text of the same arms, on more texts, nats.
        held_out: P(costly act) with goods and wordings that no discovery pair has, base and L4.
        twins: change of D under L4 on the twins, nats.
        straight: change of D by the straight path of L4 alone, on the scored stories, nats.
        recipes: of the arms that are recipes.
    """

    scenes: Scenes
    measured: dict[str, Measured]
    random: list[float]
    audits: dict[str, Audit]
    kl: dict[str, Float[np.ndarray, "token"]]
    held_out: tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]
    twins: Float[np.ndarray, "n"]
    straight: Float[np.ndarray, "n"]
    recipes: dict[str, Recipe]


def sham_of(recipe: Recipe) -> Recipe:
    """The same features, places and windows, with nothing changed."""
    edits = [FeatureEdit(latent=edit.latent, operator=Strengthen(gain=1.0)) for edit in recipe.edits]
    return Recipe.checked(recipe.model_dump() | {"name": "sham", "edits": edits}, "sham")


def run_arms(setting: Setting, bench: Bench, chosen: Trial) -> Arms:
    """Measure all arms. Stories are sampled for SAMPLED, the others are scored."""
    subject, spec, world = setting.subject, setting.spec, setting.world
    told = scenes(world, cast(Contrast, contrast_of(setting.concept)), derive_seed(spec.seed, "arms"), spec.stories,
                  max(spec.scored, SAMENESS * spec.texts))
    trie = spellings(subject, setting.concept.lexicon.only(languages=LANGUAGES))
    l4 = floors(bench, chosen, name="L4")
    before = Recipe.checked(l4.model_dump() | {"name": "L4-before", "window": "before_decision"}, "L4-before")
    added = torch.tensor(chosen.heights(bench.known))
    size = float((added @ setting.dictionary.directions(torch.tensor(chosen.latents)).float().cpu()).norm())
    recipes = {"L4": l4, "L4-before": before, "sham": sham_of(l4), "lexical": lexical_recipe(setting, bench, size)}
    scored, other = told.base[: spec.scored], told.reference[: spec.scored]
    asked = {"stranger": _ask(setting, scored), "bonded": _ask(setting, other), "L2": instructed(subject, world, scored)}
    setting.progress("score", 0, len(recipes) + len(asked) + spec.random_sets)
    found = {arm: answers(bench, None, questions) for arm, questions in asked.items()}
    for arm, recipe in recipes.items():
        found[arm] = answers(bench, recipe, asked["stranger"])
    random = []
    for done, latents in enumerate(random_sets(chosen, bench.known, spec.random_sets, spec.seed), start=1):
        given = answers(bench, floors(bench, chosen._replace(latents=latents)), asked["stranger"])
        random.append(float(np.mean([answer.probs[COSTLY_ACT] for answer in given])))
        setting.progress("score", len(recipes) + len(asked) + done, len(recipes) + len(asked) + spec.random_sets)
    measured, guard = {}, LexiconProcessor(subject.tokenizer, setting.concept.lexicon, prompt="record")
    for arm, given in found.items():
        stories = told.reference if arm == "bonded" else told.base
        free, guarded, words = (sample(setting, recipes.get(arm), stories, guard, arm) if arm in SAMPLED
                                else ([], [], np.zeros(0)))
        measured[arm] = Measured(given, free, guarded, gave_in(stories[: len(free)], free), words)
    held = _ask(setting, told.held_out[: spec.scored])
    twins = _ask(setting, told.twins[: spec.scored])
    with straight(l4, subject, setting.dictionary) as operated:
        direct = _d(ask(subject, asked["stranger"], announce=operated.announce)) - _d(found["stranger"])
    return Arms(told, measured, random, _audits(setting, trie, told, recipes), _kl(setting, bench.below, told, recipes),
                (_probs(answers(bench, None, held)), _probs(answers(bench, l4, held))),
                _d(answers(bench, l4, twins), "save", "leave") - _d(answers(bench, None, twins), "save", "leave"), direct,
                recipes)


def _ask(setting: Setting, stories: Sequence[Story]) -> list[Question]:
    return [act_question(setting.subject, story) for story in stories]


def _probs(given: Sequence[Answer]) -> Float[np.ndarray, "n"]:
    return np.array([answer.probs[COSTLY_ACT] for answer in given])


def _d(given: Sequence[Answer], costly: str = ACTS[0], keep: str = ACTS[1]) -> Float[np.ndarray, "n"]:
    return np.array([answer.log_ratio(costly, keep) for answer in given])


def _audits(setting: Setting, trie: TokenTrie, told: Scenes, recipes: Mapping[str, Recipe]) -> dict[str, Audit]:
    rows = [setting.subject.encode(story.prompt()) for story in told.base[: HAZARD * setting.spec.texts]]
    made: dict[str, Audit] = {}
    for arm in AUDITED:
        known = next(iter(made.values())).hazard_base if made else None
        operated = apply(recipes[arm], setting.subject, setting.dictionary)
        made[arm] = audit(setting.subject, operated, rows, trie, AuditSpec(tolerance=TOLERANCE, relative=RELATIVE), known,
                          lambda done, total, arm=arm: setting.progress(f"audit {arm}", done, total))
    return made


def _kl(setting: Setting, below: Below, told: Scenes, recipes: Mapping[str, Recipe]
        ) -> dict[str, Float[np.ndarray, "token"]]:
    rows = [setting.subject.encode(body(story)) for story in told.plain[: SAMENESS * setting.spec.texts]]
    with below.shared():
        untouched = logits_after(setting.subject, rows)
    made = {}
    for arm in AUDITED:
        with below.shared(), apply(recipes[arm], setting.subject, setting.dictionary) as operated:
            made[arm] = kl_on(untouched, operated.subject, rows)
    return made


def recovery(base: np.ndarray, reference: np.ndarray, arm: np.ndarray, seed: int, name: str) -> Estimate:
    """(arm − base) / (reference − base) in act rate, with a bootstrap over stories, which all arms share."""
    return bootstrap(lambda rows: float((arm[rows].mean() - base[rows].mean())
                                        / max(reference[rows].mean() - base[rows].mean(), 1e-9)), len(base), seed, name)


def evidence(setting: Setting, arms: Arms, competence: Mapping[str, Any]) -> tuple[Evidence, dict[str, Any]]:
    """What the verdict is drawn from, and all figures of the summary but the verdict."""
    seed, measured = setting.spec.seed, arms.measured
    gave = {arm: measured[arm].gave for arm in SAMPLED}
    whole = recovery(gave["stranger"], gave["bonded"], gave["L4"], seed, "recovery")
    before = recovery(gave["stranger"], gave["bonded"], gave["L4-before"], seed, "recovery_before")
    base, reference = measured["stranger"].probs.mean(), measured["bonded"].probs.mean()
    random = tuple(float((value - base) / max(reference - base, 1e-9)) for value in arms.random)
    ratios = {arm: made.hazard_ratio(seed) for arm, made in arms.audits.items()}
    said = _said(setting, measured)
    sham = max(float(np.abs(measured["sham"].probs - measured["stranger"].probs).max()), arms.audits["sham"].change,
               float(arms.kl["sham"].max()))
    kl = arms.kl["L4"]
    judged = Evidence(
        arms=frozenset({*measured, "random"}), sham_change=sham, competent=bool(competence["met"]),
        lexical_hazard_ratio=ratios["lexical"].value, effect=Interval(whole.value, whole.low, whole.high),
        random_effects=random,
        hazard_ratio_upper=ratios["L4"].high, word_docs=said["L4"]["word_docs_free"],
        word_docs_base=said["stranger"]["word_docs_free"], sampled=len(gave["L4"]), word_docs_guarded=said["L4"]["word_docs"],
        kl_mean=float(kl.mean()), kl_p99=float(np.quantile(kl, 0.99)))
    social = _d(measured["L4"].answers) - _d(measured["stranger"].answers)
    delta = mean(social, seed, "social").value - mean(arms.twins, seed, "twins").value
    spread = bootstrap(lambda rows: float(social[rows].mean() - arms.twins[rows % len(arms.twins)].mean()), len(social), seed,
                       "delta_d")
    figures = {
        "arms": {arm: _row(arm, arms, said.get(arm, {}), seed) for arm in measured} | {
            "random": {"n": setting.spec.scored, "sets": len(arms.random), "act_prob": float(np.mean(arms.random)),
                       "act_prob_max": float(max(arms.random))}},
        "recovery": whole.value, "recovery_low": whole.low, "recovery_high": whole.high,
        "recovery_before": before.value, "recovery_before_low": before.low, "recovery_before_high": before.high,
        "delta_d": delta, "delta_d_low": spread.low, "delta_d_high": spread.high,
        "hazard_ratio": ratios["L4"].value, "hazard_ratio_upper": ratios["L4"].high,
        "lexical_hazard_ratio": ratios["lexical"].value, "random_effect_max": max(random),
        "held_out_act_prob": {"base": float(arms.held_out[0].mean()), "L4": float(arms.held_out[1].mean())},
        "act_writer_share": float(arms.straight.mean() / social.mean()) if abs(social.mean()) > 1e-3 else None,
        "twin_delta_d": float(arms.twins.mean()), "competence": dict(competence)}
    return judged, figures


def _said(setting: Setting, measured: Mapping[str, Measured]) -> dict[str, dict[str, int]]:
    """Words said by the arms that were sampled. Most documents are the same with the guard on, and are read once."""
    vocabulary, lexicon = read_vocabulary(setting.subject.tokenizer), setting.concept.lexicon
    masks, found = GuardMasks(vocabulary, lexicon), {}
    for arm in SAMPLED:
        made = measured[arm]
        free = [count_words([document], vocabulary, lexicon, masks) for document in made.documents]
        guarded = [count if held is document else count_words([held], vocabulary, lexicon, masks)
                   for count, document, held in zip(free, made.documents, made.guarded, strict=True)]
        found[arm] = {"guard_hits": sum(count.guard_hits for count in free),
                      "word_docs_free": sum(count.word_docs for count in free),
                      "word_docs": sum(count.word_docs for count in guarded)}
    return found


def _row(arm: str, arms: Arms, said: Mapping[str, int], seed: int) -> dict[str, Any]:
    made = arms.measured[arm]
    row: dict[str, Any] = {"n": len(made.gave) or len(made.answers), "D": float(_d(made.answers).mean()),
                           "act_prob": float(made.probs.mean())}
    if len(made.gave):
        rate, expected = mean(made.gave, seed, "act_rate", arm), mean(made.words, seed, "words", arm)
        row |= {f"words_expected{end}": len(made.words) * value
                for end, value in zip(("", "_low", "_high"), expected[:3], strict=True)}
        row |= {"act_rate": rate.value, "act_rate_low": rate.low, "act_rate_high": rate.high, **said}
    if arm in arms.audits:
        hazard, kl = arms.audits[arm].hazard, arms.kl[arm]
        row |= {"hazard_mean": float(hazard.mean()), "hazard_max": float(hazard.max()), "kl_mean": float(kl.mean()),
                "kl_p99": float(np.quantile(kl, 0.99))}
    if arm == "stranger":
        base = arms.audits["L4"].hazard_base
        row |= {"hazard_mean": float(base.mean()), "hazard_max": float(base.max())}
    return row


def examples(arms: Arms, seed: int) -> list[Example]:
    """Stories in which the surgery changed the act, the first ones; others fill up."""
    base, l4 = arms.measured["stranger"], arms.measured["L4"]
    order = sorted(range(len(base.gave)), key=lambda i: (base.gave[i] == l4.gave[i], i))
    return [Example(arms.scenes.base[i].prompt(), derive_seed(seed, "sample", i),
                    {arm: _cut(arms.measured[arm].guarded[i]) for arm in ("stranger", "L4", "L4-before")})
            for i in order[:EXAMPLES]]


def _cut(document: Generated) -> str:
    """What was written, up to the end of its last whole sentence."""
    end = document.text.rfind(".")
    return document.text[: end + 1] if end >= 0 else document.text
