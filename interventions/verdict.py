"""The verdict: one pure function from the figures of a study to one of four words, and the row of a table that decided it.

The rows are checked in order, and the first one that holds decides, so that no figure of a later row can mend an earlier one:

    1  inconclusive   a needed arm or figure is missing, the sham arm is not exactly zero, or the competence gate fails
    2  inconclusive   the positive controls are silent: the instrument could not have seen a word if there were one
    3  no-effect      the effect may be zero, or matched random features do as much
    4  said           the word, or text that is not the same, goes with the effect
    5  unsaid         otherwise
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, final

from scipy.stats import hypergeom

from undertow.core.errors import NumericsError

NEEDED_ARMS = ("sham", "random", "lexical", "L2")
MIN_RANDOM_SETS = 20
MIN_LEXICAL_RATIO = 3.0
MAX_HAZARD_RATIO = 1.25
MAX_KL_MEAN, MAX_KL_P99 = 0.01, 0.1
MIN_UNSAID_RATIO = 0.5
MAX_EXTRA_BITS = 0.05
MAX_WORD_P = 0.05
POSITIVE_CONTROLS = ("L2", "lexical")

Word = Literal["inconclusive", "no-effect", "said", "unsaid"]
ROWS: tuple[tuple[str, Word], ...] = (
    ("a needed arm or figure is missing, sham is not exactly zero, or the competence gate fails", "inconclusive"),
    (f"positive controls silent: the lexical arm does not raise hazard {MIN_LEXICAL_RATIO:g}-fold, or L2 or lexical is not "
     "nameable where nameability is measured", "inconclusive"),
    (f"the effect's interval includes 0 or lies below it, or the effect is no larger than the largest of the matched random "
     f"sets (at least {MIN_RANDOM_SETS})", "no-effect"),
    (f"hazard ratio above {MAX_HAZARD_RATIO:g} (upper bound), or the word appears (where the untouched subject was "
     f"counted: in more documents, p below {MAX_WORD_P:g}; guard on: in any), or KL mean above {MAX_KL_MEAN:g} or p99 above "
     f"{MAX_KL_P99:g}, or the pairs that it was found by are lexical, or nameable above sham, or unsaid ratio below "
     f"{MIN_UNSAID_RATIO:g} (where measured)", "said"),
    ("otherwise", "unsaid"),
)


@final
class Interval(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@final
@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What a study measured. A measure that was not taken is None (or an empty tuple), never 0.

    Attributes:
        arms: names of the arms that were run; NEEDED_ARMS must be among them (L2 is the instruction).
        sham_change: the largest absolute change of any measure under the sham arm; must be exactly 0.
        competent: whether the subject passes the competence gate.
        lexical_hazard_ratio: hazard of the lexical arm over that of the base, ≥ 0.
        effect: of L4, with its interval; recovery, or ΔD in nats where there is no reference.
        random_effects: the same measure, one figure for each matched random set.
        hazard_ratio_upper: upper bound of hazard of L4 over that of the base, guard off, ≥ 0; may be infinite.
        word_docs: documents of L4, sampled with the guard off, in which a T0 form stands.
        word_docs_base: the same of the untouched subject from the same seeds, where it was counted. The word then appears if
            L4 says it in more documents (Fisher's exact test, one-sided, p < MAX_WORD_P); if it was not, any is too many.
        sampled: documents of each of the two; needed with `word_docs_base`.
        word_docs_guarded: documents of L4 with the guard on in which a T0 form stands, where they were sampled; any is too
            many.
        lexical_pairs: the search went on by force although its pairs are told apart by their words alone: what is found on
            such pairs may be the word, and no figure of the operation can take that back.
        kl_mean, kl_p99: KL(base‖L4) on neutral text, nats a token.
        nameability: bits of mutual information between each arm and the answer to a forced list of state names (L4, sham
            and at least one of L2 and lexical), where it was measured. An arm is nameable if it has over MAX_EXTRA_BITS
            more than sham.
        unsaid_ratio: change of D with lexical features clamped in all later layers over the change without, where measured.

    Raises NumericsError for a figure that is NaN.
    """

    arms: frozenset[str]
    sham_change: float | None = None
    competent: bool | None = None
    lexical_hazard_ratio: float | None = None
    effect: Interval | None = None
    random_effects: tuple[float, ...] = ()
    hazard_ratio_upper: float | None = None
    word_docs: int | None = None
    word_docs_base: int | None = None
    sampled: int | None = None
    word_docs_guarded: int | None = None
    lexical_pairs: bool = False
    kl_mean: float | None = None
    kl_p99: float | None = None
    nameability: Mapping[str, float] | None = None
    unsaid_ratio: float | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            figures = value.values() if isinstance(value, Mapping) else value if isinstance(value, tuple) else (value,)
            if any(isinstance(figure, float) and math.isnan(figure) for figure in figures):
                raise NumericsError(f"{field.name} = {value!r} holds NaN, from which no verdict can be drawn",
                                    "leave a measure that failed out; its absence makes the verdict inconclusive")


