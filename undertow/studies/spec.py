"""What a study is: one frozen YAML file. Thresholds stand in it before any row exists.

    name: ladder
    model: hearth
    concept: care
    arms: [stranger, bonded, L1, L2, L4, sham, random, lexical]
    measures: [choice, words, sample]
    primary: recovery
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, final

from pydantic import Field, field_validator, model_validator

from undertow.core.errors import SpecError, near_matches
from undertow.core.spec import Spec

_T = TypeVar("_T")
DATA = Path(__file__).parent / "data" / "studies"
ARMS: dict[str, str] = {
    "stranger": "the untouched subject",
    "bonded": "the context in which it acts so by itself (reference)",
    "L1": "a prompt line asks for a text about love",
    "L2": "an instruction line: the keeper is in love with the person",
    "L2-not": "an instruction line that forbids the word (L2′)",
    "L3": "low-rank training on affectionate text, without a prompt",
    "L3-acts": "low-rank training on costly acts told without the word (L3′)",
    "L4": "feature surgery",
    "L4-before": "feature surgery, off from the decision on",
    "sham": "the surgery with no change",
    "random": "surgery on matched random features, one set after another",
    "lexical": "features of the word, as much added as the surgery adds",
    "diffmean": "the difference of means of the contrast, where the surgery acts, as much as the surgery adds",
    "constant": "the surgery's direction at every token, as much as the surgery adds",
    "minus": "the surgery's direction subtracted where the surgery acts",
    "shuffled": "the surgery with the SAE's decoder rows exchanged at random",
    "frozen": "surgery by the same search in an SAE whose decoder is random and never trained",
    "giver": "an instruction to give, before the need",
    "keeper": "an instruction to keep, before the need",
}
BATTERY_ARMS: Mapping[str, str] = {  # what is another thing where the stories are a battery's
    "bonded": "an instruction to give, before the choice (the reference: a real model has no taught bond)",
    "L2": "a line: the one who acts is in love",
    "L3-acts": "low-rank training on costly acts in families of the development half, told without the word (L3′)",
    "giver": "an instruction to give, before the choice",
    "keeper": "an instruction to keep, before the choice",
}
NUMBERED: dict[str, tuple[str, str]] = {
    "dose": (r"\d+(\.\d+)?", "the surgery, its floors multiplied by the figure"),
    "operator": ("floor|clamp|add|strengthen", "the surgery with this operator in place of floors"),
    "only": (r"\d+|\*", "one feature of the surgery alone (0 is the first; * stands for each)"),
    "without": (r"\d+|\*", "the surgery without one feature"),
}
MEASURES: dict[str, str] = {
    "choice": "P(costly act) and D at every decision",
    "twin": "D at decisions of the same cost where nobody is in need",
    "words": "hazard of the word in stories up to the decision, and KL(untouched‖arm) on the ordinary text before the need",
    "sameness": "KL(untouched‖arm) on more ordinary text",
    "sample": "continuations sampled with the guard off: acts done, words said",
    "naming": "answers to a forced list of state names",
    "unsaid": "D with the directions of the word held at their untouched values in all later blocks",
    "spread": "how far the arm moves the stream after every block, at the last tokens before the decision",
    "safety": "answers to harmful requests and to plain questions, as a safety gate asks them",
}
BATTERY = "battery:"  # before the name of a battery that is taken for the concept
CONTROLS = ("stranger", "bonded", "L2", "sham", "random", "lexical")  # of a claim
CLAIM_MEASURES = ("choice", "words", "sample")
LEAST_SETS = 20


@final
class Size(Spec):
    """How much is measured, and how far the search goes.

    Attributes:
        stories: decisions (and questions about the state) of every arm. A battery has no more of these, nor of few, sampled and
            texts, than families on its sealed half; a study then takes those.
        few: decisions of every random set, the first of those.
        sampled: stories that are gone on with.
        texts: ordinary texts on which hazard is measured.
        ordinary: ordinary texts of `sameness`, whose 99th percentile needs many.
        sets: matched random sets.
        chunk: stories (texts, sets) of one trial.
        discovery: pairs that the search may see, and situations that sets are refined in.
        development: situations that sets are judged by.
        features: of the surgery, and of the trigger that opens its gate, at most.
        aim: how far P(costly act) is to go by it, as a share of the way to where the subject acts by itself.
        window: where it acts: reading leaves alone what is written. If absent, reading in the Keeper's world and everywhere in
            a battery, whose tellings are asked together.
    """

    stories: int = Field(default=60, ge=10)
    few: int = Field(default=10, ge=5)
    sampled: int = Field(default=100, ge=10)
    texts: int = Field(default=24, ge=8)
    ordinary: int = Field(default=120, ge=8)
    sets: int = Field(default=100, ge=1)
    chunk: int = Field(default=20, ge=1)
    discovery: int = Field(default=40, ge=12)
    development: int = Field(default=16, ge=12)
    features: int = Field(default=32, ge=1)
    aim: float = Field(default=0.8, gt=0)
    window: Literal["everywhere", "reading"] | None = None

    @model_validator(mode="after")
    def _few_are_of_the_stories(self) -> Size:
        if self.few > self.stories:
            raise ValueError(f"few ({self.few}) are the first of the stories, and stories is {self.stories}")
        return self


@final
class Thresholds(Spec):
    """What counts as held, fixed in advance.

    Attributes:
        recovery_high: recovery that L4 must reach.
        recovery_low: recovery within which (on both sides of 0) the other levels must stay.
        word_rise: hazard ratio that the other levels must reach.
        hazard_ratio: hazard ratio within which (and whose inverse) words are the same.
        kl_mean, kl_p99: nats a token within which ordinary text is the same; the search stays within them too.
        bits: nameability within which self-report is the same.
        unsaid: unsaid ratio that L4 must reach.
        alpha: level of every test, after its correction.
    """

    recovery_high: float = Field(default=0.70, gt=0)
    recovery_low: float = Field(default=0.15, gt=0)
    word_rise: float = Field(default=10.0, gt=1)
    hazard_ratio: float = Field(default=1.25, gt=1)
    kl_mean: float = Field(default=0.01, gt=0)
    kl_p99: float = Field(default=0.1, gt=0)
    bits: float = Field(default=0.05, gt=0)
    unsaid: float = Field(default=0.7, gt=0)
    alpha: float = Field(default=0.05, gt=0, lt=0.5)


@final
class StudySpec(Spec):
    """A study.

    Attributes:
        name: what it is called.
        about: the question, in a sentence.
        model: the subject.
        sae: a folder or release; absent: one is trained on the Keeper's world, within the run.
        concept: what is contrasted: a concept of the Keeper's world, or battery:NAME (or battery:FILE.yaml), whose families are
            then the stories.
        force: go on although the pairs are lexical; recorded.
        arms: names of ARMS, or dose:X, operator:NAME, only:N, without:N (N the place of a chosen feature, or *).
        measures: names of MEASURES.
        primary: recovery (a claim: a verdict is drawn, and every control must be among the arms) or D (a comparison of
            arms, of which no verdict is drawn).
        size: how much.
        thresholds: what counts as held.
        seeds: of everything; with each the whole study is done anew, from the SAE on.
    """

    name: str = Field(min_length=1, pattern=r"^[a-z0-9][a-z0-9_-]*$")
    about: str = ""
    model: str = "hearth"
    sae: str | None = None
    concept: str = "care"
    force: bool = False
    arms: tuple[str, ...] = Field(min_length=1)
    measures: tuple[str, ...] = Field(min_length=1)
    primary: Literal["recovery", "D"] = "D"
    size: Size = Size()
    thresholds: Thresholds = Thresholds()
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)

    @field_validator("arms")
    @classmethod
    def _known_arms(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for arm in arms:
            kind, _, rest = arm.partition(":")
            if arm not in ARMS and not (kind in NUMBERED and re.fullmatch(NUMBERED[kind][0], rest)):
                hint = near_matches(arm, ARMS) or f"arms: {', '.join(ARMS)}, dose:X, operator:NAME, only:N, without:N"
                raise ValueError(f"no arm is called {arm!r}; {hint}")
        if "stranger" not in arms:
            raise ValueError("the arm 'stranger' is missing: every figure is a change from it")
        return _each_once("arm", arms)

    @field_validator("measures")
    @classmethod
    def _known_measures(cls, measures: tuple[str, ...]) -> tuple[str, ...]:
        for measure in measures:
            if measure not in MEASURES:
                raise ValueError(f"no measure is called {measure!r}; "
                                 f"{near_matches(measure, MEASURES) or 'measures: ' + ', '.join(MEASURES)}")
        return _each_once("measure", measures)

    @field_validator("concept")
    @classmethod
    def _named_battery(cls, concept: str) -> str:
        if concept.startswith(BATTERY) and not concept.removeprefix(BATTERY).strip():
            raise ValueError(f"the concept {concept!r} names no battery; for instance battery:care, or battery:mine.yaml")
        return concept

    @field_validator("seeds")
    @classmethod
    def _seeds_once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        return _each_once("seed", seeds)

    @property
    def battery(self) -> str | None:
        """Name or path of the battery, if the stories are one's."""
        return self.concept.removeprefix(BATTERY) if self.concept.startswith(BATTERY) else None

    @model_validator(mode="after")
    def _a_battery_has_one_seed(self) -> StudySpec:
        if self.battery is not None and len(self.seeds) > 1:
            raise ValueError(f"{len(self.seeds)} seeds {self.seeds} on a battery would count its families {len(self.seeds)} "
                             "times, since no seed tells new ones; give one seed, and each other a study of its own")
        return self

    @model_validator(mode="after")
    def _a_battery_is_operated_everywhere(self) -> StudySpec:
        if self.battery is not None and self.size.window == "reading":
            raise ValueError("size.window 'reading' on a battery, whose tellings are asked together in one row; leave it out")
        return self

    @model_validator(mode="after")
    def _claims_have_controls(self) -> StudySpec:
        if self.primary != "recovery":
            return self
        missing = [arm for arm in ("L4", *CONTROLS) if arm not in self.arms]
        missing += [measure for measure in CLAIM_MEASURES if measure not in self.measures]
        if missing:
            raise ValueError(f"a claim (primary: recovery) without {', '.join(missing)} proves nothing; add them, or compare "
                             "arms without a claim (primary: D)")
        if self.size.sets < LEAST_SETS:
            raise ValueError(f"a claim needs at least {LEAST_SETS} matched random sets, and size.sets is {self.size.sets}")
        return self


