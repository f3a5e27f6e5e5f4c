"""Doses: every operator scales as documented, figures agree with plain ones, no dose is no change, and the best is the best."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.codes import dictionary_digest
from interventions.applying import apply
from interventions.audit import AuditSpec, spellings
from interventions.dosing import (
    Acts,
    Dose,
    Figures,
    Ground,
    Limits,
    before,
    best,
    curve,
    dosed,
    grid,
    hazard,
    on,
    sameness,
    scaled,
    untouched,
)
from interventions.operators import Add, Clamp, Floor, Strengthen
from interventions.recipe import Recipe
from tests.features.planted import LATENT, planted
from undertow.core.errors import EditError, SpecError
from undertow.lexicon.forms import Lexicon, LexiconSpec
from undertow.subjects.scoring import score
from undertow.subjects.splicing import Window
from undertow.subjects.tapping import tap

N_PAIRS, N_TEXTS, HEARD = 4, 10, 8


@pytest.fixture(scope="module")
def ground() -> Ground:
    made = planted()
    places = ("mill", "inn", "hut", "ford", "quay", "barn", "farm", "lock", "moor", "dyke")
    texts = [made.subject.encode(f"At the {place} nobody spoke for a while, and the rain went on.") for place in places]
    lexicon = Lexicon.from_spec(LexiconSpec(name="rain", tiers={"T0": {"en": ["rain"]}}))
    return Ground(made.subject, made.dictionary, made.pairs[:N_PAIRS], texts, HEARD,
                  spellings(made.subject, lexicon, canonical=True), AuditSpec(tolerance=1e-6), 3)


def recipe_of(*edits: tuple[int, dict[str, object]], **fields: object) -> Recipe:
    made = planted()
    return Recipe.checked({"name": "care", "subject": made.subject.digest, "sae": dictionary_digest(made.dictionary),
                           "site": made.site.name, "edits": [{"latent": i, "operator": operator} for i, operator in edits],
                           **fields}, "test")


FLOOR = (LATENT, {"kind": "floor", "value": 1.5})
EVERY = ((3, {"kind": "floor", "value": 2.0}), (4, {"kind": "clamp", "value": -0.5}), (5, {"kind": "add", "amount": 3.0}),
         (6, {"kind": "strengthen", "gain": 1.5}), (6, {"kind": "strengthen", "gain": 0.0}))


def test_every_operator_scales_as_documented() -> None:
    recipe = recipe_of(*EVERY, trigger={"latents": [1], "at_least": 2, "within": 4}, window="before_decision")
    half = scaled(recipe, 0.5, "half")
    assert [edit.operator for edit in half.edits] == [Floor(value=1.0), Clamp(value=-0.25), Add(amount=1.5),
                                                      Strengthen(gain=1.25), Strengthen(gain=0.5)]
    assert [edit.operator for edit in scaled(recipe, 2, "x").edits] == [
        Floor(value=4.0), Clamp(value=-1.0), Add(amount=6.0), Strengthen(gain=2.0), Strengthen(gain=-1.0)]
    assert [edit.operator for edit in scaled(recipe, 0, "x").edits] == [
        Floor(value=0.0), Clamp(value=0.0), Add(amount=0.0), Strengthen(gain=1.0), Strengthen(gain=1.0)]
    assert (half.name, half.trigger, half.window, half.sae) == ("half", recipe.trigger, "before_decision", recipe.sae)
    assert [edit.latent for edit in half.edits] == [3, 4, 5, 6, 6]


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_factor_one_gives_the_recipes_own_figures_to_the_last_bit(value: float, gain: float) -> None:
    recipe = recipe_of((1, {"kind": "floor", "value": value}), (2, {"kind": "strengthen", "gain": gain}))
    assert scaled(recipe, 1.0, recipe.name) == recipe


@pytest.mark.parametrize("operator", [{"kind": "cap", "value": 1.0}, {"kind": "ablate"}])
def test_what_has_no_more_or_less_is_refused(operator: dict[str, object], ground: Ground) -> None:
    recipe = recipe_of(FLOOR, (3, operator))
    with pytest.raises(SpecError, match=f"feature 3 is changed by '{operator['kind']}', which names no value to scale"):
        curve(ground, recipe, [1.0])


def test_what_is_kept_says_where_it_comes_from() -> None:
    recipe = recipe_of(FLOOR, notes="by hand")
    made = dosed(recipe, 0.5)
    assert made.name == "care" and made.notes == f"by hand\n0.5 times the figures of {recipe.digest()}"
    assert made.edits == scaled(recipe, 0.5, "care").edits
    assert dosed(recipe_of(FLOOR), 2.0).notes.startswith("2 times the figures of ")


def test_a_grid_is_ascending_and_each_factor_once() -> None:
    assert grid("1, 0.5,2,0.50, 0") == [0.0, 0.5, 1.0, 2.0]


@pytest.mark.parametrize(("text", "what"), [
    ("", "is empty"), ("  ", "is empty"), ("0.5,", "'' among the doses"), ("0.5,half", "'half' among the doses"),
    ("nan", "the dose nan is not a finite number"), ("1,inf", "the dose inf"), ("-0.5,1", "the dose -0.5"),
])
def test_a_grid_that_is_none_is_refused(text: str, what: str) -> None:
    with pytest.raises(SpecError, match=what):
        grid(text)


def test_figures_agree_with_plain_ones(ground: Ground) -> None:
    """One text, one wording and one token at a time, without batches, packing or the audit's own sums."""
    recipe = recipe_of(FLOOR)
    made, = curve(ground, recipe, [1.0])
    assert made.figures is not None
    kl: list[float] = []
    for ids in ground.texts:
        tokens = torch.tensor([ids])
        with torch.inference_mode():
            base = ground.subject.hf_model(input_ids=tokens).logits[0, 1:].log_softmax(dim=-1)
            with apply(recipe, ground.subject, ground.dictionary):
                arm = ground.subject.hf_model(input_ids=tokens).logits[0, 1:].log_softmax(dim=-1)
        kl += torch.nn.functional.kl_div(arm, base, log_target=True, reduction="none").sum(dim=-1).tolist()
    assert made.figures.kl_mean == pytest.approx(np.mean(kl), abs=1e-7)
    assert made.figures.kl_p99 == pytest.approx(np.quantile(kl, 0.99), abs=1e-6)
    for measured, window in ((made.figures.on, "everywhere"), (made.figures.before, "before_decision")):
        d, acts = plain_acts(ground, recipe, window)
        assert measured == pytest.approx((d, acts), rel=1e-4, abs=1e-6)
    assert made.figures.acts == (made.figures.on.acts + made.figures.before.acts) / 2
    assert made.figures.on.d != pytest.approx(untouched(ground).d, abs=1e-3)


