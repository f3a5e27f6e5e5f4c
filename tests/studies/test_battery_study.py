"""A study on a battery: families for stories, every figure the mean over tellings, and no sealed family in the search."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sae.dictionary import LinearDictionary, Provenance, TopK
from sae.formats import save_folder
from tests import tiny_keeper
from tests.cli.answers import runner
from tests.studies import small_battery
from tests.studies.test_battery_planted import reading, understanding, wordless
from undertow.core.errors import SpecError
from undertow.core.seeds import generator
from undertow.studies import battery_figures, sources
from undertow.studies.battery_asking import question, rows_of, to_ask
from undertow.studies.battery_telling import battery_teller
from undertow.studies.battery_text import BatteryFamily, BatterySpec
from undertow.studies.battery_units import LEAST_SEARCHED, battery_of, measured, searched
from undertow.studies.demo import DemoSpec
from undertow.studies.engine import run_study
from undertow.studies.ledger import ROWS
from undertow.studies.planning import plan_of, power_of
from undertow.studies.result import read_result
from undertow.studies.sources import open_source
from undertow.studies.spec import StudySpec, load_study
from undertow.studies.study_report import html_of, markdown_of, write_report
from undertow.studies.trials import trials_of
from undertow.subjects.keeper.world import load_world
from undertow.subjects.load import load_subject
from undertow.subjects.organisms.measuring import ask
from undertow.subjects.subject import Subject

SMALL = {"stories": 10, "few": 5, "sampled": 10, "texts": 8, "ordinary": 8, "chunk": 5, "sets": 1}
UNTOUCHED = ["stranger", "bonded", "L1", "L2", "L2-not", "giver", "keeper"]


def families(letters: str) -> list[dict[str, Any]]:
    """Three families a letter."""
    return [{**one, "id": f"{one['id']}-{letter}"} for letter in letters
            for one in (small_battery.OIL, small_battery.BREAD, small_battery.WOOD)]


def save(path: Path, letters: str, **changes: str) -> Path:
    path.write_text(yaml.safe_dump({"name": "small", "families": [{**one, **changes} for one in families(letters)]}))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_keeper.save_random(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def subject(model: Path) -> Subject:
    return load_subject(str(model), "cpu")


@pytest.fixture(scope="module")
def battery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 families: 11 sealed, 13 not."""
    return save(tmp_path_factory.mktemp("batteries") / "small.yaml", "abcdefgh")


def study(model: Path, battery: Path | str, **changes: Any) -> StudySpec:
    return StudySpec.checked({"name": "small", "model": str(model), "concept": f"battery:{battery}", "arms": UNTOUCHED,
                              "measures": ["choice", "twin"], "size": SMALL} | changes)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / ROWS).read_text().splitlines()]


def column(rows: Sequence[dict[str, Any]], arm: str, measure: str, name: str) -> np.ndarray:
    return np.array([value for row in rows if (row["arm"], row["measure"]) == (arm, measure) for value in row["values"][name]])


def by_hand(subject: Subject, battery: Path, n: int) -> battery_figures.Table:
    """The cells of the first families of a study as `undertow battery run` has them."""
    asked = to_ask(measured(battery_of(str(battery)), 0)[:n], "base")
    return battery_figures.table(rows_of(subject, asked, ask(subject, [question(subject, one, "base") for one in asked])))


def test_a_row_has_one_entry_a_family_the_mean_over_its_tellings(model: Path, battery: Path, subject: Subject,
                                                                 tmp_path: Path) -> None:
    result = run_study(study(model, battery, arms=[*UNTOUCHED, "L4"]), tmp_path / "s")
    rows = lines(tmp_path / "s")
    assert result.counts["failed"] == 0, [row.get("error") for row in rows]
    assert {(row["arm"], row["status"]) for row in rows} == {*((arm, "done") for arm in UNTOUCHED), ("L4", "absent")}
    expected = by_hand(subject, battery, 10)
    social, twin = (expected.d[:, side].reshape(10, -1).mean(axis=1) for side in (0, 1))
    assert column(rows, "stranger", "choice", "story").tolist() == list(range(10))
    assert column(rows, "stranger", "choice", "D") == pytest.approx(social, abs=1e-3)
    assert column(rows, "stranger", "twin", "D") == pytest.approx(twin, abs=1e-3)
    assert column(rows, "stranger", "choice", "p") == pytest.approx(8 * expected.act_prob / 8, abs=1e-3)
    effect = (expected.d[:, 0, 0] - expected.d[:, 0, 1]).reshape(10, -1).mean(axis=1)
    assert column(rows, "stranger", "choice", "cost_effect") == pytest.approx(effect, abs=1e-3)
    for arm, instruction in (("bonded", "give"), ("giver", "give"), ("keeper", "keep")):
        told = expected.instructed[instruction].reshape(10, -1).mean(axis=1)
        assert column(rows, arm, "choice", "D") == pytest.approx(told, abs=1e-3), arm
    assert np.abs(column(rows, "L1", "choice", "D") - social).max() > 1e-3


