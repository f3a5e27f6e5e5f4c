"""Where a study's stories come from: the Keeper's world, or a battery (`concept: battery:NAME`).

A source gives the teller of the arms, the pairs of the search, and the gates before it.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, Protocol, cast, final, runtime_checkable

from features.concepts import Concept, ConceptSpec, Family, WrittenPair, WrittenSource, load_concept
from features.lexical import LexicalGate
from undertow.lexicon.forms import Lexicon
from undertow.studies import battery_figures
from undertow.studies.battery_asking import Asked, question, rows_of, text_of, to_ask
from undertow.studies.battery_files import battery_path
from undertow.studies.battery_forest import ask_together
from undertow.studies.battery_telling import battery_teller
from undertow.studies.battery_text import COST_LEVELS, ORDERS, BatteryFamily, BatterySpec, Item, items
from undertow.studies.battery_units import battery_of, refuse_few_searched, searched, telling_of
from undertow.studies.demo import DemoSpec, PairSide, Progress, contrast_of, lexical_gates, run_gates
from undertow.studies.keeper_telling import KeeperTeller
from undertow.studies.scenes import COSTLY_ACT, KEEPING_ACT, Contrast
from undertow.studies.situations import Teller
from undertow.studies.spec import StudySpec
from undertow.studies.trials import needs_search
from undertow.subjects.keeper.world import World
from undertow.subjects.subject import Subject

Gates = tuple[dict[str, LexicalGate], dict[str, Any]]
"""The lexical gates (none where they were not asked), and competence: `met`, and for a battery `why`, if it is not."""


@runtime_checkable
class Source(Protocol):
    """A source of stories."""

    @property
    def lexicon(self) -> Lexicon:
        """The words that must not be said."""
        ...

    @property
    def acted_on(self) -> PairSide:
        """The side of the pairs on which the arms are measured, and the search therefore works."""
        ...

    def teller(self, world: World, seed: int) -> Teller:
        """Who tells the units of a seed; `world` tells ordinary text, at least."""
        ...

    def concept(self, seed: int) -> Concept:
        """The pairs of the search."""
        ...

    def gates(self, subject: Subject, spec: DemoSpec, site: str, progress: Progress) -> Gates:
        """Lexical gates and competence. Raises TextError for lexical pairs, unless the spec forces."""
        ...


def open_source(spec: StudySpec) -> Source:
    """The source of a study. Raises SpecError for an unknown concept, written pairs, or a battery that cannot be used."""
    if spec.battery is None:
        return KeeperWorld(spec.concept)
    battery = battery_of(spec.battery)
    if any(needs_search(arm) for arm in spec.arms):
        refuse_few_searched(battery)
    return Battery(battery, battery_path(spec.battery).parent)


@final
class KeeperWorld:
    """A concept whose pairs the Keeper's world tells; arms are measured on the negative side (strangers)."""

    def __init__(self, name: str) -> None:
        self._name = name
        contrast_of(load_concept(name))

    @property
    def lexicon(self) -> Lexicon:
        """Of the concept."""
        return self.concept(0).lexicon

    @property
    def acted_on(self) -> PairSide:
        """Where the subject does not act by itself."""
        return "negative"

    def teller(self, world: World, seed: int) -> Teller:
        """Stories of the concept's contrast."""
        return KeeperTeller(world, cast(Contrast, contrast_of(self.concept(seed))), seed)

    def concept(self, seed: int) -> Concept:
        """The concept."""
        return load_concept(self._name, seed)

    def gates(self, subject: Subject, spec: DemoSpec, site: str, progress: Progress) -> Gates:
        """The gates of the demo."""
        return run_gates(subject, self.concept(spec.seed), spec, site)


@final
class Battery:
    """A battery: the search sees its development half, the arms are measured on its sealed half, beside a person.

    Pairs are the social telling and its twin. The act is to be raised on the social side, where the arms are measured: raised
    on the twins, it would be the giving to things that is searched for.
    """

    def __init__(self, battery: BatterySpec, folder: Path) -> None:
        self._battery, self._folder = battery, folder

    @property
    def lexicon(self) -> Lexicon:
        """Of the battery: a packaged one, or a file beside it."""
        path = self._folder / self._battery.lexicon
        return Lexicon.load(path if path.suffix in (".yaml", ".yml") else self._battery.lexicon)

    @property
    def acted_on(self) -> PairSide:
        """Beside a person."""
        return "positive"

    def teller(self, world: World, seed: int) -> Teller:
        """Families of the sealed half."""
        return battery_teller(self._battery, world, seed)

    def concept(self, seed: int) -> Concept:
        """Families of the development half, each in one telling, both costs and both orders."""
        source = WrittenSource(kind="written", families=tuple(map(_family, searched(self._battery))))
        return Concept(ConceptSpec(name=self._battery.name, lexicon=self._battery.lexicon, source=source), seed, self._folder)

    def gates(self, subject: Subject, spec: DemoSpec, site: str, progress: Progress) -> Gates:
        """Competence as the battery has it; lexical gates where it is met, and else none."""
        asked = to_ask(searched(self._battery), "base")
        answers = ask_together(subject, [question(subject, one, "base") for one in asked],
                               lambda done, total: progress("competence", done, total))
        found = battery_figures.competence(battery_figures.table(rows_of(subject, asked, answers)), spec.seed)
        competence: dict[str, Any] = {"met": all(gate.met for gate in found.values()), "gates": battery_figures.as_json(found)}
        if not competence["met"]:
            failed = battery_figures.verdict(found).partition(": ")[2]
            why = f"the subject fails the battery's gate of competence, on the development half: {failed}"
            return {}, competence | {"why": why}
        return lexical_gates(subject, self.concept(spec.seed).pairs("discovery", spec.discovery), spec, site), competence


def _family(family: BatteryFamily) -> Family:
    telling = telling_of(family)
    told = {(item.side, item.cost, item.order): item for item in items(family) if item.telling == telling}
    acts = next(iter(told.values())).acts
    options = {COSTLY_ACT: tuple(f" {wording}." for wording in acts.costly),
               KEEPING_ACT: tuple(f" {wording}." for wording in acts.keep)}
    pairs = tuple(WrittenPair(positive=_prompt(told["social", cost, order]), negative=_prompt(told["twin", cost, order]))
                  for cost, order in product(COST_LEVELS, ORDERS))
    return Family(name=family.id, costly=COSTLY_ACT, keep=KEEPING_ACT, options=options, pairs=pairs)


def _prompt(item: Item) -> str:
    return text_of(Asked(item, "none"), "base")
