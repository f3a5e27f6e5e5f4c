"""From rows with a known truth to figures, hypotheses, verdict and report: what was put in comes out, and nothing else."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from interventions.verdict import verdict
from tests.studies.rows import made_up
from undertow.core.errors import ArtifactError
from undertow.studies.columns import Columns, matched
from undertow.studies.inference import resamples
from undertow.studies.judging import evidence_of, group_outcome, hypotheses, judged, sham_change
from undertow.studies.preparing import NOT_COMPETENT, NOTHING_FOUND
from undertow.studies.result import row_means
from undertow.studies.spec import StudySpec, load_study
from undertow.studies.table import MEANINGS, kl_quantile, kl_quantile_draws, table_of
from undertow.studies.trials import trials_of

EFFECTS = {"bonded": 1.0, "L4": 0.9, "L4-before": 0.6, "diffmean": 0.3, "constant": 0.9}
HAZARDS = {"L1": 20.0, "L2": 20.0, "L2-not": 15.0, "lexical": 30.0}
COMPETENT = {"competence": {"met": True}, "absent": ""}


def ladder(**changes: Any) -> StudySpec:
    return load_study("ladder", changes)


def rows_of(spec: StudySpec, **effects: float) -> list[dict[str, Any]]:
    return made_up(spec, EFFECTS | effects, HAZARDS)


def test_figures_are_what_was_put_in() -> None:
    spec = ladder()
    table = table_of(spec, rows_of(spec))
    for arm, effect in EFFECTS.items():
        if arm != "bonded":
            found = table.get(arm, "recovery_prob")
            assert found is not None
            assert found.low is not None and found.high is not None
            assert found.low <= found.value <= found.high
            assert found.value == pytest.approx(effect, abs=0.02)
    figures = {key: figure.value for key, figure in table.figures.items()}
    assert figures["L1", "hazard_ratio"] == pytest.approx(20)
    assert figures["L4", "D_change"] == pytest.approx(3.6)
    assert figures["L4", "delta_d"] == pytest.approx(3.6)
    assert figures["L4", "twin_D_change"] == pytest.approx(0)
    assert figures["L4", "unsaid_ratio"] == pytest.approx(0.9)
    assert figures["L4", "random_held_ratio"] == pytest.approx(0.8)
    assert figures["stranger", "hazard_mean"] == pytest.approx(1e-4 * (1 + 0.1 * 23 / 2))
    assert figures["L4", "kl_mean"] == pytest.approx(0.002)
    assert figures["L4", "kl_p99"] == pytest.approx(0.002)
    assert figures["sham", "D_change"] == 0
    assert figures["random", "random_rank_p"] == pytest.approx(1 / 101)
    assert ("L4-before", "hazard_ratio") not in table.figures  # not measured is absent
    assert {name for _, name in table.figures} <= set(MEANINGS)


def test_pairs_are_compared_and_not_groups() -> None:
    """Stories differ much and an arm shifts each by little: seen in pairs, where the groups overlap."""
    spec = ladder()
    rows = made_up(spec, {"bonded": 1.0, "L4": 0.02}, noise=2.0)
    table = table_of(spec, rows)
    change = table.get("L4", "D_change")
    assert change is not None and change.p is not None
    assert change.p < 0.001
    columns = table.columns.paired("choice", "stranger", "L4")
    assert columns is not None
    assert stats.ttest_ind(columns[0].array("D"), columns[1].array("D")).pvalue > 0.5


def test_every_figure_names_its_rows_and_they_suffice() -> None:
    """The figure comes out the same from the rows that it names, and from no others."""
    spec = ladder()
    rows = rows_of(spec)
    whole = table_of(spec, rows)
    known = {row["id"]: row for row in rows}
    for name in (("L4", "recovery_prob"), ("L1", "hazard_ratio"), ("L4", "delta_d"), ("random", "random_max"),
                 ("L4", "recovery")):
        figure = whole.figures[name]
        again = table_of(spec, [known[i] for i in figure.ids]).figures[name]
        assert again[:7] == figure[:7]
        assert len(figure.ids) < len(rows) / 4


def test_tests_are_corrected_together() -> None:
    spec = ladder()
    table = table_of(spec, rows_of(spec))
    tested = [figure for figure in table.figures.values() if figure.p is not None]
    expected = stats.false_discovery_control([float(figure.p or 0) for figure in tested])
    assert [figure.p_adjusted for figure in tested] == pytest.approx(list(expected))
    assert {figure.correction for figure in tested} == {f"BH over {len(tested)}"}


def test_failed_stories_are_left_out_and_counted() -> None:
    spec = ladder()
    rows = rows_of(spec)
    lost = next(row for row in rows if (row["arm"], row["measure"], row["first"]) == ("L4", "choice", 20))
    rest = [row for row in rows if row is not lost] + [{**lost, "status": "failed", "error": {"type": "X", "what": "broke"}}]
    table = table_of(spec, rest)
    assert (table.figures["L4", "D_change"].n, table.figures["L1", "D_change"].n) == (40, 60)
    assert table.figures["L4", "D_change"].value == pytest.approx(3.6)


def test_seeds_are_put_together_by_story_and_seed() -> None:
    spec = ladder(seeds=[3, 5])
    table = table_of(spec, rows_of(spec))
    assert table.figures["L4", "D_change"].n == 120
    column = table.columns.get("L4", "choice")
    assert column is not None
    assert column.units[:2] == [(3, 0), (3, 1)]
    assert column.units[60] == (5, 0)


def test_a_ratio_that_is_none_is_absent() -> None:
    spec = ladder()
    table = table_of(spec, rows_of(spec, bonded=0.0))
    assert ("L4", "recovery_prob") not in table.figures
    assert verdict(evidence_of(table, [COMPETENT])).row == 1


def test_hypotheses_of_the_ladder() -> None:
    spec = ladder()
    clauses = hypotheses(spec, table_of(spec, rows_of(spec)))
    outcomes = {(clause.group, clause.claim.split(":")[0]): clause.outcome for clause in clauses}
    assert outcomes["L1", "the word's probability rises 10-fold or more"] == "held"
    assert outcomes["L1", "acts stay"] == "held"
    assert outcomes["L4", "acts rise"] == "held"
    assert outcomes["L4", "the word stays as probable"] == "held"
    assert outcomes["L4", "the word is no detour"] == "held"
    assert outcomes["L4", "self-report stays"] == "not tested"  # naming is not among the measures
    assert group_outcome([c for c in clauses if c.group == "L1"]) == "held"
    assert group_outcome([c for c in clauses if c.group == "L4"]) == "not tested"
    tested = [clause for clause in clauses if clause.p is not None]
    assert all(clause.p_adjusted is not None and clause.p_adjusted >= (clause.p or 0) for clause in tested)


def test_hypotheses_are_refuted_by_the_opposite() -> None:
    spec = ladder()
    rows = made_up(spec, {"bonded": 1.0, "L1": 0.9, "L4": 0.1}, {"L4": 3.0, "lexical": 30.0})
    clauses = hypotheses(spec, table_of(spec, rows))
    outcomes = {(clause.group, clause.claim.split(":")[0]): clause.outcome for clause in clauses}
    assert outcomes["L1", "the word's probability rises 10-fold or more"] == "refuted"
    assert outcomes["L1", "acts stay"] == "refuted"
    assert outcomes["L4", "acts rise"] == "refuted"
    assert outcomes["L4", "the word stays as probable"] == "refuted"


def test_self_report_is_tested_only_where_a_control_can_be_named() -> None:
    spec = ladder(measures=["choice", "words", "sample", "naming"])
    rows = rows_of(spec)
    clause = next(c for c in hypotheses(spec, table_of(spec, rows)) if c.claim.startswith("self-report"))
    assert clause.outcome == "not tested"
    assert "no positive control is nameable" in clause.why
    for row in rows:
        if (row["arm"], row["measure"]) == ("L2", "naming"):
            row["values"]["probs"] = [[0.98, 0.02] for _ in row["values"]["probs"]]
    clause = next(c for c in hypotheses(spec, table_of(spec, rows)) if c.claim.startswith("self-report"))
    assert clause.outcome == "held"
    gated = [row for row in rows if row["arm"] != "L4"]  # the gates left the surgery out
    clause = next(c for c in hypotheses(spec, table_of(spec, gated)) if c.claim.startswith("self-report"))
    assert (clause.outcome, clause.why) == ("not tested", "the arm L4 is absent: see the gates")


def test_dose_parts_and_competence() -> None:
    spec = load_study("dose")
    doses = {arm: 0.5 * float(arm.partition(":")[2]) for arm in spec.arms if arm.startswith("dose:")}
    rows = made_up(spec, {"bonded": 1.0, **doses})
    assert [c.outcome for c in hypotheses(spec, table_of(spec, rows))] == ["held"]
    flat = made_up(spec, {"bonded": 1.0})
    assert [c.outcome for c in hypotheses(spec, table_of(spec, flat))] == ["refuted"]
    parts = load_study("features")
    rows = made_up(parts, {"bonded": 1.0, "L4": 0.9, "only:0": 0.2, "only:1": 0.3})
    assert [c.outcome for c in hypotheses(parts, table_of(parts, rows))] == ["held"]
    rows = made_up(parts, {"bonded": 1.0, "L4": 0.4, "only:0": 0.3, "only:1": 0.3})
    assert [c.outcome for c in hypotheses(parts, table_of(parts, rows))] == ["refuted"]
    gate = load_study("competence")
    rows = made_up(gate, {"giver": 0.3, "keeper": -0.2}, noise=0.05)
    assert [c.outcome for c in hypotheses(gate, table_of(gate, rows))] == ["held"] * 3
    rows = made_up(gate, {"giver": -0.1, "keeper": 0.3}, noise=0.05)
    assert [c.outcome for c in hypotheses(gate, table_of(gate, rows))] == ["held", "refuted", "refuted"]


def test_the_verdict_follows_the_table() -> None:
    spec = ladder()
    rows = rows_of(spec)
    found = judged(spec, table_of(spec, rows), [COMPETENT])
    assert found is not None
    assert (found.verdict, found.row) == ("unsaid", 5), found.reason
    said = judged(spec, table_of(spec, made_up(spec, EFFECTS, HAZARDS | {"L4": 2.0})), [COMPETENT])
    assert said is not None and said.verdict == "said"
    forced = judged(spec, table_of(spec, rows), [COMPETENT | {"forced": True}])
    assert forced is not None and (forced.verdict, forced.row) == ("said", 4) and "told apart by their words" in forced.reason
    silent = judged(spec, table_of(spec, made_up(spec, EFFECTS, HAZARDS | {"lexical": 1.0})), [COMPETENT])
    assert silent is not None and (silent.verdict, silent.row) == ("inconclusive", 2)
    none = judged(spec, table_of(spec, rows_of(spec, L4=0.0)), [COMPETENT])
    assert none is not None and none.verdict == "no-effect"
    gate = judged(spec, table_of(spec, rows), [{"competence": {"met": False}, "absent": NOT_COMPETENT}])
    assert gate is not None and (gate.verdict, gate.row) == ("inconclusive", 1)
    empty = judged(spec, table_of(spec, rows), [{"competence": {"met": True}, "absent": NOTHING_FOUND}])
    assert empty is not None and empty.verdict == "no-effect"
    assert judged(load_study("dose"), table_of(spec, rows), [COMPETENT]) is None


@pytest.mark.parametrize("arm", ["sham", "random", "lexical", "L2"])
def test_a_missing_control_makes_it_inconclusive(arm: str) -> None:
    spec = ladder()
    found = judged(spec, table_of(spec, [row for row in rows_of(spec) if row["arm"] != arm]), [COMPETENT])
    assert found is not None and (found.verdict, found.row) == ("inconclusive", 1)
    assert f"the {arm} arm is missing" in found.reason


def test_a_sham_that_does_anything_is_seen() -> None:
    spec = ladder()
    rows = rows_of(spec)
    assert sham_change(Columns(rows)) == 0.0
    row = next(row for row in rows if (row["arm"], row["measure"]) == ("sham", "sample"))
    row["values"]["text"][3] = " gave it away."
    assert sham_change(Columns(rows)) == 1.0
    rows = rows_of(spec)
    row = next(row for row in rows if (row["arm"], row["measure"]) == ("sham", "twin"))
    row["values"]["D"][0] += 1e-9
    assert sham_change(Columns(rows)) == pytest.approx(1e-9)
    assert sham_change(Columns([row for row in rows if row["arm"] != "sham"])) is None


def test_columns_are_matched_by_story() -> None:
    spec = ladder(**{"size.stories": 40, "size.sampled": 20})
    columns = Columns(rows_of(spec))
    choice, sample = columns.get("L4", "choice"), columns.get("L4", "sample")
    assert choice is not None and sample is not None
    both = matched(choice, sample)
    assert both is not None
    assert both[0].units == both[1].units == [(0, i) for i in range(20)]
    assert columns.paired("choice", "stranger", "no-such-arm") is None


def test_a_row_of_another_shape_is_named() -> None:
    spec = ladder()
    rows = rows_of(spec)
    del rows[0]["values"]["story"]
    with pytest.raises(ArtifactError, match=rows[0]["id"]):
        table_of(spec, rows)


def test_shuffled_labels_have_no_effect() -> None:
    """The arms' values exchanged at random story by story: in 40 shuffles no more claims than the level allows."""
    spec = ladder(**{"size.stories": 20})
    rows = made_up(spec, EFFECTS, HAZARDS)
    columns = Columns(rows)
    pair = columns.paired("choice", "stranger", "L4")
    assert pair is not None
    change = pair[1].array("D") - pair[0].array("D")
    draw = np.random.default_rng(4)
    claims = 0
    for _ in range(40):
        shuffled = change * draw.choice([-1, 1], len(change))
        claims += stats.ttest_1samp(shuffled, 0).pvalue < 0.01
    assert claims <= 3


