"""`undertow recipe check` and `apply` on a tiny subject and an SAE made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from features.codes import dictionary_digest
from interventions.recipe import Recipe
from sae.dictionary import LinearDictionary, Provenance, TopK
from sae.formats import load, save_folder
from tests import tiny
from tests.cli.answers import Run, runner
from undertow.core.storage import open_artifact

SITE, D_SAE, DEAD = "blocks.1.hook_resid_post", 48, 47


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subject, its SAE `sae`, another one, and recipes: good, sham, silent, misspelt."""
    made = tmp_path_factory.mktemp("recipe_cli")
    tiny.save_subject(made / "llama", "llama")
    for seed, name in enumerate(("sae", "other")):
        rows = torch.nn.functional.normalize(torch.randn(D_SAE, tiny.D_MODEL, generator=torch.Generator().manual_seed(seed)))
        bias = torch.zeros(D_SAE)
        bias[DEAD] = -1e4
        save_folder(LinearDictionary(rows.T.contiguous(), bias, rows, torch.zeros(tiny.D_MODEL), TopK(4),
                                     Provenance(str(made / "llama"), SITE, 32, True)), made / name)
    place = {"subject": "llama", "sae": dictionary_digest(load(made / "sae")), "site": SITE}
    for name, latent, operator in (("good", 3, {"kind": "clamp", "value": 20.0}), ("sham", 3, {"kind": "add", "amount": 0.0}),
                                   ("silent", DEAD, {"kind": "strengthen", "gain": 3.0})):
        Recipe.checked({"name": name, **place, "edits": [{"latent": latent, "operator": operator}]}).save(made / f"{name}.yaml")
    (made / "misspelt.yaml").write_text((made / "good.yaml").read_text().replace("value:", "vlaue:"))
    return made


@pytest.fixture
def recipe(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "recipe")


def test_check_says_it_in_words(recipe: Run, folder: Path) -> None:
    answer = recipe("check", folder / "good.yaml")
    assert answer.code == 0
    assert "feature 3 is set to 20" in answer.out and "well formed (digest" in answer.out
    answer = recipe("check", folder / "good.yaml", "--sae", folder / "sae", "--json")
    assert answer.code == 0
    assert answer.json["digest"] == Recipe.load(folder / "good.yaml").digest()
    assert answer.json["checked_against"] == str(folder / "sae") and answer.json["warnings"] == []


@pytest.mark.parametrize(("words", "what", "hint"), [
    (["check", "{}/misspelt.yaml"], "vlaue = 20.0", "did you mean value?"),
    (["check", "{}/absent.yaml"], "absent.yaml", ""),
    (["check", "{}/good.yaml", "--sae", "{}/other"], "names features of the SAE", "means nothing in another SAE"),
    (["check", "{}/good.yaml", "--model", "hearth"], "--model hearth was given without an SAE", "--sae"),
    (["apply", "{}/good.yaml", "{}/other", "Ana"], "names features of the SAE", "means nothing in another SAE"),
    (["apply", "{}/silent.yaml", "{}/sae", "The keeper"], "fired at none of", "never fires proves nothing"),
    (["apply", "{}/good.yaml", "{}/sae", "Ana", "--temperature", "-1"], "temperature = -1", ""),
])
def test_mistakes(recipe: Run, folder: Path, words: list[str], what: str, hint: str) -> None:
    answer = recipe(*(word.format(folder) for word in words), "--json")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert what in answer.json["error"] and hint in answer.json["hint"]


def test_apply_shows_both_texts_and_writes_them(recipe: Run, folder: Path, tmp_path: Path) -> None:
    words = ["The keeper of the mill", "Ana", "--seed", "3", "--max-new-tokens", "12"]
    answer = recipe("apply", folder / "good.yaml", folder / "sae", *words, "--out", tmp_path / "out", "--json")
    assert answer.code == 0
    result = answer.json
    assert [row["prompt"] for row in result["generations"]] == words[:2]
    assert all(row["plain"] != row["operated"] for row in result["generations"])
    assert 0 < result["firings"] == result["positions"]
    written = open_artifact(tmp_path / "out", "operated-generations")
    assert written.record["spec"]["recipe"] == result["digest"] and written.record["seed"] == 3
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == Recipe.load(folder / "good.yaml")
    again = recipe("apply", folder / "good.yaml", folder / "sae", *words, "--json").json
    assert again["generations"] == result["generations"]
    assert recipe("apply", folder / "good.yaml", folder / "sae", *words, "--out", tmp_path / "out").code == 2


def test_a_sham_changes_no_word(recipe: Run, folder: Path) -> None:
    answer = recipe("apply", folder / "sham.yaml", folder / "sae", "The keeper", "--chat")
    assert answer.code == 0 and "sham fired at" in answer.out
    lines = answer.out.splitlines()
    plain = lines[1].removeprefix("plain").strip()
    assert any(line.startswith("operated") for line in lines) and answer.out.count(plain) == 2
