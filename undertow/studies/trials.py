"""The trials of a study, known before anything runs: arms × measures × seeds, in chunks, each with a key of its content.

A trial's key is a digest of all the settings that its figures depend on and of no others, so that a run which is broken off
goes on where it stood, and no trial is done twice. Pure functions of the spec and of its battery: no model is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, final

from undertow.core.spec import digest_json
from undertow.studies.battery_units import battery_of, measured
from undertow.studies.spec import MEASURES, NUMBERED, StudySpec

SCHEMA = 1  # goes up when a measure changes its meaning, so that old rows are not taken for new ones
PROMPTED = ("L1", "L2", "L2-not")
TRAINED = ("L3", "L3-acts")
UNTOUCHED = ("stranger", "bonded", "giver", "keeper", *PROMPTED)  # the subject's own weights and nothing done to them
_FEWER: dict[str, tuple[str, ...]] = {  # arms that not every measure fits; all others have all measures but `unsaid`
    "stranger": ("choice", "twin", "words", "sample", "naming", "safety"),  # it is the same as itself
    "bonded": ("choice", "sample", "naming"),
    "giver": ("choice",),
    "keeper": ("choice",),
    "random": ("choice",),
    "L4-before": ("choice", "twin", "sample", "naming", "spread", "safety"),  # other text has no decision
    "L4": tuple(MEASURES),
    "lexical": tuple(MEASURES),
}
_WHOLE = ("spread", "safety")  # in one trial, whatever the chunk
_USUAL = tuple(measure for measure in MEASURES if measure != "unsaid")


@final
class Trial(NamedTuple):
    """One arm, one measure, one stretch of stories (texts, sets, requests), one seed.

    Attributes:
        key: 16 hex characters over all that the figures depend on; the id of its row.
        arm: what is done to the subject.
        measure: what is looked at.
        seed: of everything.
        first, stop: which stories, texts or sets: first ≤ i < stop.
    """

    key: str
    arm: str
    measure: str
    seed: int
    first: int
    stop: int

    @property
    def n(self) -> int:
        """Stories, texts or sets."""
        return self.stop - self.first


def needs_search(arm: str) -> bool:
    """Whether an arm is made from what a search in an SAE has found."""
    return arm not in UNTOUCHED and arm not in TRAINED


def measures_of(arm: str) -> tuple[str, ...]:
    """The measures that an arm has, where a study asks for them."""
    return _FEWER.get(arm, _USUAL)


def arms_of(spec: StudySpec) -> list[str]:
    """The arms of a study with every `*` written out: one for each feature that the search may choose."""
    found: list[str] = []
    for arm in spec.arms:
        kind, _, which = arm.partition(":")
        found += [f"{kind}:{place}" for place in range(spec.size.features)] if kind in NUMBERED and which == "*" else [arm]
    return list(dict.fromkeys(found))


def trials_of(spec: StudySpec) -> list[Trial]:
    """All trials of a study, in the order in which they are run: seed by seed, arm by arm."""
    return [trial for seed in spec.seeds for arm in arms_of(spec) for measure in spec.measures
            if measure in measures_of(arm) for trial in _chunks(spec, arm, measure, seed)]


def units(spec: StudySpec, arm: str, measure: str) -> int:
    """How many stories, texts, sets or requests a measure of an arm takes; of a battery no more than it has families."""
    size = spec.size
    if arm == "random":
        return size.sets
    if measure == "safety":
        from undertow.studies.safety import requests_of  # imports torch, and most studies do not ask it

        return len(requests_of())
    if measure == "sameness":
        return size.ordinary
    return _at_most(spec, {"words": size.texts, "sample": size.sampled, "spread": size.few}.get(measure, size.stories))


def few(spec: StudySpec) -> int:
    """Decisions of every random set."""
    return _at_most(spec, spec.size.few)


def _at_most(spec: StudySpec, n: int) -> int:
    return n if spec.battery is None else min(n, len(measured(battery_of(spec.battery), 0)))


def _chunks(spec: StudySpec, arm: str, measure: str, seed: int) -> Iterator[Trial]:
    n = units(spec, arm, measure)
    step = max(n, 1) if measure in _WHOLE else spec.size.chunk
    for first in range(0, n, step):
        stop = min(n, first + step)
        facts = {"schema": SCHEMA, "arm": arm, "measure": measure, "units": [first, stop], **_context(spec, arm, seed)}
        yield Trial(digest_json(facts), arm, measure, seed, first, stop)


def _context(spec: StudySpec, arm: str, seed: int) -> dict[str, Any]:
    """The settings that the figures of an arm depend on."""
    facts: dict[str, Any] = {"model": spec.model, "concept": spec.concept, "seed": seed, **_content(spec)}
    if needs_search(arm):
        facts |= search_facts(spec, seed)
    if arm == "random":
        facts["few"] = few(spec)
    return facts


def search_facts(spec: StudySpec, seed: int) -> dict[str, Any]:
    """The settings that a search and all that comes of it depend on."""
    return {"model": spec.model, "concept": spec.concept, "seed": seed, "sae": spec.sae, "force": spec.force,
            **search_size(spec), **_content(spec)}


def search_size(spec: StudySpec) -> dict[str, Any]:
    """How much a search sees, and what stops it; names of DemoSpec."""
    return {"discovery": spec.size.discovery, "development": spec.size.development, "texts": spec.size.texts,
            "search": {"features": spec.size.features, "kl_mean": spec.thresholds.kl_mean, "kl_p99": spec.thresholds.kl_p99,
                       "aim": spec.size.aim,
                       "window": spec.size.window or ("reading" if spec.battery is None else "everywhere")}}


def _content(spec: StudySpec) -> dict[str, str]:
    """The families of a battery, which may be a file that changes; nothing for the Keeper's world."""
    return {} if spec.battery is None else {"battery": battery_of(spec.battery).digest()}
