"""`undertow recipe tune` on a tiny subject that knows the Keeper's words, and an SAE made by hand."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from features.codes import dictionary_digest
from features.concepts import load_concept
from interventions.applying import apply
from interventions.dosing import Limits
from interventions.recipe import Recipe
from interventions.tune import mean_d, question
from interventions.verdict import MAX_HAZARD_RATIO, MAX_KL_MEAN, MAX_KL_P99
from sae.dictionary import LinearDictionary, Provenance, ReLU
from sae.formats import load, save_folder
from tests import tiny, tiny_keeper
from tests.cli.answers import Run, runner
from undertow.cli.tuning import tune_recipe
from undertow.core.seeds import derive_seed
from undertow.lexicon import Lexicon
from undertow.studies.scenes import QUIET, body
from undertow.subjects.keeper.world import load_world
from undertow.subjects.load import load_subject
from undertow.subjects.organisms.measuring import ask

SITE, D_SAE, D_MODEL = "blocks.0.hook_resid_post", 24, 16
SMALL = ["--texts", "8", "--hazard-texts", "8", "--context", "16", "--development", "3", "--canonical",
         "--tolerance", "0.01", "--concept", "{}/mini.yaml"]
GOOD = ["{}/good.yaml", "{}/sae"]
LOOSE = ["--limit-kl-mean", "100", "--limit-kl-p99", "100", "--limit-hazard", "100"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subject, its SAE `sae`, another one, recipes (good, silent, capped), and a concept of one word."""
    made = tmp_path_factory.mktemp("tune_cli")
    (made / "words.yaml").write_text("name: oil\ntiers: {T0: {en: [oil]}}\n")
    (made / "mini.yaml").write_text("name: mini\nlexicon: words.yaml\nsource: {kind: keeper, contrast: role_swapped}\n")
    tiny_keeper.save_random(made / "subject")
    tiny.save_text(made / "stories.jsonl")
    for seed, name in enumerate(("sae", "other")):
        rows = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=torch.Generator().manual_seed(seed)))
        save_folder(LinearDictionary(rows.T.contiguous(), torch.zeros(D_SAE), rows, torch.zeros(D_MODEL), ReLU(),
                                     Provenance(str(made / "subject"), SITE, 32, True)), made / name)
    place = {"subject": load_subject(str(made / "subject"), "cpu").digest, "sae": dictionary_digest(load(made / "sae")),
             "site": SITE}
    floors = [{"latent": latent, "operator": {"kind": "floor", "value": value}} for latent, value in ((3, 1.0), (5, 0.5))]
    capped = [*floors, {"latent": 7, "operator": {"kind": "cap", "value": 1.0}}]
    for name, fields in (("good", {"edits": floors}), ("capped", {"edits": capped}),
                         ("silent", {"edits": floors, "trigger": {"latents": [1], "above": 1e6}})):
        Recipe.checked({"name": name, **place, **fields}, name).save(made / f"{name}.yaml")
    return made


@pytest.fixture
def tune(capsys: pytest.CaptureFixture[str], folder: Path) -> Run:
    """Runs the command; "{}" in its words is the folder."""
    run = runner(capsys, "recipe", "tune")
    return lambda *words: run(*(str(word).format(folder) for word in words))


