"""Running a study: a plain queue of trials. Every trial is one row, on the disk before the next begins.

    from undertow.studies.engine import run_study
    from undertow.studies.spec import StudySpec, load_study

    result = run_study(load_study("ladder"), Path("runs/ladder"))     # or StudySpec(name=..., arms=..., measures=...)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

from interventions.audit import spellings
from interventions.guard import LexiconProcessor
from sae.run import Interrupted
from undertow.core.errors import ArtifactError, NumericsError, StorageError, UserError
from undertow.core.record import git_revision
from undertow.core.storage import disk_errors
from undertow.studies.clamping import unsaid
from undertow.studies.conditions import Bench, Condition, condition_of, random_condition
from undertow.studies.demo import LANGUAGES
from undertow.studies.frozen import frozen_search
from undertow.studies.ledger import Ledger, open_ledger
from undertow.studies.measures import Bodies, Words, bodies, choice, naming, sameness, sample, twin, words_of
from undertow.studies.preparing import Prepared, Tools, prepared, site_of
from undertow.studies.situations import Teller
from undertow.studies.sources import Source, open_source
from undertow.studies.spec import StudySpec
from undertow.studies.trials import Trial, few, needs_search, trials_of
from undertow.studies.variants import AbsentArmError
from undertow.studies.weights import Trained, adapted
from undertow.subjects.keeper.world import World, load_world
from undertow.subjects.load import load_subject
from undertow.subjects.sharing import Below
from undertow.subjects.subject import Subject

log = logging.getLogger(__name__)
LOCK = ".lock"
_FROM_THE_SITE = ("choice", "twin", "naming", "sameness")  # measures in which nothing is read or edited below the site


@final
class Watch(NamedTuple):
    """What a run shows and heeds.

    Attributes:
        progress: called with (phase, done, total).
        should_stop: asked before every trial, and at every step of a training.
        row: called with every row that was written.
    """

    progress: Callable[[str, int, int], None] = lambda phase, done, total: None
    should_stop: Callable[[], bool] = lambda: False
    row: Callable[[dict[str, Any]], None] = lambda row: None


@final
class StudyResult(NamedTuple):
    """What a run has come to.

    Attributes:
        folder: the study's.
        counts: trials by status: done, failed, absent; and left.
        stopped: a stop was asked for.
    """

    folder: Path
    counts: dict[str, int]
    stopped: bool


# Does trials and writes their rows: (what they share, those that have no row, how many the study has) -> a stop was asked for
Work = Callable[["Lab", list[Trial], int], bool]


def run_study(spec: StudySpec, out: Path, watch: Watch | None = None, retry_failed: bool = False,
              work: Work | None = None) -> StudyResult:
    """Run all trials of a study that have no row yet, and write `study.json` and `rows.jsonl` into `out`.

    A failed trial is a row with its error, and the run goes on. Whatever broke a run off, the same call goes on with it.

    Args:
        spec: the study.
        out: folder; new, empty, or that of the same study.
        watch: what to show and heed.
        retry_failed: do trials again whose row says that they failed.
        work: how the trials are done; absent: here, one after another (`ray_runner.on_ray` does them on a cluster).

    Raises:
        ArtifactError: `out` holds something else, or rows that were made under other settings; or another run is at work there.
        UserError: bad input: an unknown model, lexical pairs, an SAE that does not fit, a battery that is refused.
    """
    seen = watch or Watch()
    open_source(spec)
    trials = trials_of(spec)
    open_ledger(out, spec)
    with _alone(out):
        ledger = open_ledger(out, spec, mend=True)
        waiting = [trial for trial in trials if not ledger.done(trial.key, retry_failed)]
        stopped = _worked(work or _in_turn, Lab(spec, ledger, seen), waiting, len(trials)) if waiting else False
    counts = {status: 0 for status in ("done", "failed", "absent", "left")}
    for trial in trials:
        row = ledger.rows.get(trial.key)
        counts["left" if row is None else row["status"]] += 1
    return StudyResult(out, counts, stopped)


def _worked(work: Work, lab: Lab, waiting: list[Trial], total: int) -> bool:
    try:
        return work(lab, waiting, total)
    except Interrupted:
        return True


def _in_turn(lab: Lab, waiting: list[Trial], total: int) -> bool:
    """Do the trials one after another; True if a stop was asked for."""
    git = git_revision()
    lab.check_weights()
    for done, trial in enumerate(waiting, start=total - len(waiting)):
        lab.watch.progress("trials", done, total)
        if lab.watch.should_stop():
            return True
        row = row_of(lab, trial, git)
        lab.ledger.append(row)
        lab.watch.row(row)
    lab.watch.progress("trials", total, total)
    return False


def row_of(lab: Lab, trial: Trial, git: str) -> dict[str, Any]:
    """The row of one trial. Only what is wrong with the whole run raises: the search, or the disk."""
    if needs_search(trial.arm):
        lab.prepared(trial.seed)
    return {**head_of(trial), "git": git, "subject": lab.subject.digest, **_outcome(lab, trial)}


def head_of(trial: Trial) -> dict[str, Any]:
    """What a row says of its trial."""
    return {"id": trial.key, "arm": trial.arm, "measure": trial.measure, "seed": trial.seed, "first": trial.first,
            "stop": trial.stop}


def _outcome(lab: Lab, trial: Trial) -> dict[str, Any]:
    """What a trial came to: its values; or that its arm is absent, and why; or the error that it failed with."""
    began = time.perf_counter()
    try:
        found: dict[str, Any] = {"status": "done", **lab.measure(trial)}
        json.dumps(found, allow_nan=False)
    except AbsentArmError as error:
        found = {"status": "absent", "reason": str(error)}
    except (StorageError, Interrupted):
        raise
    except ValueError as error:
        found = _failed(trial, NumericsError(f"a figure is not finite ({error})"))
    except UserError as error:
        found = _failed(trial, error)
    except Exception as error:
        log.exception("trial %s (%s, %s) failed", trial.key, trial.arm, trial.measure)
        found = _failed(trial, error)
    return {**found, "wall_s": round(time.perf_counter() - began, 3)}


def _failed(trial: Trial, error: Exception) -> dict[str, Any]:
    if isinstance(error, UserError):
        log.warning("trial %s (%s, %s) failed: %s", trial.key, trial.arm, trial.measure, error.what)
    return {"status": "failed", "error": {"type": type(error).__name__, "what": str(error)}}


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which goes with the process. Raises ArtifactError if another run holds it."""
    path = folder / LOCK
    with disk_errors(path), path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"another run is at work in {folder}", "wait for it, or choose another --out") from None
        yield