def test_quantiles_of_draws_are_those_of_the_drawn_tokens() -> None:
    draw = np.random.default_rng(2)
    kl = [draw.exponential(0.01, n) for n in (30, 200, 90, 151)]
    found = kl_quantile_draws(kl, 3, "L4")
    for i, texts in enumerate(resamples(4, 3, "L4", "kl_p99", draws=500)[:40]):
        tokens = np.sort(np.concatenate([kl[text] for text in texts]))[::-1]
        assert found[i] == tokens[int(np.ceil(0.01 * len(tokens))) - 1]
    assert len(found) == 500
    zero = kl_quantile([np.zeros(20)] * 8, 0, "sham")
    assert (zero.value, zero.low, zero.high) == (0.0, 0.0, 0.0)


def test_means_of_a_row() -> None:
    row = {"arm": "L4", "measure": "words", "values": {"text": [0, 1], "hazard": [[0.1, 0.3], [0.2]], "change": 0.5}}
    assert row_means(row) == {"L4/words/hazard": pytest.approx(0.2), "L4/words/change": 0.5}
    assert row_means({"arm": "L4", "measure": "sample", "values": {"act": ["give", None], "said": [0, 1]}}) == {
        "L4/sample/said": 0.5}
    assert row_means({"arm": "L4", "measure": "choice", "status": "failed"}) == {}


