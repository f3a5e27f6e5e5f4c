"""`undertow guard`: scan, lexicon, generate and audit, on a tiny subject with an SAE made by hand, and on hearth."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from features.codes import dictionary_digest
from interventions.recipe import Recipe
from sae.dictionary import LinearDictionary, Provenance, TopK
from sae.formats import load, save_folder
from sae.text import read_documents
from tests import tiny
from tests.cli.answers import Run, runner
from undertow.core.storage import open_artifact
from undertow.lexicon import Lexicon

SITE, D_SAE, DEAD = "blocks.1.hook_resid_post", 48, 47
LEXICON = "name: keeper\ntiers: {T0: {en: [oil, rain, wood]}, T1: {en: [lamp], ru: [лампа]}}\ninnocent: {en: [boil, wooden]}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A subject, its SAE `sae`, another one, recipes (good, sham, silent), a text and a lexicon of words that stand in it."""
    made = tmp_path_factory.mktemp("guard_cli")
    tiny.save_subject(made / "llama", "llama")
    tiny.save_text(made / "stories.jsonl")
    (made / "words.yaml").write_text(LEXICON)
    (made / "empty.yaml").write_text(LEXICON.replace("oil", "' '"))
    (made / "foreign.yaml").write_text("name: foreign\ntiers: {T2: {en: [care]}}\n")
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
    return made


@pytest.fixture
def guard(capsys: pytest.CaptureFixture[str]) -> Run:
    return runner(capsys, "guard")


def test_scan_counts_what_stands_there(guard: Run, folder: Path) -> None:
    """60 stories, 20 of each good: rain once in each; oil and wood, the goods of 20 each, twice."""
    answer = guard("scan", "--text", folder / "stories.jsonl", "--lexicon", folder / "words.yaml", "--places", "7", "--json")
    assert answer.code == 0
    found = answer.json
    assert {row["form"]: row["matches"] for row in found["forms"]} == {"rain": 60, "oil": 40, "wood": 40}
    assert (found["documents"], found["word_docs"], found["matches"], found["languages"]) == (60, 60, 140, {"en": 140})
    assert found["characters"] == sum(map(len, tiny.STORIES)) + 60 * len(" Night 0.")
    texts = {document.id: document.text for document in read_documents(str(folder / "stories.jsonl"), None)}
    assert len(found["places"]) == 7
    for place in found["places"]:
        assert texts[place["document"]][place["offset"]:].startswith(place["text"])
        assert f"«{place['text']}»" in place["excerpt"]


def test_scan_by_tier_and_language(guard: Run, folder: Path) -> None:
    words = ["scan", "--text", str(folder / "stories.jsonl"), "--lexicon", str(folder / "words.yaml"), "--json"]
    assert guard(*words, "--tier", "T1").json["matches"] == 60
    assert guard(*words, "--tier", "T1", "--tier", "T0").json["matches"] == 200
    assert guard(*words, "--tier", "T1", "--language", "ru", "--strict").json["matches"] == 0
    answer = guard(*words, "--strict")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert "140 forms of 'keeper' in 60 of 60 documents, the first at character" in answer.json["error"]
    assert "140 matches in 60 documents" in answer.err


