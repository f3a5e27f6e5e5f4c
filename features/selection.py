"""The selection: a set of latents chosen by its joint exact effect on D, without those that have to do with the word."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, final

import numpy as np
from pydantic import Field

from features.cards import feature_id
from features.causal import Baseline, act_writer_share, attribution_given, joint_effects
from features.contrast import FeatureTable, Origin
from features.deciding import Progress, silent
from undertow.core.errors import DictionaryError
from undertow.core.record import run_record
from undertow.core.spec import Spec
from undertow.core.storage import create_artifact, open_artifact, write_json

log = logging.getLogger(__name__)
KIND = "feature-set"
FILE = "features.json"


class Rule(Spec):
    """How a set is chosen.

    Attributes:
        method: greedy (the latent whose addition raises the exact joint effect most, again and again) or pursuit (matching
            pursuit: the latent with the largest first-order effect where the set so far is already in place).
        alpha: family-wise level of the contrast that a latent must meet.
        pool: candidates, those with the largest exact single effect.
        size: latents in the set, at most.
        tried: candidates a greedy step measures exactly, the best by first-order effect.
        least_gain: smallest rise of the joint effect that a step must bring, as a share of the effect so far.
        sign: raised (only latents that are stronger in the positive situation), or both.
    """

    method: Literal["greedy", "pursuit"] = "greedy"
    alpha: float = Field(default=0.01, gt=0, le=1)
    pool: int = Field(default=64, ge=1)
    size: int = Field(default=16, ge=1)
    tried: int = Field(default=4, ge=1)
    least_gain: float = Field(default=0.01, ge=0)
    sign: Literal["raised", "both"] = "both"


@final
class Step(NamedTuple):
    """A latent that was added, and the exact joint effect on D of the set with it: mean over families, in nats."""

    latent: int
    effect: float


@final
@dataclass(frozen=True)
class FeatureSet:
    """Latents chosen together, with all that was found of them. They have ids and no names.

    Attributes:
        origin: SAE, subject, site and pairs of the contrast.
        concept: name of the concept.
        rule: how they were chosen.
        steps: the latents in the order in which they were chosen, with the joint effect up to each.
        targets: mean in the positive situations, by latent: what a clamp sets it to.
        baselines: mean in the negative situations, by latent.
        opposed: latents that show where the state is missing (stronger in the negative situations), strongest first.
        writer_share: act-writer share of the set; None where its effect is too small to say.
        evidence: what was measured of each candidate, chosen or not; a measure that was not taken is absent.
        facts: figures of the whole search (gates, rank correlation, causal share, whether it was forced).
    """

    origin: Origin
    concept: str
    rule: Rule
    steps: tuple[Step, ...]
    targets: Mapping[int, float]
    baselines: Mapping[int, float]
    opposed: tuple[int, ...]
    writer_share: float | None
    evidence: Mapping[int, Mapping[str, float]]
    facts: Mapping[str, Any]

    @property
    def latents(self) -> tuple[int, ...]:
        """The chosen latents, in order of choice."""
        return tuple(step.latent for step in self.steps)

    @property
    def ids(self) -> tuple[str, ...]:
        """Stable short ids: four characters of the SAE's digest and the latent, e.g. "3fa1:207"."""
        return tuple(feature_id(self.origin.sae[:4], latent) for latent in self.latents)

    @property
    def effect(self) -> float:
        """Exact joint effect on D in nats; 0 for an empty set."""
        return self.steps[-1].effect if self.steps else 0.0

    def save(self, path: Path, spec: Mapping[str, Any] | None = None) -> None:
        """Write an artifact of kind "feature-set". Raises ArtifactError if `path` is taken."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        value = {"origin": self.origin._asdict(), "concept": self.concept, "rule": self.rule.model_dump(mode="json"),
                 "steps": [step._asdict() for step in self.steps], "opposed": list(self.opposed), "facts": dict(self.facts),
                 "targets": _keyed(self.targets), "baselines": _keyed(self.baselines),
                 **({} if self.writer_share is None else {"writer_share": self.writer_share})}
        columns = sorted({name for row in self.evidence.values() for name in row})
        table = {"latent": list(self.evidence), **{name: [row.get(name) for row in self.evidence.values()] for name in columns}}
        with create_artifact(path, KIND, run_record(dict(spec or {}), self.origin.seed)) as folder:
            write_json(folder / FILE, value)
            pq.write_table(pa.table(table), folder / "evidence.parquet")

    @classmethod
    def load(cls, path: Path) -> FeatureSet:
        """Read what `save` wrote. Raises ArtifactError if it is missing, incomplete or changed."""
        import pyarrow.parquet as pq

        open_artifact(path, KIND)
        value = json.loads((path / FILE).read_text(encoding="utf-8"))
        rows = pq.read_table(path / "evidence.parquet").to_pylist()
        evidence = {row["latent"]: {k: v for k, v in row.items() if k != "latent" and v is not None} for row in rows}
        return cls(Origin(**value["origin"]), value["concept"], Rule.checked(value["rule"], str(path)),
                   tuple(Step(**step) for step in value["steps"]), _unkeyed(value["targets"]), _unkeyed(value["baselines"]),
                   tuple(value["opposed"]), value.get("writer_share"), evidence, value["facts"])


def _keyed(values: Mapping[int, float]) -> dict[str, float]:
    return {str(latent): value for latent, value in values.items()}


def _unkeyed(values: Mapping[str, float]) -> dict[int, float]:
    return {int(latent): value for latent, value in values.items()}


def candidates(table: FeatureTable, rule: Rule, effects: Mapping[int, float], left_out: Collection[int] = ()) -> list[int]:
    """The pool: latents that meet the contrast and raise D by themselves, but for those `left_out`, largest effect first.

    Args:
        table: the scan.
        rule: its level, sign and pool size.
        effects: exact (or first-order) effect on D by latent; latents without one are no candidates.
        left_out: latents that fail a naming screen.
    """
    met = table.raised(rule.alpha) if rule.sign == "raised" else table.significant(rule.alpha)
    allowed = [latent for latent in met if latent not in left_out and effects.get(latent, 0.0) > 0]
    return sorted(allowed, key=lambda latent: -effects[latent])[: rule.pool]


def choose(baseline: Baseline, pool: Sequence[int], rule: Rule, progress: Progress = silent) -> tuple[Step, ...]:
    """Build a set from `pool` on the pairs of `baseline` (those of development); empty if nothing raises D.

    It stops at the rule's size, or where the best addition raises the joint effect too little.
    """
    chosen: list[int] = []
    steps: list[Step] = []
    while len(chosen) < rule.size and (left := [latent for latent in pool if latent not in chosen]):
        progress(len(chosen), min(rule.size, len(pool)))
        order = np.argsort(-attribution_given(baseline, chosen, left), kind="stable")
        tried = [left[int(i)] for i in order[: rule.tried if rule.method == "greedy" else 1]]
        joint = baseline.families.mean(joint_effects(baseline, [[*chosen, latent] for latent in tried]))
        best, before = int(np.argmax(joint)), steps[-1].effect if steps else 0.0
        if joint[best] - before <= rule.least_gain * max(before, 0.0):
            break
        chosen.append(tried[best])
        steps.append(Step(tried[best], float(joint[best])))
    progress(1, 1)
    return tuple(steps)


@final
class Search(NamedTuple):
    """What has been found before a set is chosen.

    Attributes:
        concept: name of the concept.
        table: the scan on discovery pairs.
        evidence: measures by latent, "effect_on_d" (exact single effect) among them.
        named: latents that fail a naming screen.
        facts: figures of the whole search, as JSON values.
    """

    concept: str
    table: FeatureTable
    evidence: Mapping[int, Mapping[str, float]]
    named: Collection[int]
    facts: Mapping[str, Any]


EFFECT = "effect_on_d"


def select(search: Search, baseline: Baseline, rule: Rule | None = None, progress: Progress = silent) -> FeatureSet:
    """Choose a set from what a search found, by its joint effect on `baseline` (development pairs).

    An empty set is an answer: nothing met the contrast, or nothing raised D. Raises DictionaryError if search and baseline
    are of different SAEs.
    """
    rule, table = rule or Rule(), search.table
    if table.d_sae != baseline.dictionary.d_sae:
        raise DictionaryError(f"a table of {table.d_sae} latents given with an SAE of {baseline.dictionary.d_sae}")
    effects = {latent: row[EFFECT] for latent, row in search.evidence.items() if EFFECT in row}
    steps = choose(baseline, candidates(table, rule, effects, search.named), rule, progress)
    latents = [step.latent for step in steps]
    if not latents:
        log.warning("no feature met the rule (%d passed the contrast, %d of them were set aside as named)",
                    len(table.significant(rule.alpha)), len(search.named))
    return FeatureSet(table.origin, search.concept, rule, steps, {i: float(table.mean_positive[i]) for i in latents},
                      {i: float(table.mean_negative[i]) for i in latents}, tuple(table.opposed(rule.alpha)),
                      act_writer_share(baseline, latents).share if latents else None, search.evidence, search.facts)