def plain_acts(ground: Ground, recipe: Recipe, window: str) -> tuple[float, float]:
    d, acts = [], []
    for pair in ground.pairs:
        side = pair.negative
        prompt = ground.subject.encode(side.prompt)
        where = Window() if window == "everywhere" else Window(0, len(prompt) - 1)
        masses = {}
        for act, wordings in side.options.items():
            encoded = [ground.subject.tokenizer.encode(wording, add_special_tokens=False) for wording in wordings]
            with apply(recipe, ground.subject, ground.dictionary, where):
                masses[act] = sum(math.exp(value) for value in score(ground.subject, prompt, encoded).tolist())
        d.append(math.log(masses[side.costly] / masses[side.keep]))
        acts.append(masses[side.costly])
    return float(np.mean(d)), float(np.mean(acts))


def test_hazard_is_heard_on_texts_and_prompts_and_a_family_is_one_document(ground: Ground) -> None:
    two = ground._replace(pairs=[ground.pairs[0], ground.pairs[1]._replace(family=ground.pairs[0].family), ground.pairs[2]])
    assert two.audited == [*ground.texts[:HEARD], *(ground.subject.encode(pair.negative.prompt) for pair in two.pairs)]
    assert two.clusters == [*range(HEARD), HEARD, HEARD, HEARD + 1]
    heard = hazard(two, recipe_of(FLOOR))
    figures = curve(two, recipe_of(FLOOR), [1.0])[0].figures
    assert figures is not None
    assert figures.hazard_ratio == pytest.approx(heard.hazard.sum() / heard.hazard_base.sum())
    assert figures.hazard_ratio_upper == heard.hazard_ratio(two.seed, two.clusters).high > figures.hazard_ratio != 1
    assert figures.hazard_ratio_upper != heard.hazard_ratio(two.seed).high  # which takes the two prompts for two documents


@pytest.mark.parametrize("edits", [(FLOOR,), ((LATENT, {"kind": "add", "amount": 3.0}),),
                                   ((3, {"kind": "strengthen", "gain": 1.1}),)])
def test_no_dose_is_no_change_at_all(ground: Ground, edits: tuple[tuple[int, dict[str, object]], ...]) -> None:
    none, some = curve(ground, recipe_of(*edits), [0.0, 1.0])
    base = untouched(ground)
    assert none.figures is not None and some.figures is not None
    assert (none.figures.kl_mean, none.figures.kl_p99, none.figures.hazard_ratio) == (0.0, 0.0, 1.0)
    assert none.figures.hazard_ratio_upper == 1.0 and none.figures.on == none.figures.before == base
    assert some.figures.kl_mean > 0 and some.figures.on != base


def test_a_clamp_at_no_dose_still_silences(ground: Ground) -> None:
    """As documented: latent 3 stands at about 50 here, and f′ = 0 · value takes it away."""
    assert sameness(ground, scaled(recipe_of((3, {"kind": "clamp", "value": 60.0})), 0.0, "x")).mean() > 0


def test_the_curve_rises_with_the_dose_and_reports_its_progress(ground: Ground) -> None:
    seen: list[tuple[int, int]] = []
    doses = curve(ground, recipe_of(FLOOR), [0.0, 1.0, 2.0], lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)] and [dose.factor for dose in doses] == [0.0, 1.0, 2.0]
    kl = [dose.figures.kl_mean for dose in doses if dose.figures is not None]
    assert 0 == kl[0] < kl[1] < kl[2]
    again, measured = curve(ground, recipe_of(FLOOR), [1.0])[0].figures, doses[1].figures
    assert again is not None and measured is not None
    assert measured == again._replace(hazard_slack=measured.hazard_slack)  # whatever was measured before


