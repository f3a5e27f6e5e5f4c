"""The demo on the packaged organisms: hearth is moved without the word, parrot answers only to the word, noise cannot answer.

The SAE is smaller and the stories are fewer than the command takes. What runs all arms is marked slow.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from features.carried import Levels
from features.concepts import load_concept
from features.contrast import Families, sign_flip_max
from interventions.tune import Trial, answers, mean_d, question
from interventions.verdict import Evidence, verdict
from sae.formats import load
from tests import tiny, tiny_keeper
from tests.cli.answers import runner
from undertow.cli.main import main
from undertow.core.errors import SpecError, TextError
from undertow.core.seeds import generator
from undertow.studies.arms import Arms, evidence, run_arms
from undertow.studies.demo import ACTS, DemoSpec, Found, PairSide, Setting, contrast_of, find, random_sets, rehearsed
from undertow.studies.running import curve, gates_of, summary_of, write
from undertow.studies.scenes import scenes
from undertow.subjects.keeper.world import load_world
from undertow.subjects.load import load_subject
from undertow.subjects.organisms.measuring import act_question, ask
from undertow.subjects.organisms.statistics import sign_flip_p
from undertow.subjects.subject import Subject

SMALL = DemoSpec(seed=5, stories=20, scored=20, discovery=16, development=12, texts=10)
SITE = "blocks.1.hook_resid_post"
WRITTEN = {"name": "mine", "source": {"kind": "written", "families": [
    {"name": name, "costly": "give", "keep": "keep", "options": {"give": [" gave it."], "keep": [" kept it."]},
     "pairs": [{"positive": f"A warm {name}. He", "negative": f"A cold {name}. He"}]} for name in "abcdefgh"]}}


@pytest.fixture(scope="module")
def hearth() -> Subject:
    return load_subject("hearth", "cpu")


@pytest.fixture(scope="module")
def setting(hearth: Subject, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    out = tmp_path_factory.mktemp("sae") / "sae"
    assert main(["sae", "train", "--model", "hearth", "--site", SITE, "--text", "keeper:300", "--tokens", "60000", "--width",
                 "1024", "--k", "16", "--batch-size", "512", "--out", str(out)]) == 0
    return Setting(hearth, load(out), load_concept("care", SMALL.seed), load_world(), SMALL, lambda phase, done, total: None)


@pytest.fixture(scope="module")
def found(setting: Setting) -> Found:
    return find(setting, SITE)


@pytest.fixture(scope="module")
def arms(setting: Setting, found: Found) -> Arms:
    return run_arms(setting, found.bench, found.trials[-1])


@pytest.fixture(scope="module")
def judged(setting: Setting, arms: Arms) -> tuple[Evidence, dict[str, object]]:
    return evidence(setting, arms, {"met": True})


def test_hearth_passes_the_gates_and_parrot_does_not(hearth: Subject) -> None:
    figures, outcome = gates_of(hearth, load_concept("care", 5), SMALL, SITE)
    assert outcome is None
    assert figures["competence"]["p"] < 0.01
    assert figures["competence"]["low"] > 1.0
    parrot = load_subject("parrot", "cpu")
    figures, outcome = gates_of(parrot, load_concept("care", 5), SMALL, SITE)
    assert outcome is not None
    assert (outcome.verdict.verdict, outcome.verdict.row, outcome.recipe) == ("inconclusive", 1, None)
    assert not figures["competence"]["met"]
    assert figures["competence"]["act_prob_change"] < 0.1
    assert "p < 0.01 and a rise of 0.1 are asked for" in outcome.verdict.reason


def test_word_pairs_are_refused_unless_forced_and_move_parrot() -> None:
    parrot, said = load_subject("parrot", "cpu"), load_concept("care-said", 5)
    with pytest.raises(TextError, match="lexical"):
        gates_of(parrot, said, SMALL, SITE)
    figures, outcome = gates_of(parrot, said, SMALL.model_copy(update={"force": True}), SITE)
    assert outcome is None
    assert (figures["forced"], figures["lexical_gates"]["bag_of_words"]["passed"]) == (True, False)


def test_shuffled_labels_select_nothing(setting: Setting, hearth: Subject) -> None:
    """With the sides of the pairs exchanged at random, the competence gate ends the study: in 20 shuffles, 19 times or more."""
    pairs = setting.concept.pairs("discovery", 40)
    sides = [question(hearth, side) for pair in pairs for side in (pair.positive, pair.negative)]
    d = np.array([answer.log_ratio(*ACTS) for answer in ask(hearth, sides)]).reshape(-1, 2)
    change = d[:, 0] - d[:, 1]
    assert sign_flip_p(change, 5, "true labels") < 0.01
    rng = np.random.default_rng(int(generator(5, "shuffles").initial_seed()))
    passed = [sign_flip_p(change * rng.choice([-1, 1], len(change)), 5, "shuffled", str(i)) < 0.01 for i in range(20)]
    assert sum(passed) <= 1


def test_shuffled_labels_leave_no_latent_significant(setting: Setting, found: Found, hearth: Subject) -> None:
    from features.deciding import read_last

    pairs = setting.concept.pairs("discovery", 40)
    x = read_last(hearth, hearth.site(SITE), [hearth.encode(side.prompt) for pair in pairs
                                              for side in (pair.positive, pair.negative)])
    codes = setting.dictionary.encode(x).numpy(force=True)
    differences = Families.of(pairs).means((codes[0::2] - codes[1::2]).astype(float)).astype(np.float32)
    assert (sign_flip_max(differences, 5).p < 0.05).any()
    rng = np.random.default_rng(6)
    signs = [rng.choice([-1, 1], (len(differences), 1)).astype(np.float32) for _ in range(20)]
    significant = [bool((sign_flip_max(differences * sign, i).p < 0.05).any()) for i, sign in enumerate(signs)]
    assert sum(significant) <= 4  # 1 is expected at 0.05; the chance of 5 or more is 0.003


def test_the_found_set_is_within_the_limits_and_carried(found: Found) -> None:
    chosen = found.trials[-1]
    assert found.attribution[chosen.latents[0]] > 0
    assert chosen.kl_mean <= 0.009
    assert chosen.kl_p99 <= 0.09
    assert chosen.d > mean_d(answers(found.bench, None, found.bench.questions), *ACTS) + 0.3


def test_what_the_search_rehearses_is_neither_measured_nor_held_out(setting: Setting) -> None:
    learnt, judged = rehearsed(setting, "discovery", 16), rehearsed(setting, "development", 16)
    assert [len(side) for side in (*learnt, *judged)] == [16] * 4
    measured = scenes(setting.world, "role_swapped", setting.spec.seed, 40, 12)
    prompts = {tuple(one.prompt) for split in (learnt, judged) for side in split for one in side}
    assert len(prompts) == 64
    assert not prompts & {tuple(setting.subject.encode(story.prompt())) for side in measured[:4] for story in side}
    wordings = {act: set(options) for act, options in act_question(setting.subject, measured.held_out[0]).options.items()}
    assert not any(wordings[act] & set(one.options[act]) for one in judged[0] for act in wordings)
    given = [np.mean([answer.probs["give"] for answer in ask(setting.subject, side)]) for side in judged]
    assert given[1] > given[0] + 0.5


@pytest.mark.parametrize("acted_on", ["negative", "positive"])
def test_written_pairs_stand_for_themselves(acted_on: PairSide, setting: Setting, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(WRITTEN))
    written = setting._replace(concept=load_concept(str(tmp_path / "mine.yaml"), 0), acted_on=acted_on)
    families = {pair.family for pair in written.concept.pairs("development", 4)}
    base, reference = rehearsed(written, "development", 4)
    texts = [[setting.subject.tokenizer.decode(one.prompt[1:]) for one in side] for side in (base, reference)]
    warm, cold = ([f"A {how} {family}. He" for family in families] for how in ("warm", "cold"))
    assert sorted(texts[0]) == sorted(warm if acted_on == "positive" else cold)
    assert sorted(texts[1]) == sorted(cold if acted_on == "positive" else warm)


@pytest.mark.slow
def test_the_chosen_set_moves_fresh_stories_and_random_sets_do_not(arms: Arms) -> None:
    base, l4, before = (arms.measured[arm].probs.mean() for arm in ("stranger", "L4", "L4-before"))
    assert l4 > base + 0.1
    assert before > base + 0.1
    assert max(arms.random) < l4


@pytest.mark.slow
def test_sham_is_exactly_zero_and_stories_are_the_same(arms: Arms, judged: tuple[Evidence, dict[str, object]]) -> None:
    assert judged[0].sham_change == 0.0
    assert float(arms.kl["sham"].max()) == 0.0
    assert arms.measured["sham"].answers == arms.measured["stranger"].answers


@pytest.mark.slow
def test_figures_have_the_agreed_names(judged: tuple[Evidence, dict[str, object]], setting: Setting) -> None:
    figures = json.loads(json.dumps(judged[1]))
    assert {"recovery", "recovery_low", "recovery_high", "recovery_before", "delta_d", "delta_d_low", "hazard_ratio",
            "hazard_ratio_upper", "random_effect_max", "competence"} <= figures.keys()
    assert figures["arms"].keys() == {"stranger", "bonded", "L2", "L4", "L4-before", "sham", "lexical", "random"}
    assert {"n", "act_rate", "act_rate_low", "act_rate_high", "D", "hazard_mean", "hazard_max", "kl_mean", "kl_p99",
            "guard_hits", "word_docs", "words_expected", "words_expected_low",
            "words_expected_high"} <= figures["arms"]["L4"].keys()
    assert not {"kl_mean", "hazard_mean"} & figures["arms"]["bonded"].keys()  # not taken is absent
    assert figures["arms"]["random"]["sets"] == setting.spec.random_sets == 20


@pytest.mark.slow
def test_without_its_lexical_arm_nothing_is_claimed(judged: tuple[Evidence, dict[str, object]]) -> None:
    left_out = dataclasses.replace(judged[0], arms=judged[0].arms - {"lexical"})
    assert verdict(left_out)[::2] == ("inconclusive", 1)
    assert "the lexical arm is missing" in verdict(left_out).reason


@pytest.mark.slow
def test_a_recipe_with_the_features_of_the_word_is_said(setting: Setting, found: Found, arms: Arms) -> None:
    """The same operation with the lexical arm's features under its gate: it moves acts, and says."""
    chosen, lexical = found.trials[-1], arms.recipes["lexical"]
    high = found.bench.known.high.copy()
    for edit in lexical.edits:
        high[edit.latent] = edit.operator.value / chosen.dose  # pyright: ignore[reportAttributeAccessIssue]
    bench = found.bench._replace(known=found.bench.known._replace(high=high))
    added = tuple(edit.latent for edit in lexical.edits if edit.latent not in chosen.latents)
    spoken = chosen._replace(latents=(*chosen.latents, *added), weights=(*chosen.weights, *(1.0 for _ in added)))
    facts, _ = evidence(setting, run_arms(setting, bench, spoken), {"met": True})
    judgement = verdict(facts)
    assert judgement.verdict == "said" and "hazard" in judgement.reason, judgement