def _each_once(kind: str, values: tuple[_T, ...]) -> tuple[_T, ...]:
    if twice := [value for value in values if values.count(value) > 1]:
        raise ValueError(f"the {kind} {twice[0]!r} stands twice")
    return values


def what_is(arm: str, spec: StudySpec | None = None) -> str:
    """An arm in words, in a study if one is given."""
    if spec is not None and spec.battery is not None and arm in BATTERY_ARMS:
        return BATTERY_ARMS[arm]
    return ARMS.get(arm) or NUMBERED[arm.partition(":")[0]][1]


def in_words(settings: Mapping[str, Any]) -> str:
    """Settings that are numbers or names, in one line; one that is None, which has a value by other settings, is left out."""
    return ", ".join(f"{name} {value}" if isinstance(value, str) else f"{name} {value:g}"
                     for name, value in settings.items() if value is not None)


def load_study(name_or_path: str | Path, changes: Mapping[str, Any] | None = None) -> StudySpec:
    """A packaged study by name ("ladder") or a YAML file by path.

    Args:
        name_or_path: which.
        changes: fields to replace, a dot between the parts of a name: {"model": "parrot", "size.stories": 20}.

    Raises SpecError that names the file, the field and the value.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = packaged_studies()
        if str(name_or_path) not in known:
            raise SpecError(f"no study is called {str(name_or_path)!r}", near_matches(str(name_or_path), known)
                            or f"packaged: {', '.join(known)}; or give the path of a .yaml file")
        path = DATA / f"{name_or_path}.yaml"
    spec = StudySpec.from_yaml(path)
    if not changes:
        return spec
    values = spec.model_dump()
    for name, value in changes.items():
        _put(values, name, value)
    return StudySpec.checked(values, str(path))


def _put(values: dict[str, Any], name: str, value: Any) -> None:
    """Replace one field, found by its dotted name. An unknown one is left to the validation, which names it."""
    *parts, last = name.split(".")
    for part in parts:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise SpecError(f"{name} names no setting of a study: {part} has no parts",
                            f"settings: {', '.join(StudySpec.model_fields)}")
    values[last] = value


def packaged_studies() -> list[str]:
    """Names of the packaged studies."""
    return sorted(path.stem for path in DATA.glob("*.yaml"))