@final
class Lab:
    """What all trials of a run share, opened when it is first asked for."""

    def __init__(self, spec: StudySpec, ledger: Ledger, watch: Watch) -> None:
        self.spec, self.ledger, self.watch = spec, ledger, watch
        self._prepared: dict[int, Prepared] = {}
        self._conditions: dict[tuple[str, int], Condition] = {}
        self._bodies: dict[tuple[int, int, int], Bodies] = {}

    @cached_property
    def subject(self) -> Subject:
        """The model."""
        return load_subject(self.spec.model)

    @cached_property
    def source(self) -> Source:
        """Where stories come from."""
        return open_source(self.spec)

    @cached_property
    def world(self) -> World:
        """The source of ordinary text."""
        return load_world()

    @cached_property
    def words(self) -> Words:
        """What is needed to see a word."""
        lexicon = self.source.lexicon
        return Words(spellings(self.subject, lexicon.only(languages=LANGUAGES)),
                     LexiconProcessor(self.subject.tokenizer, lexicon, prompt="record"))

    @cached_property
    def below(self) -> Below:
        """What is computed below the site, once for all arms."""
        return Below(self.subject, self.subject.site(site_of(self.spec, self.subject)))

    def check_weights(self) -> None:
        """Raise ArtifactError if earlier rows were measured on other weights."""
        others = {row["subject"] for row in self.ledger.rows.values()} - {self.subject.digest}
        if others:
            raise ArtifactError(f"{self.ledger.folder} has rows of the weights {', '.join(sorted(others))}, and "
                                f"{self.spec.model} now has {self.subject.digest}",
                                "run the study into a folder of its own with --out")

    def prepared(self, seed: int) -> Prepared:
        """The search of one seed."""
        if seed not in self._prepared:
            self._prepared[seed] = prepared(self.spec, seed, self.ledger.folder, self._tools())
        return self._prepared[seed]

    def measure(self, trial: Trial) -> dict[str, Any]:
        """The values of a trial, what its arm is and what it costs. Raises AbsentArmError if the search has nothing for it."""
        teller, units = self.source.teller(self.world, trial.seed), range(trial.first, trial.stop)
        bench = Bench(self.subject, teller, lambda: self.prepared(trial.seed), lambda arm: self._trained(arm, teller),
                      lambda: self._frozen(trial.seed))
        if trial.arm == "random":
            sets = [random_condition(bench, i) for i in units]
            with self.below.shared():
                made = [choice(condition, teller, range(few(self.spec))) for condition in sets]
            return {"arm_digest": sets[0].digest, "cost": sets[0].cost._asdict(),
                    "values": {"set": list(units), **{name: [found[name] for found in made] for name in ("p", "D")}}}
        if (trial.arm, trial.seed) not in self._conditions:
            self._conditions[trial.arm, trial.seed] = condition_of(trial.arm, bench)
        condition = self._conditions[trial.arm, trial.seed]
        with self.below.shared() if trial.measure in _FROM_THE_SITE else contextlib.nullcontext():
            values = self._values(trial, condition, teller, units)
        return {"arm_digest": condition.digest, "cost": condition.cost._asdict(), "values": values}

    def _values(self, trial: Trial, condition: Condition, teller: Teller, units: range) -> dict[str, Any]:
        match trial.measure:
            case "choice":
                return choice(condition, teller, units)
            case "twin":
                return twin(condition, teller, units)
            case "naming":
                return naming(condition, teller, units)
            case "sample":
                return sample(condition, teller, units, self.words)
            case "sameness":
                return sameness(condition, teller, units, self.subject)
            case "words":
                return words_of(condition, units, self._untouched(trial, teller), self.words)
            case "unsaid":
                axes = {int(name.partition(".")[2]): rows for name, rows in self.prepared(trial.seed).directions.items()
                        if name.startswith("word.")}
                return unsaid(condition, teller, units, self.subject, axes)
            case "spread":
                from undertow.studies.spread import spread

                return spread(condition, teller, units, self.subject)
            case "safety":
                from undertow.studies.safety import safety

                return safety(condition, units)
            case other:
                raise AssertionError(other)

    def _trained(self, arm: str, teller: Teller) -> Trained:
        """The adapter of a weight arm, in the study's folder. A stop during its training gives that up."""
        def on_step(done: int, total: int) -> None:
            self.watch.progress(f"train {arm}", done, total)
            if self.watch.should_stop():
                raise Interrupted(self.ledger.folder)

        return adapted(self.subject, teller, arm, self.ledger.folder / f"adapter-{arm}-{teller.seed}", on_step)

    def _frozen(self, seed: int) -> Prepared:
        """The search in an SAE whose decoder is random."""
        return frozen_search(self.spec, seed, self.prepared(seed), self.ledger.folder, self._tools())

    def _tools(self) -> Tools:
        return Tools(self.subject, self.source, self.world, self.watch.progress, self.watch.should_stop)

    def _untouched(self, trial: Trial, teller: Teller) -> Bodies:
        """The untouched subject on the texts of a trial, computed once for all arms."""
        key = (trial.seed, trial.first, trial.stop)
        if key not in self._bodies:
            self._bodies[key] = bodies(self.subject, teller, range(trial.first, trial.stop), self.words)
        return self._bodies[key]