def test_random_sets_are_matched_and_never_the_chosen(found: Found) -> None:
    chosen = found.trials[-1]
    sets = random_sets(chosen, found.bench.known, 20, 3)
    assert len(sets) == 20
    assert not set(chosen.latents) & {latent for drawn in sets for latent in drawn}
    assert sets == random_sets(chosen, found.bench.known, 20, 3)
    rate = found.bench.known.rate
    for place, latent in enumerate(chosen.latents):
        drawn = np.array([one[place] for one in sets])
        assert np.median(np.abs(np.log(rate[drawn] / rate[latent]))) < np.median(
            np.abs(np.log(rate[rate > 0] / rate[latent])))


def test_latents_that_are_all_alike_still_have_random_sets() -> None:
    """70 latents of one firing rate, 60 being drawn among: no draw of all at once is without a latent twice."""
    known = Levels(*(np.ones(200) for _ in Levels._fields))
    chosen = Trial(tuple(range(70)), (), 1.0, 0.0, 0.0, 0.0)
    sets = random_sets(chosen, known, 3, 0)
    assert [len(set(drawn) - set(chosen.latents)) for drawn in sets] == [70] * 3 and len(set(sets)) == 3
    with pytest.raises(SpecError, match="60 latents besides the 140 chosen ones"):
        random_sets(chosen._replace(latents=tuple(range(140))), known, 3, 0)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_random_model_cannot_answer(architecture: str, tmp_path: Path) -> None:
    tokens = tiny_keeper.tokenizer()
    tiny.model(architecture, len(tokens), positions=1024).save_pretrained(tmp_path / "model")
    tokens.save_pretrained(tmp_path / "model")
    subject, spec = load_subject(str(tmp_path / "model"), "cpu"), DemoSpec(discovery=12)
    figures, outcome = gates_of(subject, load_concept("care", 0), spec, SITE)
    assert outcome is not None
    assert (outcome.verdict.verdict, outcome.verdict.row) == ("inconclusive", 1)
    assert "fails the competence gate" in outcome.verdict.reason
    summary = summary_of(outcome, spec, subject, 1.0, {})
    write(outcome, summary, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["verdict"] == "inconclusive"
    assert "inconclusive" in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "recipe.yaml").exists()
    assert figures["competence"]["n"] == 12