def test_a_dose_that_is_not_finite_loses_no_other(ground: Ground) -> None:
    """Two additions of 3e38 are infinite together."""
    doses = curve(ground, recipe_of(*[(LATENT, {"kind": "add", "amount": 1.0})] * 2), [3e38, 1.0])
    assert doses[0] == Dose(3e38, None) and doses[1].figures is not None
    assert best(doses, Limits(kl_mean=10, kl_p99=10, hazard_ratio=10)) is doses[1]


@pytest.mark.parametrize("factor", [1e39, 1e308])
def test_a_figure_that_is_no_number_in_single_precision_is_refused(factor: float) -> None:
    with pytest.raises(SpecError, match=f"takes the floor of feature {LATENT} to .* which is no number in single precision"):
        scaled(recipe_of((LATENT, {"kind": "floor", "value": 15.0})), factor, "x")


def test_a_recipe_that_never_fires_has_no_dose(ground: Ground) -> None:
    with pytest.raises(EditError, match="fired at none of"):
        curve(ground, recipe_of(FLOOR, trigger={"latents": [3], "above": 1e9}), [1.0])


def test_too_few_documents_have_no_interval(ground: Ground) -> None:
    with pytest.raises(SpecError, match="a ratio over 5 documents"):
        curve(ground._replace(heard=2, pairs=ground.pairs[:3]), recipe_of(FLOOR), [1.0])


def test_before_the_decision_of_a_recipe_that_acts_in_the_reply_is_the_untouched_subject(ground: Ground) -> None:
    reply = recipe_of(FLOOR, window="assistant")
    assert before(ground, reply) == untouched(ground) != on(ground, reply)
    early = recipe_of(FLOOR, window="before_decision")
    assert before(ground, early) == on(ground, early) == before(ground, recipe_of(FLOOR)) != untouched(ground)


def test_a_gate_that_opens_at_the_decision_alone_does_nothing_before_it(ground: Ground) -> None:
    one = ground._replace(pairs=ground.pairs[:1])
    ids = one.subject.encode(one.pairs[0].negative.prompt)
    x = tap(one.subject, torch.tensor([ids]), planted().site)[0, 1:]
    f = one.dictionary.latent_values(x, torch.arange(one.dictionary.d_sae))
    margin = f[-1] - f[:-1].max(dim=0).values
    latent = int(margin.argmax())
    assert margin[latent] > 0, "no latent is largest at the decision"
    gate = {"latents": [latent], "above": float(f[-1, latent] - margin[latent] / 2)}
    assert before(one, recipe_of(FLOOR, trigger=gate)) == untouched(one) != on(one, recipe_of(FLOOR, trigger=gate))


def figures_of(kl_mean: float, kl_p99: float, upper: float, acts: tuple[float, float]) -> Figures:
    return Figures(kl_mean, kl_p99, 1e-4, upper * 0.9, upper, 0.0, Acts(0.0, acts[0]), Acts(0.0, acts[1]))


SHARE = st.floats(0, 1)
MEASURED = st.builds(figures_of, st.floats(0, 0.03), st.floats(0, 0.3), st.floats(0.5, 2), st.tuples(SHARE, SHARE))


@given(st.lists(st.none() | MEASURED, max_size=8), st.floats(0, 0.03), st.floats(0, 0.3), st.floats(0.5, 2))
def test_the_best_is_that_of_a_brute_force_loop(found: list[Figures | None], kl_mean: float, kl_p99: float,
                                                upper: float) -> None:
    doses = [Dose(float(i), figures) for i, figures in enumerate(found)]
    winner, most = None, -1.0
    for dose in doses:
        one = dose.figures
        if one is not None and one.kl_mean <= kl_mean and one.kl_p99 <= kl_p99 and one.hazard_ratio_upper <= upper:
            value = (one.on.acts + one.before.acts) / 2
            if value > most:
                winner, most = dose, value
    assert best(doses, Limits(kl_mean=kl_mean, kl_p99=kl_p99, hazard_ratio=upper)) is winner


def test_limits_that_nothing_meets_choose_nothing(ground: Ground) -> None:
    doses = curve(ground, recipe_of(FLOOR), [0.5, 1.0])
    assert best(doses, Limits(kl_mean=0, kl_p99=0, hazard_ratio=10)) is None
    assert best([], Limits()) is None
    assert doses[0].figures is not None
    assert doses[0].figures.beyond(Limits(kl_mean=0, kl_p99=10, hazard_ratio=0)) == ["kl_mean", "hazard_ratio_upper"]
    at_it = Limits(kl_mean=doses[0].figures.kl_mean, kl_p99=10, hazard_ratio=10)  # a figure at its limit is within it
    assert best(doses, at_it) is doses[0]


@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_a_limit_is_a_finite_number_of_0_or_more(value: float) -> None:
    with pytest.raises(SpecError, match="kl_p99"):
        Limits.checked({"kl_p99": value}, "test")
