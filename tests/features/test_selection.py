"""Selection: the planted latent first, joint effects as measured, nothing where there is nothing, and the commands."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from features.causal import joint_effects, patch_effects
from features.concepts import load_concept
from features.contrast import FeatureTable, load_table
from features.finding import Bench, Plan, find, gate, openings
from features.selection import EFFECT, FeatureSet, Rule, Search, candidates, choose, select
from sae.formats import save_folder
from tests import tiny
from tests.features.planted import D_SAE, GIVE, KEEP, LATENT, plant, planted, raises_d, subject
from undertow.cli.main import main
from undertow.core.errors import ArtifactError, DictionaryError, SpecError, TextError

LOOSE = Rule(alpha=1.0, size=5, tried=3, least_gain=0.0)


def search(table: FeatureTable, named: tuple[int, ...] = ()) -> Search:
    effects = patch_effects(planted().baseline, range(D_SAE))
    return Search("mine", table, {i: {EFFECT: float(e)} for i, e in enumerate(effects)}, named, {"gates": {}})


def test_planted_latent_is_chosen_and_nothing_else() -> None:
    made = planted()
    found = select(search(made.table), made.baseline, Rule())
    assert found.latents == (LATENT,)
    assert found.ids == (f"{made.table.origin.sae[:4]}:{LATENT}",)
    assert found.effect == pytest.approx(patch_effects(made.baseline, [LATENT])[0], abs=1e-6)
    assert found.targets == {LATENT: float(made.table.mean_positive[LATENT])}
    assert found.opposed == ()


def test_a_named_latent_is_left_out() -> None:
    made = planted()
    found = select(search(made.table, named=(LATENT,)), made.baseline, Rule())
    assert (found.latents, found.effect, found.writer_share) == ((), 0.0, None)


@pytest.mark.parametrize("method", ["greedy", "pursuit"])
def test_steps_are_joint_effects_and_rise(method: str) -> None:
    baseline = planted().baseline
    rule = LOOSE.model_copy(update={"method": method})
    steps = choose(baseline, list(range(D_SAE)), rule)
    latents = [step.latent for step in steps]
    assert len(set(latents)) == len(latents) <= 5
    expected = baseline.families.mean(joint_effects(baseline, [latents[: n + 1] for n in range(len(latents))]))
    np.testing.assert_allclose([step.effect for step in steps], expected, atol=1e-6)
    assert (np.diff([0.0, *(step.effect for step in steps)]) > 0).all()


def test_greedy_first_step_is_the_best_single_one_where_all_are_tried() -> None:
    baseline = planted().baseline
    effects = patch_effects(baseline, range(D_SAE))
    (step,) = choose(baseline, list(range(D_SAE)), LOOSE.model_copy(update={"tried": D_SAE, "size": 1}))
    assert step.latent == np.argmax(effects)
    assert choose(baseline, [], LOOSE) == ()
    assert choose(baseline, [int(np.argmin(effects))], LOOSE) == ()


def test_candidates() -> None:
    table = planted().table
    moved = dataclasses.replace(table, p=np.array([0.001, 0.001, 0.001, 0.5, *[1.0] * (D_SAE - 4)]),
                                effect=np.array([1.0, -1.0, 2.0, 1.0, *[0.0] * (D_SAE - 4)], dtype=np.float32))
    effects = {0: 0.3, 1: 0.6, 2: -0.1, 3: 0.9}
    assert candidates(moved, Rule(), effects) == [1, 0]
    assert candidates(moved, Rule(sign="raised"), effects) == [0]
    assert candidates(moved, Rule(), effects, left_out={1}) == [0]
    assert candidates(moved, Rule(pool=1), effects) == [1]
    assert candidates(moved, Rule(alpha=0.6), effects) == [3, 1, 0]


def test_round_trip(tmp_path: Path) -> None:
    made = planted()
    found = select(search(made.table), made.baseline, LOOSE)
    found.save(tmp_path / "set", {"sae": "here"})
    assert FeatureSet.load(tmp_path / "set") == found
    with pytest.raises(ArtifactError, match="exists and is not empty"):
        found.save(tmp_path / "set")
    (tmp_path / "set" / "features.json").write_text("{}")
    with pytest.raises(ArtifactError, match="has changed"):
        FeatureSet.load(tmp_path / "set")


def test_refusals() -> None:
    made = planted()
    with pytest.raises(SpecError, match="alhpa"):
        Rule.checked({"alhpa": 0.1})
    columns = [getattr(made.table, field.name)[:3] for field in dataclasses.fields(made.table)[1:]]
    short = FeatureTable(made.table.origin, *columns)
    with pytest.raises(DictionaryError, match="a table of 3 latents"):
        select(search(made.table)._replace(table=short), made.baseline, Rule())


def test_openings_end_in_different_places() -> None:
    cut = openings(planted().pairs, 4)
    assert len({len(text.split()) for text in cut}) == 4
    assert all(pair.negative.prompt.startswith(text) for pair, text in zip(planted().pairs, cut, strict=False))


def test_search_on_a_random_model_with_word_free_pairs_chooses_nothing() -> None:
    made = planted()
    found = find(Bench(made.subject, made.dictionary, made.site), load_concept("care", 5),
                 Plan(discovery=12, ranked=3, development=2))
    assert found.latents == ()
    assert found.facts["significant"] == 0
    assert found.facts["screened"] is False
    assert found.facts["gates"]["bag_of_words"]["accuracy"] == 0.5


PLACES = [f"{a} {b}" for a in ("low", "high", "old", "far", "near") for b in ("mill", "inn", "ferry", "quay")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A written concept whose pairs differ in one word, and an SAE with a latent along that difference."""
    made = tmp_path_factory.mktemp("selection")
    site = subject().site("blocks.0.hook_resid_post")

    def write(costly: str, keep: str) -> None:
        families = [{"name": place, "costly": costly, "keep": keep, "options": {"give": list(GIVE), "keep": list(KEEP)},
                     "pairs": [{side: f"At the {place} it was {word} all night. The keeper"
                                for side, word in (("positive", "warm"), ("negative", "cold"))}]} for place in PLACES]
        value = {"name": "mine", "source": {"kind": "written", "families": families}}
        (made / "mine.yaml").write_text(yaml.safe_dump(value), encoding="utf-8")

    write("give", "keep")
    if not raises_d(site, load_concept(made / "mine.yaml").pairs("discovery", 10)):
        write("keep", "give")
    save_folder(plant(site, load_concept(made / "mine.yaml").pairs("discovery", 10)), made / "sae")
    tiny.save_text(made / "text.jsonl")
    return made