def test_curve_shows_the_doses_of_the_chosen_set() -> None:
    nan = float("nan")
    trials = [Trial((3,), (), 0.5, 0.001, 0.01, 0.2), Trial((3, 4), (), 0.6, 0.004, nan, 0.4),
              Trial((3, 4), (5,), 0.5, 0.001, nan, 0.9), Trial((3, 4), (), 0.4, 0.001, nan, 0.3)]
    assert [(dose.gain, dose.effect) for dose in curve(trials)] == [(0.4, 0.3), (0.6, 0.4)]
    assert curve([]) == []


def test_bad_input_is_refused_before_anything_runs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = runner(capsys, "demo")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    answer = run("--out", tmp_path / "full")
    assert answer.code == 2
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert run("--concept", "lvoe", "--out", tmp_path / "a").code == 2
    assert run("--stories", "3", "--out", tmp_path / "b").code == 2
    assert run("--model", "hearht", "--out", tmp_path / "c").code == 2
    assert run("--limit-kl-mean", "0", "--out", tmp_path / "d").code == 2
    assert not {"a", "b", "c", "d"} & {path.name for path in tmp_path.iterdir()}


def test_written_pairs_have_no_fresh_stories(tmp_path: Path) -> None:
    concept = load_concept("care", 0)
    assert contrast_of(concept) == "role_swapped"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(WRITTEN))
    with pytest.raises(SpecError, match="are written out"):
        contrast_of(load_concept(str(tmp_path / "mine.yaml"), 0))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [101, 202, 303])
