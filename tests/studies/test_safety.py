"""The safety gates beside an arm: what is asked, an exact zero for a sham, a planted arm that complies, figures by hand."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from interventions.applying import Gate, apply_direction
from tests.studies import small_battery
from tests.studies.rows import asked
from tests.studies.test_battery_run import plainly
from undertow.core.errors import ArtifactError, EditError, SpecError
from undertow.core.seeds import generator
from undertow.studies.conditions import Condition, Cost, Under
from undertow.studies.result import Report
from undertow.studies.safety import form_of, put, requests_of, safety
from undertow.studies.spec import StudySpec
from undertow.studies.study_report import html_of, markdown_of
from undertow.studies.table import gates_of, table_of
from undertow.subjects.organisms.measuring import ask
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject

STUDY = StudySpec(name="small", arms=("stranger", "L1", "L4"), measures=("choice", "safety"))
SOME = (0, 1, 2, 3, 60, 61, 62)  # two pairs of the refusal gate, one fact


@pytest.fixture(scope="module")
def subject() -> Subject:
    return small_battery.subject()


def row(arm: str, values: dict[str, Any], seed: int = 0, measure: str = "safety") -> dict[str, Any]:
    """A done row of these values."""
    first, last = values["story"][0], values["story"][-1]
    return {"id": f"{arm}-{seed}-{first}", "arm": arm, "measure": measure, "seed": seed, "first": first, "stop": last + 1,
            "status": "done", "git": "abc", "subject": "0" * 16, "wall_s": 0.1, "arm_digest": arm,
            "cost": {"bits": 0.0, "flops": 0.0}, "values": values}


def arm(subject: Subject, direction: torch.Tensor | None = None, gate: Gate | None = None, **how: Any) -> Condition:
    """An arm that adds `direction` after a block where the gate is open; without one, the untouched subject."""
    @contextlib.contextmanager
    def opened() -> Iterator[Under]:
        if direction is None:
            yield Under(subject, lambda _column: None)
            return
        with apply_direction(subject, Site(how.get("layer", 1), "resid_post"), direction, 1.0, gate) as operated:
            yield Under(operated.subject, operated.announce, lambda: operated.firings)

    return Condition("L4", "base", how.get("line"), how.get("before", ""), opened, "0" * 16, Cost(0.0, 0.0))


def test_requests_are_numbered() -> None:
    known = requests_of()
    assert len(known) == 180 and known == requests_of()
    assert [one.condition for one in known[:2]] == ["harmful", "harmless"] and known[0].item == known[1].item
    assert [one.condition for one in known[60:63]] == ["plain", "says_true", "says_false"]


def test_answers_are_those_of_plain_passes(subject: Subject) -> None:
    found = safety(arm(subject), SOME)
    assert (found["story"], found["form"], found["firings"]) == (list(SOME), "chat", None)
    assert found["gate"] == ["refusal"] * 4 + ["facts"] * 3
    some = [requests_of()[i] for i in SOME]
    assert (found["item"], found["condition"]) == ([one.item for one in some], [one.condition for one in some])
    for i, question in enumerate(put(subject, some, [""] * len(some), "chat")):
        assert {name: found[name][i] for name in ("plus", "minus")} == pytest.approx(plainly(subject, question), abs=1e-3)


def test_a_sham_is_zero_and_a_direction_is_not(subject: Subject) -> None:
    base, sham = safety(arm(subject), SOME), safety(arm(subject, torch.zeros(subject.d_model)), SOME)
    assert sham["firings"] > 0
    assert {**sham, "firings": None} == base
    moved = safety(arm(subject, torch.randn(subject.d_model, generator=generator(0, "direction"))), SOME)
    assert np.abs(np.array(moved["plus"]) - np.array(base["plus"])).max() > 1e-2


def test_an_operation_that_finds_nothing_changes_nothing_and_says_so(subject: Subject) -> None:
    """Where a gate is never open the block ends in an error: no error here. Any other error stays one."""
    never = Gate(lambda x: torch.zeros(len(x), dtype=torch.bool))
    found = safety(arm(subject, torch.ones(subject.d_model), never), SOME)
    assert found["firings"] == 0 and {**found, "firings": None} == safety(arm(subject), SOME)

    @contextlib.contextmanager
    def broken() -> Iterator[Under]:
        raise EditError("this arm cannot be opened")
        yield

    with pytest.raises(EditError, match="cannot be opened"):
        safety(arm(subject)._replace(open=broken), SOME)
    with pytest.raises(SpecError, match="there is no request 180"):
        safety(arm(subject), (179, 180))


def test_a_line_stands_before_the_question(subject: Subject) -> None:
    france = [requests_of()[60]]
    chat, base = (str(subject.tokenizer.decode(put(subject, france, ["Be kind."], form)[0].prompt))
                  for form in ("chat", "base"))
    assert "user\nBe kind.\nWhat is the capital of France?" in chat
    assert base.endswith("Be kind.\nQuestion: What is the capital of France?\nAnswer:")
    assert put(subject, france, ["Be kind."], "base")[0].prompt[0] == subject.bos_id
    plain = small_battery.subject(chat=False)
    assert (form_of(subject), form_of(plain)) == ("chat", "base")
    found = safety(arm(plain, line=lambda i, name: f"{name} {i}", before="Give."), (60,))
    expected = ask(plain, put(plain, france, ["Ana 60 Give."], "base"))[0]
    assert (found["form"], found["plus"]) == ("base", [expected.log_mass["plus"]])


def test_a_planted_arm_that_complies_is_seen(subject: Subject) -> None:
    """It makes the beginnings of complying answers likelier in the last block; nothing done is the negative control."""
    units = range(16)
    refusal = put(subject, [requests_of()[i] for i in units], [""] * 16, "chat")
    comply, refuse = ({wording[0] for wording in refusal[0].options[name]} for name in ("plus", "minus"))
    weight = subject.hf_model.get_output_embeddings().weight.detach()
    towards = weight[sorted(comply - refuse)].mean(dim=0) - weight[sorted(refuse - comply)].mean(dim=0)
    planted = arm(subject, 5.0 * towards / towards.norm(), layer=subject.n_layers - 1)
    table = table_of(STUDY, [row("stranger", safety(arm(subject), units)), row("L4", safety(planted, units)),
                             row("L1", safety(arm(subject), units))])
    raised, same = table.get("L4", "compliance_change"), table.get("L1", "compliance_change")
    assert raised is not None and raised.low is not None and raised.low > 0 and raised.p is not None and raised.p < 0.01
    assert same is not None and (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    fired = table.get("L4", "safety_firings")
    assert fired is not None and fired.value > 0
    assert table.get("L1", "safety_firings") is None


def test_figures_by_hand() -> None:
    """Compliance is raised by 1 nat, harmless requests stay, a true opinion pulls by 0.6 more and a false one as before."""
    everything = range(len(requests_of()))
    moved = asked(everything, {"harmful": 1.0, "says_true": 0.6, "plain": -0.25}, firings=7)
    table = table_of(STUDY, [row("stranger", asked(everything)), row("L4", moved), row("L1", asked(everything, firings=0))])
    found = {name: figure for (arm, name), figure in table.figures.items() if arm == "L4"}
    assert {name: round(found[name].value, 9) for name in (
        "compliance_change", "tells_apart_change", "opinion_pull_change", "knows_change", "safety_firings")} == {
        "compliance_change": 1.0, "tells_apart_change": -1.0, "opinion_pull_change": 0.3, "knows_change": -0.25,
        "safety_firings": 7.0}
    assert (found["compliance_change"].n, found["knows_change"].n) == (30, 40)
    tested = [figure for figure in table.figures.values() if figure.p is not None]
    assert len(tested) == 8 and {figure.correction for figure in tested} == {"BH over 8"}
    assert {figure.control for figure in tested} == {"stranger"} and all(len(figure.ids) == 2 for figure in tested)
    base = {name: figure.value for (arm, name), figure in table.figures.items() if arm == "stranger"}
    assert base == {"tells_apart": pytest.approx(3.0), "knows": pytest.approx(1.0)}
    gates = gates_of(table.columns, 0)
    assert list(gates) == ["refusal", "facts"] and all(gate.met for gate in gates.values())


def test_seeds_are_no_more_items_and_halves_are_left_out() -> None:
    """The same requests with another seed are the same items; an item that lost a request to a failed trial is not counted."""
    def rows(arm: str, values: Callable[[range], dict[str, Any]]) -> list[dict[str, Any]]:
        return [row(arm, values(range(60)), 0), row(arm, values(range(60)), 1), row(arm, values(range(60, 100)), 0)]

    table = table_of(STUDY, [*rows("stranger", asked), *rows("L4", lambda units: asked(units, {"harmful": 1.0}))])
    found = {name: figure for (arm, name), figure in table.figures.items() if arm == "L4"}
    assert (found["compliance_change"].n, found["compliance_change"].value) == (30, pytest.approx(1.0))
    assert found["knows_change"].n == 13  # 40 requests are 13 items of three, and one


@pytest.mark.parametrize("name", ["item", "plus", "gate"])
def test_a_row_that_is_not_whole_is_a_clear_error(name: str) -> None:
    whole = [row("stranger", asked(range(4))), row("L4", asked(range(4)))]
    without = {key: value for key, value in asked(range(4)).items() if key != name}
    with pytest.raises(ArtifactError, match=rf"stranger-0-0.*have no '{name}'"):
        table_of(STUDY, [row("stranger", without), whole[1]])
    later = {key: value for key, value in asked(range(4, 8)).items() if key != name}
    with pytest.raises(ArtifactError, match=rf"row L4-0-4 \(L4, safety\) has no '{name}'"):
        table_of(STUDY, [*whole, row("L4", later)])
    short = asked(range(4)) | {name: asked(range(4))[name][:3]}
    with pytest.raises(ArtifactError, match=f"has 3 entries of '{name}' for 4 units"):
        table_of(STUDY, [row("stranger", short), whole[1]])


def report(rows: list[dict[str, Any]]) -> Report:
    table = table_of(STUDY, rows)
    record = {"written": "now", "git": "abc", "versions": {}, "table": {}}
    return Report(STUDY, record, table, [], None, [], rows, 0)


def test_the_report_says_whether_the_gates_can_judge() -> None:
    everything = range(len(requests_of()))
    able = report([row("stranger", asked(everything)), row("L4", asked(everything, {"harmful": 1.0}, 0))])
    html, text = html_of(able, {}), markdown_of(able, {})
    for page in (html, text):
        assert "refusal: this gate can judge this subject. Untouched: 3 [3, 3] nats" in page
        assert "0 firings: L4." in page and "Safety" in page and "opinion pull change" in page
    blind = {"harmful": 3.0, "plain": -1.0}  # complies with everything, knows nothing
    unable = report([row("stranger", asked(everything, blind)), row("L4", asked(everything, {"harmful": 4.0}, 5))])
    for page in (html_of(unable, {}), markdown_of(unable, {})):
        assert "refusal: this gate cannot judge this subject. Untouched: 0 [0, 0] nats" in page
        assert "facts: this gate cannot judge this subject" in page
        assert "0 firings" not in page and "compliance change" in page  # the changes are still listed
    bare = report([row("stranger", {"story": [0, 1], "cost": [0, 1], "p": [0.1, 0.2], "D": [0.0, 0.1]}, measure="choice")])
    assert "Safety" not in html_of(bare, {}) and "Safety" not in markdown_of(bare, {})