def test_without_competence_the_surgery_is_absent_and_says_why(model: Path, battery: Path, tmp_path: Path) -> None:
    spec = study(model, battery, arms=["stranger", "bonded", "giver", "keeper", "L4", "random"], measures=["choice"])
    run_study(spec, tmp_path / "s")
    report = read_result(tmp_path / "s")
    reason = {row["reason"] for row in report.with_status("absent")}
    assert len(reason) == 1 and "gate of competence, on the development half: " in reason.pop()
    assert (report.searches[0]["competence"]["met"], report.searches[0]["lexical_gates"]) == (False, {})
    assert {one["n"] for one in report.searches[0]["competence"]["gates"].values()} == {13}
    assert not (tmp_path / "s" / "sae-0").exists()
    assert report.clauses[0].claim == "D falls with cost" and len(report.clauses) == 3
    write_report(report, tmp_path / "report")
    for text in (html_of(report, {}), markdown_of(report, {})):
        assert "keeper is in love" not in text and "empty thing" not in text and "bonded people" not in text
    assert "competence: giver_raises_D" in html_of(report, {})
    assert report.table.get("stranger", "c50") is None


def test_all_measures_of_prompt_arms(model: Path, battery: Path, tmp_path: Path) -> None:
    measures = ["choice", "twin", "sameness", "sample", "naming", "spread"]
    run_study(study(model, battery, arms=["stranger", "bonded", "L1"], measures=measures), tmp_path / "s")
    rows = lines(tmp_path / "s")
    assert {row["status"] for row in rows} == {"done"}, [row.get("error") for row in rows]
    assert {row["measure"] for row in rows if row["arm"] == "L1"} == set(measures)
    sampled = next(row for row in rows if row["measure"] == "sample")["values"]
    assert all(prompt.endswith(" choose to") for prompt in sampled["prompt"])
    names = next(row for row in rows if row["measure"] == "naming")["values"]
    assert all(sum(probs) == pytest.approx(1) for probs in names["probs"])
    spread = next(row for row in rows if (row["arm"], row["measure"]) == ("L1", "spread"))["values"]
    assert len(spread["spread"]) == len(spread["story"]) == 5


def test_what_is_told() -> None:
    battery = BatterySpec.checked({"name": "small", "families": families("abcdefgh")})
    teller = battery_teller(battery, load_world(), 0)
    assert {family.person for family in teller.families} == {"I", "You"}
    for i, family in enumerate(teller.families):
        told, reference, twin = teller.decision(i), teller.decision(i, "reference"), teller.decision(i, kind="boat")
        assert len(told.tellings) == len({telling.text for telling in told.tellings}) == 8
        assert all(telling.text.startswith(f"{telling.ordinary} ") for telling in (*told.tellings, *reference.tellings))
        assert sum(telling.cost for telling in told.tellings) == 4
        assert reference == teller.decision(i, before=teller.sentence("giver"))
        said = "I always give what I have" if family.person == "I" else "You always give what you have"
        assert all(said in telling.text for telling in reference.tellings)
        assert [telling.options for telling in twin.tellings] == [telling.options for telling in told.tellings]
        first = told.shown.options["give"][0]
        assert teller.act_of(told.shown, f"{first} And then") == "give"
        assert teller.act_of(told.shown, f"{first.removesuffix('.')}, slowly") == "give"
        assert teller.act_of(told.shown, f"{first.removesuffix('.')}s") is None
        assert teller.asked(i)[0].endswith(f"{family.person} say,")
        line = teller.line("L2")
        assert line is not None and line(i, "").split()[0] in (("I", "My") if family.person == "I" else ("You", "Your"))
    assert {told.shown.options["give"] for told in map(teller.decision, range(8))}
    assert len({teller.decision(i).tellings.index(teller.decision(i).shown) for i in range(8)}) == 8


def test_the_search_sees_no_sealed_family() -> None:
    battery = BatterySpec.checked({"name": "small", "families": families("abcdefgh")})
    assert {one.id for one in measured(battery, 0)}.isdisjoint(one.id for one in searched(battery))
    source = sources.Battery(battery, Path())
    found = {split: source.concept(0).pairs(split, 1_000) for split in ("discovery", "development", "sealed")}
    names = {split: {pair.family for pair in pairs} for split, pairs in found.items()}
    assert set().union(*names.values()) == {one.id for one in searched(battery)}
    assert not names["discovery"] & names["development"]
    for pair in found["discovery"]:
        assert pair.positive.options == pair.negative.options and pair.positive.prompt != pair.negative.prompt
        assert pair.positive.prompt.split()[-2:] == pair.negative.prompt.split()[-2:] == ["choose", "to"]
    assert len(found["discovery"]) == 4 * len(names["discovery"])
    orders = [[one.id for one in measured(battery, seed)] for seed in (0, 1)]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])