def test_hearth_is_moved_unsaid(seed: int, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    answer = runner(capsys, "demo")("--seed", seed, "--out", tmp_path / "demo", "--json")
    assert answer.code == 0
    summary = answer.json
    assert summary["verdict"] == "unsaid", summary["verdict_reason"]
    assert summary["recovery"] >= 0.70 and summary["recovery_low"] >= 0.60
    assert summary["recovery_before"] >= 0.50
    assert summary["random_effect_max"] <= 0.10 and summary["hazard_ratio_upper"] <= 1.25
    assert abs(summary["held_out_act_prob"]["L4"] - summary["arms"]["L4"]["act_prob"]) <= 0.1


@pytest.mark.slow
def test_parrot_with_the_word_is_said(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = runner(capsys, "demo")
    answer = run("--model", "parrot", "--concept", "care-said", "--force", "--out", tmp_path / "demo", "--json")
    assert answer.code == 0
    assert answer.json["verdict"] == "said", answer.json["verdict_reason"]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_summary(capsys: pytest.CaptureFixture[str], setting: Setting, tmp_path: Path) -> None:
    run, place = runner(capsys, "demo"), setting.dictionary.provenance.extra
    assert place is not None
    made = []
    for name in ("first", "second"):
        summary = run("--stories", 20, "--seed", 4, "--out", tmp_path / name, "--json").json
        made.append({key: value for key, value in summary.items() if key not in ("wall_s", "path", "sae")})
    assert made[0] == made[1]