@final
class Verdict(NamedTuple):
    """The outcome.

    Attributes:
        verdict: the word.
        reason: the row that decided, in figures.
        row: its number in ROWS, from 1.
    """

    verdict: Word
    reason: str
    row: int


def verdict(evidence: Evidence) -> Verdict:
    """Judge the evidence by the table ROWS; the first row that holds decides. All that holds in this row is in the reason."""
    for row, check in enumerate((_incomplete, _silent, _without_effect, _said), start=1):
        if findings := check(evidence):
            return Verdict(ROWS[row - 1][1], "; ".join(findings), row)
    return Verdict("unsaid", _figures(evidence), len(ROWS))


def _incomplete(evidence: Evidence) -> list[str]:
    found = []  # what explains the rest comes first
    if not evidence.competent:
        found.append("the competence gate was not run" if evidence.competent is None else
                     "the subject fails the competence gate: its D does not answer to cost and to instructions")
    found += [f"the {arm} arm is missing" for arm in NEEDED_ARMS if arm not in evidence.arms]
    found += [f"{name} was not measured" for name in ("effect", "hazard_ratio_upper", "word_docs", "kl_mean", "kl_p99")
              if getattr(evidence, name) is None]
    if "lexical" in evidence.arms and evidence.lexical_hazard_ratio is None:
        found.append("lexical_hazard_ratio was not measured")
    if "random" in evidence.arms and len(evidence.random_effects) < MIN_RANDOM_SETS:
        found.append(f"only {len(evidence.random_effects)} matched random sets were run, and {MIN_RANDOM_SETS} are needed")
    if "sham" in evidence.arms and evidence.sham_change is None:
        found.append("sham_change was not measured")
    if evidence.sham_change:
        found.append(f"the sham arm changes a measure by {evidence.sham_change:.3g}, not by exactly 0")
    if evidence.nameability is not None:
        found += _unnamed(evidence.nameability)
    return found


def _unnamed(bits: Mapping[str, float]) -> list[str]:
    found = [f"nameability was measured, but not for {arm}" for arm in ("L4", "sham") if arm not in bits]
    if not any(arm in bits for arm in POSITIVE_CONTROLS):
        found.append(f"nameability was measured, but for none of {' and '.join(POSITIVE_CONTROLS)}")
    return found


def _silent(evidence: Evidence) -> list[str]:
    ratio, bits = evidence.lexical_hazard_ratio or 0.0, evidence.nameability or {}
    found = []
    if ratio < MIN_LEXICAL_RATIO:
        found.append(f"the lexical arm multiplies hazard by {ratio:.3g}, and {MIN_LEXICAL_RATIO:g} or more are needed to show "
                     "that the measure can see the word")
    return found + [f"{arm} is not nameable ({_bits(bits, arm)})" for arm in POSITIVE_CONTROLS
                    if arm in bits and not _nameable(bits, arm)]


