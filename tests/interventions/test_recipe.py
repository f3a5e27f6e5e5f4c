"""Recipes as files: round trip, words, and a clear answer to every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from features.codes import dictionary_digest
from features.contrast import Origin
from features.selection import FeatureSet, Rule, Step
from interventions.operators import Ablate, Add, Cap, Clamp, Floor, Strengthen
from interventions.recipe import FeatureEdit, Recipe, Trigger, check
from sae.dictionary import LinearDictionary, Provenance, TopK
from tests import tiny
from undertow.core.errors import ArtifactError, DictionaryError, SiteError, SpecError, SubjectError
from undertow.subjects import Subject, load_subject

SITE, SAE = "blocks.1.hook_resid_post", "0123456789abcdef"
GOOD: dict[str, Any] = {"name": "r", "subject": "llama", "sae": SAE, "site": SITE,
                        "edits": [{"latent": 3, "operator": {"kind": "strengthen", "gain": 2.0}}]}

numbers = st.floats(-1e30, 1e30, allow_nan=False)
operators = st.one_of(*(st.builds(spec, value=numbers) for spec in (Clamp, Floor, Cap)), st.builds(Ablate),
                      st.builds(Add, amount=numbers), st.builds(Strengthen, gain=numbers))
text = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
recipes = st.builds(
    Recipe, name=text, subject=text, sae=st.just(SAE), site=st.just(SITE), notes=text,
    edits=st.lists(st.builds(FeatureEdit, latent=st.integers(0, 10**6), operator=operators), min_size=1, max_size=4).map(tuple),
    trigger=st.none() | st.builds(Trigger, latents=st.lists(st.integers(0, 99), min_size=1, max_size=3).map(tuple),
                                  above=numbers, when=st.sampled_from(["above", "below"])),
    window=st.sampled_from(["everywhere", "reading", "before_decision", "assistant"]),
    norm_ceiling=st.none() | st.floats(1e-3, 1e6))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(tiny.save_subject(tmp_path_factory.mktemp("tiny") / "llama", "llama")), device="cpu")


def dictionary(hook_name: str = SITE, model: str = "llama", d_in: int = tiny.D_MODEL, seed: int = 0) -> LinearDictionary:
    rows = torch.nn.functional.normalize(torch.randn(48, d_in, generator=torch.Generator().manual_seed(seed)))
    return LinearDictionary(rows.T.contiguous(), torch.zeros(48), rows, torch.zeros(d_in), TopK(4),
                            Provenance(model, hook_name, 32, True))


def fitting(made: LinearDictionary, **changes: Any) -> Recipe:
    return Recipe.checked({**GOOD, "sae": dictionary_digest(made), **changes})


@settings(max_examples=40)
@given(recipe=recipes)
def test_a_recipe_survives_its_file(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("r") / "recipe.yaml"
    recipe.save(path)
    read = Recipe.load(path)
    assert read == recipe and read.digest() == recipe.digest()
    assert recipe.name in recipe.explain()


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    Recipe.checked(GOOD).save(tmp_path / "new" / "r.yaml")
    with pytest.raises(ArtifactError, match="exists"):
        Recipe.checked(GOOD).save(tmp_path / "new" / "r.yaml")


def test_in_words() -> None:
    recipe = Recipe.checked({
        **GOOD, "window": "before_decision", "norm_ceiling": 90.0,
        "trigger": {"latents": [7, 8], "above": 0.5, "when": "below"},
        "edits": [*GOOD["edits"], {"latent": 4, "operator": {"kind": "clamp", "value": 1.25}}]})
    assert recipe.explain() == f"""r: on llama, at {SITE}, with the SAE {SAE}
  feature 3 is multiplied by 2
  feature 4 is set to 1.25
  at the tokens before the decision (the prompt's last token is the first that is left alone), \
where all of the features 7, 8 are at or below 0.5
  never the first token or padding, nor a token whose activation norm is above 90"""
    assert recipe.latents() == [3, 4, 7, 8]
    sham = Recipe.checked({**GOOD, "edits": [{"latent": 3, "operator": {"kind": "strengthen", "gain": 1}}],
                           "trigger": {"latents": [7]}})
    assert "at every token, where feature 7 is above 0\n" in sham.explain()
    assert sham.explain().endswith("it is a sham") and "sham" not in Recipe.checked(GOOD).explain()


@pytest.mark.parametrize(("old", "new", "what", "hint"), [
    ("norm_ceiling: null", "norm_cieling: 3", "norm_cieling = 3", "did you mean norm_ceiling?"),
    ("gain: 2.0", "gian: 2.0", "gian = 2.0", "did you mean gain?"),
    ("kind: strengthen", "kind: strenghten", "strenghten", "did you mean strengthen?"),
    ("kind: strengthen", "kind: rotate", "rotate", "kinds are strengthen, clamp, floor, cap, ablate, add"),
    ("gain: 2.0", "gain: .nan", "gain = nan", ""),
    ("gain: 2.0", "gain: .inf", "gain = inf", ""),
    ("latent: 3", "latent: -3", "latent = -3", ""),
    ("latent: 3", "latent: 3.5", "latent = 3.5", ""),
    (f"sae: {SAE}", "sae: mine", "sae = 'mine'", ""),
    ("window: everywhere", "window: nowhere", "window = 'nowhere'", ""),
    ("trigger: null", "trigger: {latents: []}", "trigger.latents = []", ""),
    ("name: r", "nme: r", "nme = 'r'", "did you mean name?"),
])
def test_mistakes_in_a_file(tmp_path: Path, old: str, new: str, what: str, hint: str) -> None:
    Recipe.checked(GOOD).save(tmp_path / "good.yaml")
    good = (tmp_path / "good.yaml").read_text().replace("'0123456789abcdef'", SAE)
    assert old in good
    (tmp_path / "bad.yaml").write_text(good.replace(old, new))
    with pytest.raises(SpecError) as caught:
        Recipe.load(tmp_path / "bad.yaml")
    assert what in caught.value.what and "bad.yaml" in caught.value.what
    assert hint in caught.value.hint


def test_a_file_that_is_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read .*absent\.yaml"):
        Recipe.load(tmp_path / "absent.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(SpecError, match="holds list"):
        Recipe.load(tmp_path / "list.yaml")
    with pytest.raises(SpecError, match=r"edits = "):
        Recipe.checked({**GOOD, "edits": []})


def test_a_recipe_that_fits_and_those_that_do_not(subject: Subject) -> None:
    made = dictionary()
    assert check(fitting(made), subject, made) == []
    assert check(fitting(made, subject=subject.digest), subject, made) == []
    with pytest.raises(SubjectError, match=r"made for parrot; this is .*\n.*--model"):
        check(fitting(made, subject="parrot"), subject, made)
    with pytest.raises(SiteError, match=r"blocks\.1\.hook_resid_pots.*\n.*did you mean"):
        check(fitting(made, site="blocks.1.hook_resid_pots"), subject, made)
    with pytest.raises(DictionaryError, match=r"trained at blocks\.1\.hook_resid_post, not at blocks\.0"):
        check(fitting(made, site="blocks.0.hook_resid_post"), subject, made)
    with pytest.raises(DictionaryError, match=rf"features of the SAE {dictionary_digest(made)}; this one is"):
        check(fitting(made), subject, dictionary(seed=1))
    with pytest.raises(DictionaryError, match=r"no feature 48: this SAE has 48"):
        check(fitting(made, edits=[{"latent": 48, "operator": {"kind": "ablate"}}]), subject, made)
    with pytest.raises(DictionaryError, match=r"no feature 99"):
        check(fitting(made, trigger={"latents": [99]}), subject, made)
    wide = dictionary(d_in=16)
    with pytest.raises(DictionaryError, match=r"width 16"):
        check(fitting(wide), subject, wide)


def chosen(made: LinearDictionary, latents: tuple[int, ...]) -> FeatureSet:
    steps = tuple(Step(latent, 0.5 * (place + 1)) for place, latent in enumerate(latents))
    return FeatureSet(Origin(dictionary_digest(made), "llama", SITE, "pairs", 2, 2, 0), "care", Rule(), steps, targets={},
                      baselines={}, opposed=(), writer_share=None, evidence={}, facts={})


def test_strengthen() -> None:
    made = dictionary()
    operator = {"kind": "strengthen", "gain": 3}
    by_hand = fitting(made, name="strengthen", edits=[{"latent": latent, "operator": operator} for latent in (5, 2)])
    assert Recipe.strengthen([5, 2], 3.0, made) == by_hand
    assert Recipe.strengthen(chosen(made, (5, 2)), 3.0) == by_hand
    for mistake, what in [(lambda: Recipe.strengthen([5], 3.0), r"\[5\] without an SAE"),
                          (lambda: Recipe.strengthen([], 3.0, made), "edits = "),
                          (lambda: Recipe.strengthen(chosen(made, ()), 3.0), "edits = "),
                          (lambda: Recipe.strengthen([5], float("nan"), made), "gain = nan"),
                          (lambda: Recipe.strengthen([5], 3.0, dictionary(hook_name="")), "does not say which")]:
        with pytest.raises(SpecError, match=what):
            mistake()