def test_a_competent_subject_goes_on_to_the_lexical_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """A subject whose answers are a rule over the text: it has no activations, so the lexical gates are noted alone."""
    seen: list[set[str]] = []
    monkeypatch.setattr(sources, "lexical_gates", lambda subject, pairs, spec, site: seen.append(
        {pair.family for pair in pairs}) or {})
    battery = BatterySpec.checked({"name": "small", "families": families("abc")})
    source = sources.Battery(battery, Path())

    def gates(rule: Any) -> dict[str, Any]:
        return source.gates(reading(rule), DemoSpec(), "blocks.0.hook_resid_post", lambda phase, done, total: None)[1]

    competence = gates(understanding)
    assert competence["gates"]["giver_raises_D"]["value"] == pytest.approx(1.5, abs=1e-3)
    assert not gates(wordless)["met"]
    assert len(seen) == int(competence["met"])
    assert all(names <= {one.id for one in searched(battery)} for names in seen)


def test_with_competence_the_search_runs_to_the_end(model: Path, battery: Path, subject: Subject, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(battery_figures, "as_gate", lambda values, sign, seed, called: battery_figures.Gate(
        1.0, 0.5, 1.5, len(values), called[1], 0.001, True))
    random = generator(0, "sae")
    decoder = torch.nn.functional.normalize(torch.randn(48, 16, generator=random), dim=1)
    made = LinearDictionary(decoder.T.clone(), torch.zeros(48), decoder, torch.zeros(16), TopK(6),
                            Provenance(str(model), "blocks.0.hook_resid_post", 128, True, {"subject_digest": subject.digest}))
    save_folder(made, tmp_path / "sae")
    spec = study(model, battery, arms=["stranger", "bonded", "L4", "sham", "random", "diffmean"], measures=["choice", "unsaid"],
                 sae=str(tmp_path / "sae"), force=True)
    result = run_study(spec, tmp_path / "s")
    rows = lines(tmp_path / "s")
    assert result.counts["failed"] == 0, [row.get("error") for row in rows]
    facts = read_result(tmp_path / "s").searches[0]
    assert set(facts["lexical_gates"]) == {"bag_of_words", "shuffled"} and facts["competence"]["met"]
    assert facts["absent"] == "" and {row["status"] for row in rows} == {"done"}
    assert column(rows, "sham", "choice", "D").tolist() == column(rows, "stranger", "choice", "D").tolist()
    assert len(column(rows, "L4", "unsaid", "D_held")) == 10
    assert np.abs(column(rows, "L4", "choice", "D") - column(rows, "stranger", "choice", "D")).max() > 0


def test_sizes_are_those_of_the_sealed_half_and_keys_follow_the_file(tmp_path: Path, model: Path) -> None:
    spec = load_study("ladder", {"concept": "battery:care", "model": "smollm2"})
    n = {(trial.arm, trial.measure): trial.stop for trial in trials_of(spec)}  # the last chunk of each comes last
    assert {n["stranger", measure] for measure in ("choice", "twin", "sample")} == {52}
    assert (n["stranger", "words"], n["L4", "sameness"], n["random", "choice"]) == (24, 120, 100)
    assert power_of(spec).n == 52 and plan_of(spec).seconds is not None
    battery = save(tmp_path / "mine.yaml", "abcdefgh")
    before = [trial.key for trial in trials_of(study(model, battery))]
    save(battery, "abcdefgh", last="I hold oil, and there is nothing more.")
    assert not set(before) & {trial.key for trial in trials_of(study(model, battery))}
    assert BatteryFamily.checked(families("a")[0]).id == "reef-a"


def test_bad_input_is_refused_before_any_trial(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SpecError, match="no battery is called 'caer'") as caught:
        run_study(study(model, "caer"), tmp_path / "s")
    assert "did you mean care?" in caught.value.hint
    assert not (tmp_path / "s").exists()
    with pytest.raises(SpecError, match=r"none\.yaml"):
        trials_of(study(model, tmp_path / "none.yaml"))
    with pytest.raises(SpecError, match="should"):
        open_source(study(model, save(tmp_path / "norm.yaml", "abcdefgh", last="I hold oil, and I should keep it.")))
    with pytest.raises(SpecError, match="3 families on its sealed half, and a study is measured on 5 or more"):
        open_source(study(model, save(tmp_path / "few.yaml", "abc")))
    few = study(model, save(tmp_path / "short.yaml", "abcdef"))
    assert open_source(few) and len(searched(battery_of(str(tmp_path / "short.yaml")))) < LEAST_SEARCHED
    with pytest.raises(SpecError, match="families on its development half"):
        open_source(few.model_copy(update={"arms": ("stranger", "L4")}))
    with pytest.raises(SpecError, match="2 seeds"):
        study(model, "care", seeds=[0, 1])
    with pytest.raises(SpecError, match="names no battery"):
        study(model, "")
    run = runner(capsys, "study")
    answer = run("plan", "ladder", "--set", "concept=battery:moralchoice")
    assert answer.code == 2 and "has no families" in answer.err and "Traceback" not in answer.err
    assert "an instruction to give, before the choice" in run("check", "ladder", "--set", "concept=battery:care").out