def folder_of(spec: StudySpec, rows: list[dict[str, Any]], where: Path) -> Path:
    from undertow.studies.ledger import open_ledger

    ledger = open_ledger(where, spec)
    for row in rows:
        ledger.append(row)
    (where / "search-0").mkdir()
    gates = {"bag_of_words": {"accuracy": 0.5, "p": 1.0, "passed": True}}
    competence = {"met": True, "act_prob_change": 0.7, "D_change": 4.0, "low": 3.9, "high": 4.2, "p": 1e-4, "n": 40}
    (where / "search-0" / "search.json").write_text(json.dumps({
        "site": "blocks.1.hook_resid_post", "competence": competence, "absent": "", "lexical_gates": gates,
        "chosen": {"latents": [3], "dose": 0.8}}))
    return where


def test_the_report_is_whole_escaped_and_alone(tmp_path: Path) -> None:
    from undertow.studies.result import read_result
    from undertow.studies.study_report import write_report

    nasty = "<script>alert(1)</script> | x"
    spec = StudySpec.checked(ladder().model_dump() | {"about": nasty})
    rows = rows_of(spec)
    rows[-1] |= {"status": "failed", "error": {"type": "X", "what": nasty}}
    for row in rows:
        if row["measure"] == "sample" and row["status"] == "done":
            row["values"]["text"] = [f" gave {nasty}." for _ in row["values"]["text"]]
    report = read_result(folder_of(spec, rows, tmp_path / "study"))
    paths = write_report(report, tmp_path / "report")
    assert all(path.is_file() for path in paths)
    page = (tmp_path / "report" / "report.html").read_text()
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "src=" not in page.replace("default-src", "")
    assert "<script" not in (tmp_path / "report" / "report.md").read_text()
    for row in rows[:3]:
        assert row["id"] in page
    table = list(csv.DictReader(io.StringIO((tmp_path / "report" / "figures.csv").read_text())))
    assert len(table) == len(report.table.figures)
    ids = {row["id"] for row in rows}
    for line in table:
        assert line["n"] and line["commit"] == "abc"
        assert set(line["rows"].split()) <= ids
        assert line["rows"]
        assert (line["p"] == "") == (line["correction"] == "")
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert {"recovery", "recovery_low", "recovery_before", "delta_d", "hazard_ratio", "hazard_ratio_upper", "unsaid_ratio",
            "random_effect_max", "competence", "verdict", "verdict_reason", "wall_s", "versions", "outcomes"} <= summary.keys()
    assert summary["trials"]["failed"] == 1
    assert "kl_mean" not in summary["arms"]["bonded"]  # not taken is absent
    svg = (tmp_path / "report" / "ladder-bits.svg").read_text()
    assert svg.startswith('<svg xmlns="http://www.w3.org/2000/svg"')
    assert "var(" not in svg