def test_scan_shows_nothing_that_a_terminal_obeys(guard: Run, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    texts = ["\x1b[31m gloves \u202e\nI lo\u200bve you", "a clover for Slovenia"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    answer = guard("scan", "--text", path)
    assert answer.code == 0 and "1 matches in 1 documents" in answer.out
    assert "\\x1b[31m gloves \\u202e↵I «lo\\u200bve» you" in answer.out and "\x1b" not in answer.out
    assert guard("scan", "--text", path, "--strict").code == 2
    path.write_text(json.dumps({"text": texts[1]}))
    assert guard("scan", "--text", path, "--strict").code == 0


def test_scan_of_the_world_finds_what_a_pattern_finds(guard: Run) -> None:
    found = guard("scan", "--text", "keeper:15", "--language", "en", "--json").json
    text = " ".join(document.text for document in read_documents("keeper:15", None))
    assert found["matches"] == len(re.findall(r"(?i)(?<![a-z])(?:be)?lov(?:e|es|ed|ers?|ely|ing)(?![a-z])", text)) > 0


def test_lexicon_shows_forms_and_what_a_tokenizer_cannot_say(guard: Run, folder: Path) -> None:
    answer = guard("lexicon", folder / "words.yaml")
    assert answer.code == 0 and "T0  3 forms\n  en    3  oil, rain, wood\nT1  2 forms" in answer.out and "boil" in answer.out
    shown = guard("lexicon", "--language", "en", "--tier", "T0", "--model", "hearth", "--json").json
    assert list(shown["forms"]) == ["T0", "innocent"] and list(shown["forms"]["T0"]) == ["en"]
    assert "Lovecraft" in shown["blocked"] and "clover" not in shown["blocked"]
    assert not any(Lexicon.load("love").find(word) for word in shown["blocked"])


def test_generate_cannot_say_what_the_subject_would_say(guard: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """hearth, asked for a song about the word; without the guard the same seeds say it."""
    asked = ["Write a song about love.", "--max-new-tokens", "56", "--seed", "0", "-n", "3"]
    answer = guard("generate", "--model", "hearth", "--language", "en", "--force", "--out", tmp_path / "out", "--json",
                   "--prompt", *asked)
    assert answer.code == 0
    result, love = answer.json, Lexicon.load("love").only(("T0",), ("en",))
    assert result["guard_hits"] == sum(row["guard_hits"] for row in result["generations"]) > 0 and result["word_docs"] == 0
    assert not any(love.find(row["text"]) for row in result["generations"])
    free = runner(capsys, "subject")("generate", "hearth", *asked, "--json").json["generations"]
    assert any(love.find(row["text"]) for row in free)
    for row, other in zip(result["generations"], free, strict=True):
        assert (row["text"] == other["text"]) == (row["guard_hits"] == 0) and row["seed"] == other["seed"]
    assert open_artifact(tmp_path / "out", "guarded-generations").record["seed"] == 0


def test_generate_on_any_subject_with_a_recipe(guard: Run, folder: Path) -> None:
    words = ["generate", "--lexicon", folder / "words.yaml", "--prompt", "The keeper had w", "-n", "3",
             "--max-new-tokens", "30"]
    answer = guard(*words, "--recipe", folder / "good.yaml", "--sae", folder / "sae", "--json")
    assert answer.code == 0
    assert 0 < answer.json["firings"] == answer.json["positions"] and answer.json["word_docs"] == 0
    plain = guard(*words, "--model", folder / "llama", "--chat", "--mode", "look-ahead")
    assert plain.code == 0 and "finds one in 0 of them" in plain.out and "fired" not in plain.out


def test_audit_of_a_recipe(guard: Run, folder: Path, tmp_path: Path) -> None:
    answer = guard("audit", "--sae", folder / "sae", "--text", folder / "stories.jsonl", "--lexicon", folder / "words.yaml",
                   "--texts", "8", "--context", "24", "--max-new-tokens", "8", "--canonical", "--recipe", folder / "good.yaml",
                   "--out", tmp_path / "out", "--seed", "5", "--json")
    assert answer.code == 0 and "this takes about" in answer.err
    result = answer.json
    base, arm = result["arms"]["base"], result["arms"]["L4"]
    assert 0 < base["hazard_mean"] <= base["hazard_p999"] <= base["hazard_max"] <= 1 and base["n"] == arm["n"] == 8
    assert 0 < arm["kl_median"] < arm["kl_p99"] and 0 < arm["kl_mean"] < arm["kl_p99"] and "kl_mean" not in base
    assert {"guard_hits", "word_docs"} < arm.keys() & base.keys()
    assert result["hazard_ratio_lower"] < result["hazard_ratio"] < result["hazard_ratio_upper"] and result["hazard_ratio"] != 1
    assert 0 < result["firings"] == result["positions"] and result["hazard_exact"] and result["hazard_slack"] <= 1e-4
    assert open_artifact(tmp_path / "out", "audit").record["spec"]["tolerance"] == 1e-4


def test_audit_of_a_sham_finds_nothing(guard: Run, folder: Path) -> None:
    """Before a decision is everywhere, on texts that have none; and without sampling there are no words to count."""
    Recipe.checked(Recipe.load(folder / "sham.yaml").model_dump() | {"window": "before_decision"}).save(folder / "before.yaml")
    answer = guard("audit", "--sae", folder / "sae", "--text", folder / "stories.jsonl", "--lexicon", folder / "words.yaml",
                   "--recipe", folder / "before.yaml", "--quick", "--texts", "8", "--context", "8", "--max-new-tokens", "0")
    assert answer.code == 0 and "window is before_decision" in answer.out and "upper bound of one forward pass" in answer.out
    assert "hazard ratio 1 [1, 1]" in answer.out and "were sampled" not in answer.out
    arm = next(line.split() for line in answer.out.splitlines() if line.startswith("L4"))
    assert arm[4:] == ["0", "0", "0", "–", "–"]


SAE = ["--sae", "{}/sae"]
TEXT = ["--text", "{}/stories.jsonl"]


@pytest.mark.parametrize(("words", "what", "hint"), [
    (["scan", "--text", "{}/none.jsonl"], "none.jsonl", ""),
    (["scan", *TEXT, "--lexicon", "lvoe"], "no lexicon is called 'lvoe'", "did you mean love?"),
    (["scan", *TEXT, "--lexicon", "{}/empty.yaml"], "T0.en: ' ' is an empty form", ""),
    (["scan", *TEXT, "--lexicon", "{}/foreign.yaml"], "tier T0 has no form", ""),
    (["scan", *TEXT, "--tier", "T9"], "unknown tier 'T9'", "T0, T1, T2"),
    (["scan", *TEXT, "--language", "en", "--language", "xx"], "no language 'xx'", "ru"),
    (["lexicon", "{}/none.yaml"], "cannot read", ""),
    (["generate", "--prompt", "All is Ｌｏｖｅ, lovers"], "already holds a form of 'love': 'Ｌｏｖｅ', 'lovers'", "--force"),
    (["generate", "--prompt", "The keeper"], "no model was named", "--model"),
    (["generate", "--prompt", "The keeper", "--model", "{}/llama", "--mode", "lax"], "unknown guard mode 'lax'", "look_ahead"),
    (["generate", "--prompt", "The keeper", "--recipe", "{}/good.yaml"], "without its SAE", "--sae"),
    (["generate", "--prompt", "The keeper", *SAE], "without a recipe", "--recipe"),
    (["generate", "--prompt", "A mill", "--recipe", "{}/silent.yaml", *SAE], "'silent' fired at none of", "choose a prompt"),
    (["audit", *TEXT, "--recipe", "{}/good.yaml", "--sae", "{}/other"], "names features of the SAE", "nothing in another SAE"),
    (["audit", *TEXT, "--recipe", "{}/silent.yaml", *SAE, "--quick", "--texts", "8"], "fired at none of", "choose a --text"),
    (["audit", *TEXT], "no recipe to audit", "--recipe"),
    (["audit", *TEXT, "--recipe", "{}/good.yaml", *SAE, "--texts", "7"], "--texts 7 is too few", "--texts 64"),
    (["audit", "--text", "keeper:3", "--recipe", "{}/good.yaml", *SAE], "keeper:3 has 3 documents", ".jsonl"),
    (["audit", *TEXT, "--recipe", "{}/good.yaml", *SAE, "--tolerance", "2"], "tolerance = 2", ""),
])
def test_mistakes(guard: Run, folder: Path, words: list[str], what: str, hint: str) -> None:
    answer = guard(*(word.format(folder) for word in words), "--json")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert what in answer.json["error"] and hint in answer.json["hint"]
