"""The verdict, row by row, and that no later row overrides an earlier one."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from interventions.verdict import NEEDED_ARMS, ROWS, Evidence, Interval, verdict
from undertow.core.errors import NumericsError

GOOD = Evidence(
    arms=frozenset({*NEEDED_ARMS, "stranger", "bonded", "L4"}), sham_change=0.0, competent=True, lexical_hazard_ratio=7.5,
    effect=Interval(0.8, 0.7, 0.9), random_effects=tuple(0.004 * i for i in range(20)), hazard_ratio_upper=1.1, word_docs=0,
    kl_mean=0.004, kl_p99=0.02, nameability={"L4": 0.03, "sham": 0.02, "L2": 0.6, "lexical": 0.4}, unsaid_ratio=0.9)
BITS = {"L4": 0.0, "sham": 0.0, "L2": 0.5, "lexical": 0.5}
ROW_1: list[tuple[dict[str, Any], str]] = [
    *[({"arms": GOOD.arms - {arm}}, f"the {arm} arm is missing") for arm in NEEDED_ARMS],
    ({"sham_change": 1e-9}, "sham arm changes a measure by 1e-09"), ({"sham_change": -1e-9}, "not by exactly 0"),
    ({"sham_change": None}, "sham_change was not measured"), ({"competent": False}, "fails the competence gate"),
    ({"competent": None}, "competence gate was not run"),
    ({"random_effects": GOOD.random_effects[:19]}, "only 19 matched random sets"),
    ({"effect": None}, "effect was not measured"),
    ({"lexical_hazard_ratio": None}, "lexical_hazard_ratio was not measured"),
    *[({name: None}, f"{name} was not measured") for name in ("hazard_ratio_upper", "word_docs", "kl_mean", "kl_p99")],
    ({"nameability": {"L4": 0.0, "L2": 1.0}}, "not for sham"), ({"nameability": {"sham": 0.0, "L2": 1.0}}, "not for L4"),
    ({"nameability": {"L4": 0.0, "sham": 0.0}}, "none of L2 and lexical")]
ROW_2: list[tuple[dict[str, Any], str]] = [
    ({"lexical_hazard_ratio": 2.99}, "multiplies hazard by 2.99"), ({"lexical_hazard_ratio": 0.0}, "multiplies hazard by 0,"),
    ({"nameability": BITS | {"L2": 0.04}}, "L2 is not nameable (0.04 bits, sham 0)"),
    ({"nameability": BITS | {"lexical": 0.0}}, "lexical is not nameable")]
ROW_3: list[tuple[dict[str, Any], str]] = [
    ({"effect": Interval(0.8, -0.01, 1.6)}, "0.8 [-0.01, 1.6], an interval that includes 0"),
    ({"effect": Interval(0.8, 0.0, 1.6)}, "includes 0"), ({"effect": Interval(-0.5, -0.6, -0.4)}, "which is below 0"),
    ({"random_effects": (0.0,) * 20 + (0.8,)}, "largest of 21 matched random sets, 0.8")]
ROW_4: list[tuple[dict[str, Any], str]] = [
    ({"hazard_ratio_upper": 1.2501}, "hazard ratio, 1.25 is above 1.25"), ({"hazard_ratio_upper": math.inf}, "inf is above"),
    ({"word_docs": 1}, "the word stands in 1 documents"),
    ({"word_docs": 7, "word_docs_base": 1, "sampled": 400}, "the word stands in 7 of 400 documents (1 of the untouched"),
    ({"lexical_pairs": True}, "the pairs that it was found by are told apart by their words alone"),
    ({"word_docs_guarded": 1}, "the word stands in 1 documents that were sampled with the guard on"),
    ({"kl_mean": 0.0101}, "KL mean 0.0101 is above 0.01"),
    ({"kl_p99": 0.11}, "KL p99 0.11 is above 0.1"), ({"nameability": BITS | {"L4": 0.06}}, "L4 is nameable"),
    ({"unsaid_ratio": 0.49}, "unsaid ratio 0.49 is below 0.5")]
ROWS_OF_TESTS = (ROW_1, ROW_2, ROW_3, ROW_4)
CASES = [(row, changes, reason) for row, cases in enumerate(ROWS_OF_TESTS, start=1) for changes, reason in cases]


@pytest.mark.parametrize(("row", "changes", "reason"), CASES)
def test_row(row: int, changes: dict[str, Any], reason: str) -> None:
    found = verdict(replace(GOOD, **changes))
    assert (found.row, found.verdict) == (row, ROWS[row - 1][1])
    assert reason in found.reason


def test_otherwise_unsaid_with_every_figure() -> None:
    found = verdict(GOOD)
    assert (found.verdict, found.row) == ("unsaid", 5)
    for figure in ("0.8 [0.7, 0.9]", "20 random sets 0.076", "at most 1.1", "7.5", "KL mean 0.004, p99 0.02",
                   "0.03 bits, sham 0.02", "unsaid ratio 0.9"):
        assert figure in found.reason


@pytest.mark.parametrize("changes", [
    {"hazard_ratio_upper": 1.25}, {"kl_mean": 0.01}, {"kl_p99": 0.1}, {"unsaid_ratio": 0.5}, {"lexical_hazard_ratio": 3.0},
    {"nameability": None, "unsaid_ratio": None}, {"nameability": {"L4": 0.0, "sham": 0.0, "L2": 0.5}}])
def test_a_figure_at_its_limit_passes_and_optional_measures_may_be_absent(changes: dict[str, Any]) -> None:
    assert verdict(replace(GOOD, **changes)).verdict == "unsaid"


def test_all_findings_of_the_deciding_row_are_told() -> None:
    found = verdict(replace(GOOD, word_docs=3, kl_mean=0.5, hazard_ratio_upper=9.0))
    assert found.reason == ("the upper bound of the hazard ratio, 9 is above 1.25; KL mean 0.5 is above 0.01; "
                            "the word stands in 3 documents")


@given(st.lists(st.sampled_from(CASES), min_size=1, max_size=8))
def test_no_later_row_overrides_an_earlier_one(chosen: list[tuple[int, dict[str, Any], str]]) -> None:
    """Whatever else is wrong, the earliest row that holds decides. Changes of one field do not overwrite each other."""
    changes: dict[str, Any] = {}
    rows = []
    for row, change, _ in chosen:
        if not changes.keys() & change.keys():
            changes |= change
            rows.append(row)
    assert verdict(replace(GOOD, **changes)).row == min(rows)


UNIT = st.none() | st.floats(0, 1)
SOME = st.fixed_dictionaries({
    "arms": st.frozensets(st.sampled_from([*NEEDED_ARMS, "L4"])), "sham_change": st.none() | st.just(0.0) | st.floats(0, 1),
    "competent": st.none() | st.booleans(), "lexical_hazard_ratio": st.none() | st.floats(0, 9),
    "effect": st.none() | st.tuples(*[st.floats(-1, 1)] * 3), "hazard_ratio_upper": st.none() | st.floats(0, 2),
    "random_effects": st.none() | st.floats(-1, 1), "word_docs": st.none() | st.integers(0, 2), "kl_mean": UNIT, "kl_p99": UNIT,
    "unsaid_ratio": UNIT, "nameability": st.none() | st.dictionaries(st.sampled_from([*BITS]), st.floats(0, 1))})


@given(SOME, st.sets(st.sampled_from([field.name for field in fields(Evidence)])))
def test_every_evidence_has_a_verdict_and_unsaid_is_earned(some: dict[str, Any], good: set[str]) -> None:
    effect, largest = some["effect"], some["random_effects"]
    some |= {"effect": effect and Interval(*effect), "random_effects": () if largest is None else (0.0,) * 20 + (largest,)}
    evidence = replace(GOOD, **{name: value for name, value in some.items() if name not in good})
    found = verdict(evidence)
    assert found.verdict == ROWS[found.row - 1][1] and found.reason
    if found.verdict == "unsaid":
        assert evidence.sham_change == 0 and evidence.competent and not evidence.word_docs
        assert evidence.effect is not None and evidence.effect.value > max(evidence.random_effects)


def test_nothing_measured_is_inconclusive() -> None:
    found = verdict(Evidence(arms=frozenset()))
    assert found.row == 1 and found.reason.count("missing") == len(NEEDED_ARMS)


@pytest.mark.parametrize("changes", [{"kl_mean": math.nan}, {"effect": Interval(0.5, math.nan, 1.0)},
                                     {"random_effects": (math.nan,) * 20}, {"nameability": BITS | {"L4": math.nan}}])
def test_nan_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(NumericsError, match=f"{next(iter(changes))} = .*NaN"):
        replace(GOOD, **changes)


def test_a_word_that_the_untouched_subject_says_as_often_is_no_finding() -> None:
    """Fisher's exact test by hand: 5 against 0 of 400 has p = 0.031, 4 against 0 has 0.062. Without a base any counts."""
    from math import comb

    def p(said: int, base: int, n: int) -> float:
        total = comb(2 * n, said + base)
        return sum(comb(n, k) * comb(n, said + base - k) for k in range(said, said + base + 1)) / total

    assert p(4, 0, 400) > 0.05 > p(5, 0, 400)
    for said, base in ((4, 0), (5, 0), (1, 1), (4, 3), (9, 1)):
        found = verdict(replace(GOOD, word_docs=said, word_docs_base=base, sampled=400, word_docs_guarded=0)).verdict
        assert found == ("said" if p(said, base, 400) < 0.05 else "unsaid")
    assert verdict(replace(GOOD, word_docs=1)).verdict == "said"
    reason = verdict(replace(GOOD, word_docs=1, word_docs_base=1, sampled=400, word_docs_guarded=0)).reason
    assert "the word in 1 of 400 documents (1 of the untouched subject), in none with the guard on" in reason