def test_a_lexical_concept_is_stopped_and_a_forced_one_says_so(folder: Path) -> None:
    made, concept = planted(), load_concept(folder / "mine.yaml")
    pairs = concept.pairs("discovery", 10)
    bench = Bench(made.subject, made.dictionary, made.site)
    with pytest.raises(TextError, match="the pairs are lexical"):
        gate(bench, concept, pairs, force=False)
    assert "the pairs are lexical" in gate(bench, concept, pairs, force=True).to_json()["forced"]
    said = load_concept("care-said")
    with pytest.raises(TextError, match="prompts already say the word"):
        gate(bench, said, said.pairs("discovery", 10), force=False)


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
        ) -> Callable[..., tuple[int, Any, str]]:
    monkeypatch.setenv("UNDERTOW_CACHE", str(folder / "cache"))

    def call(command: str, *words: str) -> tuple[int, Any, str]:
        code = main(["features", command, str(folder / "sae"), "--concept", str(folder / "mine.yaml"), *words])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if "--json" in words else out, err

    return call


def test_commands(folder: Path, run: Any) -> None:
    code, found, err = run("scan", "--pairs", "10", "--force", "--json", "--out", str(folder / "table"))
    assert code == 0, err
    assert found["features"][0]["latent"] == LATENT
    assert "lexical" in found["gates"]["forced"]
    assert load_table(folder / "table").significant()[0] == LATENT
    code, found, err = run("rank", "--pairs", "10", "--ranked", "4", "--force", "--json")
    assert code == 0, err
    assert found["features"][0]["latent"] == LATENT
    assert found["cosine"] > 0.9
    words = ("select", "--pairs", "10", "--ranked", "4", "--development", "4", "--matches", "12", "--tokens", "300", "--text",
             str(folder / "text.jsonl"), "--force")
    code, found, err = run(*words, "--out", str(folder / "set"), "--json")
    assert code == 0, err
    assert found["screened"] is True
    chosen = FeatureSet.load(folder / "set")
    assert list(chosen.latents) == [row["latent"] for row in found["features"]]
    assert LATENT in chosen.evidence
    assert {"logit_p", "contexts_p", "output_p"} <= set(chosen.evidence[LATENT])
    code, text, err = run(*words)
    assert code == 0, err
    assert "gates" in text


@pytest.mark.parametrize(("words", "message"), [
    (("scan", "--pairs", "10"), "the pairs are lexical"),
    (("select", "--method", "gredy", "--force"), "gredy"),
    (("scan", "--pairs", "1"), "--pairs"),
])
def test_commands_refuse(run: Any, words: tuple[str, ...], message: str) -> None:
    code, out, err = run(*words)
    assert code == 2
    assert message in err
    assert "Traceback" not in out + err
