"""Studies on the packaged organisms with all arms, small: what must be zero is, what must move does, and parrot says no."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from undertow.cli.main import main
from undertow.studies.engine import run_study
from undertow.studies.result import Report, read_result, summary_of
from undertow.studies.spec import load_study
from undertow.studies.study_report import write_report

pytestmark = pytest.mark.slow
SITE = "blocks.1.hook_resid_post"
SMALL = {"size.stories": 10, "size.few": 5, "size.sampled": 10, "size.texts": 8, "size.ordinary": 8, "size.chunk": 10,
         "size.sets": 20, "size.discovery": 16, "size.development": 12}


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("hearth") / "trained"
    assert main(["sae", "train", "--model", "hearth", "--site", SITE, "--text", "keeper:300", "--tokens", "60000", "--width",
                 "1024", "--k", "16", "--batch-size", "512", "--out", str(out)]) == 0
    return str(out)


def done(name: str, where: Path, **changes: Any) -> Report:
    spec = load_study(name, SMALL | changes)
    result = run_study(spec, where)
    assert result.counts["failed"] == result.counts["left"] == 0, result
    return read_result(where)


@pytest.fixture(scope="module")
def ladder(sae: str, tmp_path_factory: pytest.TempPathFactory) -> Report:
    return done("ladder", tmp_path_factory.mktemp("ladder") / "s", sae=sae)


def test_every_arm_of_the_ladder_is_there(ladder: Report) -> None:
    absent = {row["arm"] for row in ladder.rows if row["status"] == "absent"}
    assert absent <= {"frozen"}  # its search may find nothing
    assert set(ladder.table.columns.arms) == set(ladder.spec.arms) - absent
    assert ladder.verdict is not None
    assert ladder.verdict.row > 1, ladder.verdict  # no control is missing, and sham is exactly zero
    assert {clause.group for clause in ladder.clauses} == {"L1", "L2", "L3", "L4"}


def test_the_arms_do_what_they_are_for(ladder: Report) -> None:
    def value(arm: str, name: str) -> float:
        figure = ladder.table.get(arm, name)
        assert figure is not None, (arm, name)
        return figure.value

    assert [value("sham", name) for name in ("D_change", "kl_mean", "kl_p99", "twin_D_change")] == [0.0] * 4
    assert value("sham", "hazard_ratio") == 1.0
    assert value("L4", "recovery_prob") > 0.2
    assert value("L4", "recovery_prob") > value("random", "random_max")
    assert value("L3-acts", "recovery_prob") > 0.5
    assert abs(value("L1", "recovery_prob")) < 0.1
    assert abs(value("L3", "recovery_prob")) < 0.1
    for arm in ("L1", "L2", "L3", "lexical"):
        assert value(arm, "hazard_ratio") > 3, arm
    assert value("minus", "D_change") < 0 < value("L4", "D_change")
    assert abs(value("shuffled", "recovery_prob")) < value("L4", "recovery_prob") / 2
    assert value("L4", "kl_mean") < 0.02 < value("constant", "kl_mean") + 0.02
    assert value("L1", "bits_to_state") < value("L4", "bits_to_state") < value("L3", "bits_to_state")


def test_the_untouched_subject_differs_from_itself_in_nothing(ladder: Report) -> None:
    own = ladder.table.columns.get("stranger", "words")
    assert own is not None
    assert max(max(text) for text in own.values["kl"]) == 0.0
    said = ladder.table.columns.get("L2", "words")
    assert said is not None
    lengths = [[len(text) for text in column.values["hazard"]] for column in (said, own)]
    assert lengths[0] == lengths[1]  # of the text's own tokens, not of the line before it


def test_the_page_of_a_real_study(ladder: Report, tmp_path: Path) -> None:
    write_report(ladder, tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page
    assert page.count("<svg") >= 4
    assert json.loads((tmp_path / "summary.json").read_text()) == json.loads(json.dumps(summary_of(ladder)))


def test_doses_and_operators_agree_where_they_are_the_same(sae: str, tmp_path: Path) -> None:
    """dose:1 and operator:floor are the surgery itself, written in two other ways."""
    report = done("dose", tmp_path / "s", sae=sae, arms=["stranger", "bonded", "L4", "sham", "dose:0", "dose:0.5", "dose:1",
                                                         "operator:floor", "operator:clamp", "operator:add"],
                  measures=["choice"])
    columns = report.table.columns

    def d(arm: str) -> np.ndarray:
        column = columns.get(arm, "choice")
        assert column is not None
        return column.array("D")

    assert (d("dose:1") == d("L4")).all() and (d("operator:floor") == d("L4")).all()
    assert (d("dose:0") == d("sham")).all() and (d("sham") == d("stranger")).all()
    assert d("stranger").mean() < d("dose:0.5").mean() < d("dose:1").mean()
    assert not (d("operator:clamp") == d("L4")).all()


def test_features_alone_and_left_out(sae: str, tmp_path: Path) -> None:
    report = done("features", tmp_path / "s", sae=sae)
    chosen = len(report.searches[0]["chosen"]["latents"])
    singles = [arm for arm in report.table.columns.arms if arm.startswith("only:")]
    assert len(singles) == chosen
    absent = [row for row in report.rows if row["status"] == "absent"]
    assert all("the search chose" in row["reason"] for row in absent)


def test_hearth_understands_the_choice_and_parrot_is_not_unsaid(sae: str, tmp_path: Path) -> None:
    gate = done("competence", tmp_path / "hearth", **{"size.stories": 40})
    assert gate.clauses[0].outcome == "held"  # D falls with cost; hearth was taught no instructions to give or to keep
    parrot = done("ladder", tmp_path / "parrot", model="parrot", arms=list(load_study("parrot").arms))
    assert parrot.verdict is not None
    assert (parrot.verdict.verdict, parrot.verdict.row) == ("inconclusive", 1)
    absent = {row["arm"] for row in parrot.rows if row["status"] == "absent"}
    assert {"L4", "sham", "lexical", "random"} <= absent
