"""A study's file: what is refused, what is packaged, and the trials and the plan that follow from it without a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.cli.answers import runner
from undertow.core.errors import SpecError
from undertow.studies.demo import DemoSpec, SearchSpec
from undertow.studies.planning import parameters_of, plan_of, power_of, speed, table_of
from undertow.studies.preparing import demo_spec
from undertow.studies.spec import ARMS, CONTROLS, MEASURES, StudySpec, in_words, load_study, packaged_studies, what_is
from undertow.studies.trials import arms_of, measures_of, trials_of, units

CLAIM = {"name": "mine", "primary": "recovery", "arms": ["L4", *CONTROLS], "measures": ["choice", "words", "sample"]}


def test_packaged_studies_are_valid_and_named_by_their_files() -> None:
    assert packaged_studies() == ["competence", "dose", "features", "ladder", "operators", "parrot"]
    for name in packaged_studies():
        spec = load_study(name)
        assert spec.name == name
        assert StudySpec(**spec.model_dump()) == spec
        assert all(what_is(arm) for arm in spec.arms)
    assert load_study("ladder").primary == load_study("parrot").primary == "recovery"


@pytest.mark.parametrize("missing", ["L4", *CONTROLS])
def test_a_claim_without_a_control_is_refused(missing: str) -> None:
    StudySpec.checked(CLAIM)
    with pytest.raises(SpecError, match=missing):
        StudySpec.checked(CLAIM | {"arms": [arm for arm in CLAIM["arms"] if arm != missing]})


@pytest.mark.parametrize(("change", "said"), [
    ({"arms": ["stranger", "L5"]}, "no arm is called 'L5'"), ({"arms": ["stranger", "dose:much"]}, "dose:much"),
    ({"arms": ["stranger", "operator:halve"]}, "operator:halve"), ({"arms": ["L4"]}, "'stranger' is missing"),
    ({"arms": ["stranger", "stranger"]}, "stands twice"), ({"measures": ["chioce"]}, "did you mean choice"),
    ({"seeds": [1, 1]}, "the seed 1 stands twice"), ({"seeds": []}, "seeds"), ({"armz": []}, "armz"),
    ({"size": {"stories": 10, "few": 20}}, "few"), ({"thresholds": {"alpha": 0.7}}, "alpha"), ({"name": "../x"}, "name"),
    ({"measures": ["words"]}, "choice, sample"), ({"size": {"sets": 5}}, "at least 20 matched random sets")])
def test_bad_settings_are_refused_with_their_value(change: dict[str, object], said: str) -> None:
    with pytest.raises(SpecError, match="refused") as caught:
        StudySpec.checked(CLAIM | change, "mine.yaml")
    assert said in caught.value.what


def test_changes_reach_into_parts_and_are_checked() -> None:
    assert load_study("ladder", {"size.stories": 20, "model": "parrot"}).size.stories == 20
    with pytest.raises(SpecError, match=r"size\.storeis"):
        load_study("ladder", {"size.storeis": 20})
    with pytest.raises(SpecError, match="names no setting"):
        load_study("ladder", {"model.size": 1})
    with pytest.raises(SpecError, match="no study is called 'ladderr'") as caught:
        load_study("ladderr")
    assert "did you mean ladder?" in caught.value.hint


def test_every_story_of_every_arm_is_in_one_trial() -> None:
    spec = load_study("ladder", {"seeds": [0, 1]})
    trials = trials_of(spec)
    assert len({trial.key for trial in trials}) == len(trials)
    for seed in spec.seeds:
        for arm in spec.arms:
            for measure in set(spec.measures) & set(measures_of(arm)):
                mine = [trial for trial in trials if (trial.arm, trial.measure, trial.seed) == (arm, measure, seed)]
                assert [i for trial in mine for i in range(trial.first, trial.stop)] == list(range(units(spec, arm, measure)))
    assert not [trial for trial in trials if (trial.arm, trial.measure) == ("L4-before", "words")]


def test_keys_follow_what_the_figures_depend_on_and_nothing_else() -> None:
    def keys(**changes: object) -> dict[tuple[str, str, int], str]:
        return {(t.arm, t.measure, t.first): t.key for t in trials_of(load_study("ladder", changes))}

    before = keys()
    assert keys(**{"thresholds.recovery_high": 0.5, "about": "other"}) == before
    for search in ({"size.discovery": 20}, {"size.texts": 40}, {"thresholds.kl_mean": 0.5}, {"thresholds.kl_p99": 0.5},
                   {"size.aim": 2.0}, {"size.window": "everywhere"}):
        other = keys(**search)
        assert other["stranger", "choice", 0] == before["stranger", "choice", 0]
        assert other["L4", "choice", 0] != before["L4", "choice", 0]
    few = keys(**{"size.few": 20})
    assert {place for place in before if few[place] != before[place]} == {  # sets are judged, and streams read, on few stories
        place for place in before if place[0] == "random" or place[1] == "spread"}
    assert not set(keys(seeds=[1]).values()) & set(before.values())


def test_a_search_sees_as_many_texts_and_keeps_to_the_limits_of_its_study() -> None:
    spec = load_study("ladder", {"size.texts": 9, "size.features": 4, "thresholds.kl_mean": 0.02, "thresholds.kl_p99": 1.0})
    assert demo_spec(spec, 3) == DemoSpec(seed=3, texts=9, search=SearchSpec(features=4, kl_mean=0.02, kl_p99=1.0))
    assert demo_spec(load_study("ladder"), 0) == DemoSpec()


def test_settings_in_words() -> None:
    assert in_words({"stories": 20, "aim": 0.8, "window": None}) == "stories 20, aim 0.8"
    assert in_words({"window": "reading"}) == "window reading"


def test_a_battery_is_operated_everywhere_since_its_tellings_are_asked_together() -> None:
    def window(**changes: object) -> str:
        return demo_spec(load_study("ladder", changes), 0).search.window

    assert (window(), window(**{"size.window": "everywhere"})) == ("reading", "everywhere")
    assert window(concept="battery:care") == "everywhere"
    with pytest.raises(SpecError, match="'reading' on a battery"):
        load_study("ladder", {"concept": "battery:care", "size.window": "reading"})


def test_stars_stand_for_every_feature_that_may_be_chosen() -> None:
    assert [arm for arm in arms_of(load_study("features", {"size.features": 3})) if arm.startswith("only:")] == [
        "only:0", "only:1", "only:2"]


def test_a_plan_needs_no_model() -> None:
    spec = load_study("ladder", {"model": "gpt2"})
    planned = plan_of(spec)
    assert planned.searches == 1
    assert sum(line["trials"] for line in table_of(planned.trials)) == len(planned.trials)
    assert planned.seconds is not None
    once, half = plan_of(spec, rate=2e9), plan_of(load_study("ladder"), rate=1e9)
    assert once.seconds is not None and once.seconds > 40 * (half.seconds or 0) / 4
    assert plan_of(load_study("competence")).searches == 0
    assert plan_of(load_study("ladder", {"model": "unheard/of"})).seconds is None
    assert plan_of(load_study("ladder", {"model": "unheard/of"}), 1e9).seconds is not None
    assert 1e8 < speed() < 1e15
    assert plan_of(load_study("ladder", {"size.texts": 8})).tokens < plan_of(load_study("ladder")).tokens


@pytest.mark.parametrize(("model", "size"), [("gpt2", 124e6), ("Qwen/Qwen3-0.6B", 0.6e9), ("google/gemma-3-270m", 270e6),
                                             ("./models/gpt2", 124e6), ("mistral", None)])
def test_sizes_from_names(model: str, size: float | None) -> None:
    assert parameters_of(model) == size


def test_power_by_known_values() -> None:
    power = power_of(load_study("ladder"))
    assert power.n == 60
    assert power.needed == {0.2: 199, 0.3: 90, 0.5: 34}  # G*Power 3.1: paired t, one-sided, alpha 0.025, power 0.8
    assert power.power[0.5] > 0.95 > power.power[0.3]


def test_commands_answer_without_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = runner(capsys, "study")
    planned = run("plan", "ladder", "--model", "gpt2", "--json").json
    assert planned["trials"] == len(planned["keys"]) == len(trials_of(load_study("ladder")))
    assert "about" in run("plan", "ladder", "--model", "gpt2").out
    assert "give --params" in run("plan", "ladder", "--model", "unheard").out
    assert set(run("list", "--json").json["studies"]) == set(packaged_studies())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(CLAIM))
    answer = run("check", tmp_path / "mine.yaml")
    assert (answer.code, "a verdict is drawn" in answer.out) == (0, True)
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(CLAIM | {"arms": ["stranger", "L4"]}))
    answer = run("check", tmp_path / "bad.yaml")
    assert answer.code == 2
    assert "proves nothing" in answer.err
    assert "bad.yaml" in answer.err
    assert "Traceback" not in answer.err
    assert run("plan", "ladder", "--set", "size.stories").code == 2
    assert run("plan", "ladder", "--set", "size.stories=[").code == 2


def test_what_is_listed_runs() -> None:
    assert set(MEASURES) == {measure for arm in ARMS for measure in measures_of(arm)}