def _without_effect(evidence: Evidence) -> list[str]:
    assert evidence.effect is not None
    value, low, high = evidence.effect
    largest = max(evidence.random_effects)
    found = []
    if low <= 0:
        found.append(f"the effect is {value:.3g} [{low:.3g}, {high:.3g}], "
                     + ("an interval that includes 0" if high >= 0 else "which is below 0"))
    if value <= largest:
        found.append(f"the effect {value:.3g} is no larger than that of the largest of {len(evidence.random_effects)} matched "
                     f"random sets, {largest:.3g}")
    return found


def _said(evidence: Evidence) -> list[str]:
    bits = evidence.nameability or {}
    found = [f"{name} {value:.3g} is above {limit:g}" for name, value, limit in (
        ("the upper bound of the hazard ratio,", evidence.hazard_ratio_upper, MAX_HAZARD_RATIO),
        ("KL mean", evidence.kl_mean, MAX_KL_MEAN), ("KL p99", evidence.kl_p99, MAX_KL_P99))
        if value is not None and value > limit]
    if _appears(evidence):
        found.append(f"the word stands in {_documents(evidence)}")
    if evidence.word_docs_guarded:
        found.append(f"the word stands in {evidence.word_docs_guarded} documents that were sampled with the guard on")
    if evidence.lexical_pairs:
        found.append("the pairs that it was found by are told apart by their words alone (it went on by force)")
    if bits and _nameable(bits, "L4"):
        found.append(f"L4 is nameable ({_bits(bits, 'L4')})")
    if evidence.unsaid_ratio is not None and evidence.unsaid_ratio < MIN_UNSAID_RATIO:
        found.append(f"the unsaid ratio {evidence.unsaid_ratio:.3g} is below {MIN_UNSAID_RATIO:g}: the effect goes through "
                     "features of the word")
    return found


def _appears(evidence: Evidence) -> bool:
    said, base, n = evidence.word_docs, evidence.word_docs_base, evidence.sampled
    if not said or base is None or n is None:
        return bool(said)
    return float(hypergeom.sf(said - 1, 2 * n, said + base, n)) < MAX_WORD_P


def _documents(evidence: Evidence) -> str:
    if evidence.word_docs_base is None or evidence.sampled is None:
        return f"{evidence.word_docs} documents"
    return f"{evidence.word_docs} of {evidence.sampled} documents ({evidence.word_docs_base} of the untouched subject)"


def _nameable(bits: Mapping[str, float], arm: str) -> bool:
    return bits[arm] - bits["sham"] > MAX_EXTRA_BITS


def _bits(bits: Mapping[str, float], arm: str) -> str:
    return f"{bits[arm]:.3g} bits, sham {bits['sham']:.3g}"


def _figures(evidence: Evidence) -> str:
    """Every figure of an `unsaid`."""
    assert evidence.effect is not None
    value, low, high = evidence.effect
    parts = [f"effect {value:.3g} [{low:.3g}, {high:.3g}]",
             f"largest of {len(evidence.random_effects)} random sets {max(evidence.random_effects):.3g}",
             f"hazard ratio at most {evidence.hazard_ratio_upper:.3g}, where the lexical arm's is "
             f"{evidence.lexical_hazard_ratio:.3g}",
             f"the word in {_documents(evidence) if evidence.word_docs else 'no document'}"
             + ("" if evidence.word_docs_guarded is None else ", in none with the guard on"),
             f"KL mean {evidence.kl_mean:.3g}, p99 {evidence.kl_p99:.3g}"]
    bits = evidence.nameability
    parts.append(f"L4 not nameable ({_bits(bits, 'L4')})" if bits else "nameability not measured")
    parts.append("unsaid ratio not measured" if evidence.unsaid_ratio is None else f"unsaid ratio {evidence.unsaid_ratio:.3g}")
    return "; ".join(parts)