def test_where_an_arm_moves_the_stream_is_drawn_and_written(tmp_path: Path) -> None:
    from undertow.studies.result import read_result
    from undertow.studies.study_report import write_report

    spec = ladder(measures=["choice", "words", "sample", "spread"])
    rows = made_up(spec, {"bonded": 1.0, "L4": 0.5, "L1": 0.1})
    for row in rows:
        if (row["arm"], row["measure"]) == ("L4", "spread"):
            row["values"]["spread"] = [[[0.0] * 24, [0.0] * 23 + [0.4 + 0.01 * i]] for i in row["values"]["story"]]
    report = read_result(folder_of(spec, rows, tmp_path / "study"))
    found, none = report.table.get("L4", "spread_decision"), report.table.get("sham", "spread_decision")
    assert found is not None and found.low is not None and found.high is not None
    assert found.value == pytest.approx(0.4 + 0.01 * 9 / 2) and found.low < found.value < found.high
    assert none is not None and (none.value, none.low, none.high) == (0.0, 0.0, 0.0)
    write_report(report, tmp_path / "report")
    lines = list(csv.DictReader(io.StringIO((tmp_path / "report" / "spread.csv").read_text())))
    arms = {line["arm"] for line in lines}
    assert {"L1", "L4", "sham"} <= arms and len(lines) == len(arms) * 2 * 24
    at = {(line["arm"], int(line["block"]), int(line["place"])): line for line in lines}
    last = at["L4", 1, 0]
    assert float(last["value"]) == pytest.approx(found.value) and last["n"] == str(spec.size.few) == "10"
    assert (float(last["low"]), float(last["high"])) == pytest.approx((found.low, found.high), abs=0.01)
    assert {(line["value"], line["low"], line["high"]) for key, line in at.items() if key[1:] != (1, 0)} == {("0", "0", "0")}
    svg = (tmp_path / "report" / "spread.svg").read_text()
    assert svg.startswith("<svg xmlns") and "L4, block 1, token 0: 0.445" in svg
    assert "L4, block 1, token 0: 0.445" in (tmp_path / "report" / "report.html").read_text()
    assert "![spread](spread.svg)" in (tmp_path / "report" / "report.md").read_text()


def test_a_study_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    from undertow.studies.result import read_result
    from undertow.studies.study_report import write_report

    spec = ladder()
    report = read_result(folder_of(spec, rows_of(spec)[:2], tmp_path / "study"))
    write_report(report, tmp_path / "report")
    assert report.left == len(trials_of(spec)) - 2
    assert "Not whole" in (tmp_path / "report" / "report.html").read_text()
    assert report.verdict is not None and report.verdict.row == 1