def test_the_curve_the_choice_and_the_recipe_that_is_written(tune: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "tuned.yaml"
    answer = tune(*GOOD, *SMALL, *LOOSE, "--doses", "2,0,1,1", "--tolerance", "1e-4", "--out", out,
                  "--json")
    assert answer.code == 0
    result = answer.json
    rows: list[dict[str, Any]] = result["doses"]
    assert [row["factor"] for row in rows] == [0, 1, 2]
    none = rows[0]
    assert (none["kl_mean"], none["kl_p99"], none["hazard_ratio"], none["hazard_ratio_upper"]) == (0, 0, 1, 1)
    assert (none["D"], none["D_before"], none["acts"]) == (*[result["untouched"]["D"]] * 2, result["untouched"]["acts"])
    assert 0 < rows[1]["kl_mean"] < rows[2]["kl_mean"] and all(row["within"] and row["beyond"] == [] for row in rows)
    assert rows[2]["hazard_ratio"] not in (0, 1) and rows[2]["hazard_slack"] < rows[2]["hazard_mean"]
    most = max(rows, key=lambda row: row["acts_on"] + row["acts_before"])
    assert result["chosen"] == most["factor"] and result["path"] == str(out)
    before, after = Recipe.load(folder / "good.yaml"), Recipe.load(out)
    assert [edit.operator.value for edit in after.edits] == [  # pyright: ignore[reportAttributeAccessIssue]
        most["factor"] * edit.operator.value for edit in before.edits]  # pyright: ignore[reportAttributeAccessIssue]
    assert before.digest() == result["digest"] and result["digest"] in after.notes
    assert (after.name, after.sae, after.site) == (before.name, before.sae, before.site)
    assert "good at 3 doses" in answer.err and "this takes about" in answer.err and "2 of 3" not in answer.out


def test_figures_are_those_of_the_development_pairs_and_of_neutral_text(tune: Run, folder: Path) -> None:
    result = tune(*GOOD, *SMALL, "--doses", "1", "--seed", "4", "--json").json
    subject, dictionary = load_subject(str(folder / "subject"), "cpu"), load(folder / "sae")
    questions = [question(subject, pair.negative) for pair in load_concept(folder / "mini.yaml", 4).pairs("development", 3)]
    assert result["untouched"]["D"] == pytest.approx(mean_d(ask(subject, questions), "give", "keep"))
    with apply(Recipe.load(folder / "good.yaml"), subject, dictionary):
        assert result["doses"][0]["D"] == pytest.approx(mean_d(ask(subject, questions), "give", "keep"))
    told = [body(load_world().story(derive_seed(4, "recipe tune"), i, QUIET)) for i in range(8)]
    assert result["tokens"] == sum(len(subject.encode(text)[:16]) for text in told)
    assert not any(Lexicon.load("love").find(text) for text in told)
    assert (result["texts"], result["audited"], result["development"]) == (8, 11, 3)


def test_the_table_says_which_dose_is_the_best(tune: Run, folder: Path) -> None:
    answer = tune(*GOOD, *SMALL, "--doses", "0,1,4", "--text", folder / "stories.jsonl",
                  "--limit-kl-mean", "0", "--limit-kl-p99", "0")
    assert answer.code == 0
    rows = {line.split()[0]: line.split() for line in answer.out.splitlines() if line[:4].strip() in ("none", "0", "1", "4")}
    assert rows["0"][-1] == "best" and rows["1"][-1] == rows["4"][-1] == "no"
    assert rows["0"][1:3] == ["0", "0"] and rows["4"][1].endswith("!") and rows["4"][2].endswith("!")
    assert "the best dose within the limits (KL mean 0, p99 0, hazard ratio 1.25 (upper bound)) is 0:" in answer.out
    assert "the hazard ratio says little; a smaller --tolerance" in answer.out  # 0.01 is more than a random model gives a word
    assert "no more than the untouched subject" in answer.out and "wrote" not in answer.out


def test_limits_that_no_dose_meets_write_nothing(tune: Run, folder: Path, tmp_path: Path) -> None:
    words = [*GOOD, *SMALL, "--doses", "1,2", "--limit-kl-mean", "0", "--out",
             tmp_path / "deep" / "tuned.yaml"]
    answer = tune(*words, "--json")
    assert answer.code == 0 and "no dose is within the limits (KL mean 0, p99 0.1" in answer.err
    assert "chosen" not in answer.json and "path" not in answer.json and "null" not in answer.out
    assert all(not row["within"] and "kl_mean" in row["beyond"] for row in answer.json["doses"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("words", "what", "hint"), [
    (["{}/absent.yaml", "{}/sae"], "absent.yaml", ""),
    (["{}/good.yaml", "{}/other"], "names features of the SAE", "means nothing in another SAE"),
    (["{}/capped.yaml", "{}/sae"], "feature 7 is changed by 'cap', which names no value", "floors, clamps, additions"),
    (["{}/silent.yaml", "{}/sae", *SMALL], "fired at none of", "choose another --text or --concept"),
    ([*GOOD, "--concept", "caer"], "no concept is called 'caer'", "did you mean care"),
    ([*GOOD, "--doses", ""], "the list of doses is empty", "0.5,1,1.5"),
    ([*GOOD, "--doses", "1,-0.5"], "the dose -0.5 is not a finite number", ""),
    ([*GOOD, "--doses", "nan"], "the dose nan", ""),
    ([*GOOD, "--doses", "1,inf"], "the dose inf", ""),
    ([*GOOD, "--doses", "1;2"], "'1;2' among the doses", "commas"),
    ([*GOOD, "--doses", "1e300"], "takes the floor of feature 3 to 1e+300", "smaller --doses"),
    ([*GOOD, "--limit-kl-mean", "-1"], "kl_mean = -1.0", ""),
    ([*GOOD, "--limit-hazard", "nan"], "hazard_ratio = nan", ""),
    ([*GOOD, "--tolerance", "2"], "tolerance = 2", ""),
    ([*GOOD, "--language", "en", "--language", "xx"], "no form in tiers", "its languages"),
    ([*GOOD, "--texts", "7"], "--texts 7 is too few", "--texts 64"),
    ([*GOOD, "--text", "keeper:3"], "keeper:3 has 3 documents", ""),
    ([*GOOD, "--text", "keeper:few"], "'few' is not a number of stories", "keeper"),
    ([*GOOD, "--hazard-texts", "3"], "--hazard-texts", "undertow recipe tune --help"),
    ([*GOOD, "--development", "0"], "--development", "undertow recipe tune --help"),
])
def test_mistakes(tune: Run, folder: Path, tmp_path: Path, words: list[str], what: str, hint: str) -> None:
    answer = tune(*words, "--out", tmp_path / "tuned.yaml", "--json")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert what in answer.json["error"] and hint in answer.json["hint"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["file", "empty folder", "below a file", "dangling link"])
def test_what_stands_at_out_is_refused_first_and_stays(tune: Run, folder: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "tuned.yaml"
    match kind:
        case "empty folder":
            out.mkdir()
        case "dangling link":
            out.symlink_to(tmp_path / "nowhere")
        case _:
            out.write_text("kept")
    target = out / "tuned.yaml" if kind == "below a file" else out
    answer = tune(folder / "absent.yaml", folder / "sae", "--out", target, "--json")  # refused before the recipe is read
    assert answer.code == 2 and str(out) in answer.json["error"] and "choose another --out" in answer.json["hint"]
    assert list(tmp_path.iterdir()) == [out] and (not out.is_file() or out.read_text() == "kept")


def test_a_concept_of_ones_own(tune: Run, folder: Path, tmp_path: Path) -> None:
    """Two families for development; their acts and words are those of the file."""
    families = [{"name": place, "costly": "lend", "keep": "lock", "options": {"lend": [" lent it."], "lock": [" locked it."]},
                 "pairs": [{"positive": f"At the {place} Ana helped. The keeper", "negative": f"At the {place}. The keeper"}]}
                for place in ("mill", "inn", "hut", "ford", "quay", "barn", "farm", "lock")]
    (tmp_path / "words.yaml").write_text("name: boats\ntiers: {T0: {en: [boat]}}\n")
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({"name": "own", "lexicon": "words.yaml", "source": {
        "kind": "written", "families": families}}))
    answer = tune(*GOOD, *SMALL, "--concept", tmp_path / "own.yaml", "--doses", "1", "--json")
    assert answer.code == 0
    result = answer.json
    assert (result["concept"], result["lexicon"], result["development"], result["audited"]) == ("own", "boats", 2, 10)
    subject = load_subject(str(folder / "subject"), "cpu")
    asked = [question(subject, pair.negative) for pair in load_concept(tmp_path / "own.yaml").pairs("development", 9)]
    assert result["untouched"]["D"] == pytest.approx(mean_d(ask(subject, asked), "lend", "lock"))


def test_limits_are_those_of_the_verdict_unless_others_are_named() -> None:
    preset = {name: option.default for name, option in inspect.signature(tune_recipe).parameters.items()}
    limits = [preset[f"limit_{name}"] for name in ("kl_mean", "kl_p99", "hazard")]
    assert limits == [MAX_KL_MEAN, MAX_KL_P99, MAX_HAZARD_RATIO] == list(json.loads(Limits().model_dump_json()).values())


def test_help_says_what_it_is(tune: Run) -> None:
    answer = tune("--help")
    assert answer.code == 0
    for word in ("RECIPE", "SAE", "--doses", "--out", "--limit-hazard", "development", "P(costly act)"):
        assert word in answer.out
