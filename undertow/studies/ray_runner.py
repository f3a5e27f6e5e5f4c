"""The trials of a study on a Ray cluster: the same rows as one process would write, in another order.

    from undertow.studies.ray_runner import on_ray

    run_study(spec, folder, work=on_ray())                           # a cluster of this machine's own, gone with the run
    run_study(spec, folder, work=on_ray("10.0.0.1:6379", workers=8))

The driver (this process) alone writes the ledger: one line when a worker returns a row, on the disk before the next is taken.
It also makes whatever lies in the study's folder (search, SAE, adapters), once, and the workers read that from there.

What is guaranteed:

* Every trial gets exactly one row, whichever workers are lost: a trial whose worker died is put back, and becomes a failed row
  with the reason when LOSSES workers died at it.
* A row does not depend on who computed it, or when: no trial leaves anything behind that another reads, and every worker has
  the driver's versions, commit, weights, kind of device, number of threads and prepared files, or the run ends and says which
  is not so. The rows of a study are those of the local engine but for `wall_s`, to the last bit on machines of one kind; other
  processors may round otherwise.
* Killed at any moment, the same command goes on: the workers go with the driver, and hold nothing.
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import signal
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, final

import torch

from undertow.core.errors import ArtifactError, UserError
from undertow.core.record import git_revision, package_versions
from undertow.core.storage import MANIFEST, sha256_file
from undertow.studies.engine import Lab, Watch, Work, head_of, row_of
from undertow.studies.ledger import Ledger
from undertow.studies.spec import StudySpec
from undertow.studies.trials import TRAINED, Trial, needs_search, trials_of

log = logging.getLogger(__name__)
LOCAL = "local"
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # "0", when Ray is imported: it listens on the loopback interface alone
LOSSES = 3  # workers that may die at one trial, or one after another while they open the model
_POLL_S, _SILENCE_S, _CONNECT_S = 0.5, 30.0, 5.0
_OBJECTS = 100 * 2**20  # bytes of the local cluster's store; a row has some kilobytes


@final
class Job(NamedTuple):
    """What a worker is told once.

    Attributes:
        spec: the study, as JSON values.
        cwd: the driver's working directory, against which paths are meant.
        folder: of the study.
        threads: of torch.
    """

    spec: dict[str, Any]
    cwd: str
    folder: str
    threads: int


@final
class Answer(NamedTuple):
    """What a worker gives back.

    Attributes:
        values: a row, or the facts that have to agree with the driver's.
        refused: (what, hint) of an error that no row may hide, since it is the worker's and not the trial's.
        node: where the worker is, and its process.
    """

    values: dict[str, Any]
    refused: tuple[str, str] | None
    node: str


@final
class Worker:
    """One process of the cluster, which opens the subject once and computes trials by their key. It writes nothing."""

    def __init__(self, job: Job) -> None:
        with contextlib.suppress(OSError):  # a node may do without: then what is missing is named when it is asked for
            os.chdir(job.cwd)
        torch.set_num_threads(job.threads)
        spec = StudySpec.checked(job.spec)
        self._lab = Lab(spec, Ledger(Path(job.folder), spec, {}), Watch())
        self._trials = {trial.key: trial for trial in trials_of(spec)}
        self._git = git_revision()
        self._node = f"{platform.node()}, process {os.getpid()}"

    def open(self) -> Answer:
        """Open the subject, and say what has to agree."""
        try:
            return Answer(_facts(self._lab, self._git), None, self._node)
        except UserError as error:
            return Answer({}, (error.what, error.hint), self._node)

    def compute(self, key: str, manifests: Mapping[str, str]) -> Answer:
        """The row of a trial; `manifests` are paths and digests of what the driver has prepared for it."""
        try:
            for path, digest in manifests.items():
                if not Path(path).is_file() or sha256_file(Path(path)) != digest:
                    raise ArtifactError(f"{Path(path).parent} is not there, or is not the driver's",
                                        "share the study's folder with every node, under the same path")
            return Answer(row_of(self._lab, self._trials[key], self._git), None, self._node)
        except UserError as error:
            return Answer({}, (error.what, error.hint), self._node)


def _facts(lab: Lab, git: str) -> dict[str, Any]:
    return {"commit": git, "weights": lab.subject.digest, "device": lab.subject.device.type,
            "torch threads": torch.get_num_threads(), **package_versions()}


def on_ray(address: str | None = None, workers: int | None = None) -> Work:
    """How trials are done on a Ray cluster, for `run_study`.

    Args:
        address: host:port of a running cluster of which this machine is a node, or `auto`; absent: RAY_ADDRESS, else a cluster
            of this machine's own on its loopback interface, which ends with the run. A Ray that was initialised before
            is used as it is.
        workers: how many at most; absent: as many as the cluster has cores for, with torch's threads each.

    Raises UserError if Ray is not installed, or no cluster can be at the address.
    """
    where = address or os.environ.get("RAY_ADDRESS") or LOCAL
    if where != LOCAL:
        _reach(where)
    ray = _ray(where)

    def work(lab: Lab, waiting: list[Trial], total: int) -> bool:
        lab.check_weights()
        with _cluster(ray, where, workers):
            spec = lab.spec.model_dump(mode="json")
            job = Job(spec, os.getcwd(), str(lab.ledger.folder), torch.get_num_threads())
            crew = Crew(ray, job, _facts(lab, git_revision()), _size(ray, workers, job.threads, lab.subject.device.type))
            try:
                return _Run(lab, crew, waiting, total)()
            finally:
                crew.close()

    return work


def _reach(address: str) -> None:
    """Raise UserError if nothing can be, or nothing listens, at an address: Ray itself would wait for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise UserError(f"--address {address!r} is not HOST:PORT", "start the study on a node of the cluster; --address auto "
                        "finds the cluster to which that node belongs")
    if host in ("127.0.0.1", "localhost") and os.environ.get(_LOOPBACK) != "0":
        raise UserError(f"Ray takes {host} for this machine's address on the network, where no cluster may be",
                        "give the address that ray start printed, or --address auto")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise _unreached(address, error) from None


def _unreached(address: str, error: Exception) -> UserError:
    return UserError(f"no Ray cluster answers at {address}: {_line(error)}", "ray start --head on the first node says its "
                     "address; RAY_AUTH_MODE=token if it has a token; without --address, this machine starts its own")


def _ray(address: str) -> ModuleType:
    """The module. Raises UserError if it is not installed."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == LOCAL:  # no node on another machine is wanted
        os.environ.setdefault(_LOOPBACK, "0")
    try:
        import ray
        import ray.exceptions
    except ModuleNotFoundError:
        raise UserError("--engine ray needs Ray, which is not installed", 'pip install "undertow[ray]"') from None
    return ray


@contextlib.contextmanager
def _cluster(ray: ModuleType, address: str, workers: int | None) -> Iterator[None]:
    """Be connected while the block runs."""
    if ray.is_initialized():
        yield
        return
    cores = len(os.sched_getaffinity(0)) if platform.system() == "Linux" else os.cpu_count() or 1
    own = {} if address != LOCAL else {"num_cpus": max(cores, (workers or 1) * torch.get_num_threads()),
                                       "object_store_memory": _OBJECTS, "include_dashboard": False}
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _unreached(address, error) from None
    if in_main and before is not None:
        signal.signal(signal.SIGTERM, before)  # Ray puts its own there, which ends the process at once
    try:
        yield
    finally:
        ray.shutdown()


def _size(ray: ModuleType, workers: int | None, threads: int, device: str) -> int:
    """How many workers to have. Raises UserError if no node has room for one."""
    room = 0
    for node in ray.nodes():
        if node["Alive"]:
            cores = int(node["Resources"].get("CPU", 0) // threads)
            room += cores if device == "cpu" else min(cores, int(node["Resources"].get("GPU", 0)))
    if room == 0:
        raise UserError(f"no node of the Ray cluster has room for a worker ({threads} cores{', a GPU' * (device != 'cpu')})",
                        "OMP_NUM_THREADS=1 before the command makes workers of one core")
    if workers is not None and workers > room:
        log.warning("the cluster has room for %d workers of %d cores, and %d were asked for; the others wait", room, threads,
                    workers)
    size = workers or room
    log.info("%d worker%s with %d thread%s each", size, "s" * (size != 1), threads, "s" * (threads != 1))
    return size


def _line(error: BaseException) -> str:
    """An error of Ray's in one line; some have pages."""
    return " ".join(str(error).split())[:400] or type(error).__name__


@final
class Lost(NamedTuple):
    """A trial whose worker is gone, and why."""

    trial: Trial
    error: Exception


@final
class Crew:
    """The workers that are there, and what each has in hand. At most `size`, none of them ever restarted by Ray itself."""

    def __init__(self, ray: ModuleType, job: Job, facts: Mapping[str, Any], size: int) -> None:
        self._ray, self._facts, self.size = ray, facts, size
        options = {"num_cpus": job.threads, "num_gpus": int(facts["device"] != "cpu"), "max_restarts": 0, "max_task_retries": 0}
        self._actor, self._job = ray.remote(Worker).options(**options), job
        self._idle: list[Any] = []
        self._hands: dict[Any, tuple[Any, Trial | None]] = {}  # by what is awaited: the worker, and its trial or its opening
        self._losses, self._heard = 0, time.monotonic()
        errors = ray.exceptions
        self._gone = (errors.RayActorError, errors.WorkerCrashedError, errors.NodeDiedError, errors.OutOfMemoryError,
                      errors.ObjectLostError)

    @property
    def busy(self) -> bool:
        """Whether a trial is in hand."""
        return any(trial is not None for _, trial in self._hands.values())

    @property
    def idle(self) -> bool:
        """Whether a worker waits for a trial."""
        return bool(self._idle)

    def fill(self, wanted: int) -> None:
        """Have `wanted` workers, or as many as may be."""
        while len(self._idle) + len(self._hands) < min(wanted, self.size):
            worker = self._actor.remote(self._job)
            self._hands[worker.open.remote()] = (worker, None)

    def hand(self, trial: Trial, manifests: Mapping[str, str]) -> None:
        """Give a trial to an idle worker."""
        worker = self._idle.pop()
        self._hands[worker.compute.remote(trial.key, dict(manifests))] = (worker, trial)

    def collect(self, seconds: float) -> dict[str, Any] | Lost | None:
        """A row that was returned, or the trial whose worker was lost; None if nothing came within `seconds`.

        Raises UserError if a worker refuses, differs from the driver, or none can be opened.
        """
        ready = self._ray.wait(list(self._hands), timeout=seconds)[0] if self._hands else []
        if not ready:
            self._mind_the_silence()
            return None
        worker, trial = self._hands.pop(ready[0])
        self._heard = time.monotonic()
        try:
            answer: Answer = self._ray.get(ready[0])
        except self._gone as error:
            self._ray.kill(worker)  # it may be out of reach only, and must not be counted on
            return self._lost(trial, error)
        if answer.refused is not None:
            raise UserError(f"the worker on {answer.node} cannot go on: {answer.refused[0]}", answer.refused[1])
        self._idle.append(worker)
        if trial is not None:
            return answer.values
        self._losses = 0
        self._agree(answer)
        return None

    def close(self) -> None:
        """Let all workers go."""
        for worker in [*self._idle, *(worker for worker, _ in self._hands.values())]:
            with contextlib.suppress(self._ray.exceptions.RayError):
                self._ray.kill(worker)
        self._idle, self._hands = [], {}

    def _lost(self, trial: Trial | None, error: Exception) -> Lost | None:
        if trial is not None:
            return Lost(trial, error)
        self._losses += 1
        if self._losses >= LOSSES:
            raise UserError(f"{LOSSES} workers in a row died before they had opened the model: {_line(error)}",
                            "is the same Undertow installed on every node, and is there memory for so many? (--workers)")
        log.warning("a worker died before it had opened the model: %s", _line(error))
        return None

    def _agree(self, answer: Answer) -> None:
        """Raise UserError if a worker would not compute what the driver would."""
        theirs = answer.values
        other = [f"{name}: {self._facts.get(name, 'none')} here, {theirs.get(name, 'none')} there"
                 for name in {**self._facts, **theirs} if self._facts.get(name) != theirs.get(name)]
        if other:
            raise UserError(f"the worker on {answer.node} would not compute what this process would:\n  " + "\n  ".join(other),
                            "install the same versions on every node, with the same model under the same name")
        log.info("a worker has opened the model on %s", answer.node)

    def _mind_the_silence(self) -> None:
        if not self._idle and not self.busy and time.monotonic() - self._heard > _SILENCE_S:
            log.warning("no worker yet: the cluster has no room, or the model is still being opened (ray status)")
            self._heard = time.monotonic()


@final
class _Run:
    """One run: what waits, what is left to be written, and which trials have lost a worker."""

    def __init__(self, lab: Lab, crew: Crew, waiting: Sequence[Trial], total: int) -> None:
        self._lab, self._crew, self._total = lab, crew, total
        self._queue = deque(waiting)
        self._left = {trial.key for trial in waiting}
        self._losses: Counter[str] = Counter()
        self._searched: set[int] = set()
        self._git = git_revision()

    def __call__(self) -> bool:
        """Do all trials; True if a stop was asked for, after the rows of those in hand were written."""
        watch = self._lab.watch
        while self._left:
            watch.progress("trials", self._total - len(self._left), self._total)
            if watch.should_stop():
                while self._crew.busy:
                    self._take(self._crew.collect(_POLL_S))
                return bool(self._left)
            self._crew.fill(len(self._left))
            self._hand_out()
            self._take(self._crew.collect(_POLL_S))
        watch.progress("trials", self._total, self._total)
        return False

    def _hand_out(self) -> None:
        """Give the next trials to idle workers. Whatever writes into the study's folder is done here, while no worker has a
        row that would have to wait for it."""
        while self._queue and not self._lab.watch.should_stop():
            trial = self._queue[0]
            unsearched = needs_search(trial.arm) and trial.seed not in self._searched
            if unsearched or self._makes(trial):
                if self._crew.busy:
                    return
                if unsearched:
                    self._lab.prepared(trial.seed)
                    self._searched.add(trial.seed)
                else:
                    self._settle(row_of(self._lab, self._queue.popleft(), self._git))
            elif self._crew.idle:
                self._crew.hand(self._queue.popleft(), self._manifests(trial))
            else:
                return

    def _makes(self, trial: Trial) -> bool:
        """Whether the first trial of its arm leaves something in the folder, and has not yet: two workers would collide."""
        return (trial.arm in TRAINED or trial.arm == "frozen") and not (self._places(trial)[-1] / MANIFEST).is_file()

    def _places(self, trial: Trial) -> list[Path]:
        """The artifacts that a trial reads."""
        folder, sae = self._lab.ledger.folder, self._lab.spec.sae
        if trial.arm in TRAINED:
            return [folder / f"adapter-{trial.arm}-{trial.seed}"]
        if not needs_search(trial.arm):
            return []
        return [folder / f"search-{trial.seed}", folder / f"sae-{trial.seed}" if sae is None else Path(sae),
                *([folder / f"frozen-{trial.seed}"] if trial.arm == "frozen" else [])]

    def _manifests(self, trial: Trial) -> dict[str, str]:
        paths = [place / MANIFEST for place in self._places(trial)]
        return {str(path): sha256_file(path) for path in paths if path.is_file()}

    def _take(self, came: dict[str, Any] | Lost | None) -> None:
        match came:
            case None:
                return
            case Lost(trial, error):
                self._losses[trial.key] += 1
                again = self._losses[trial.key] < LOSSES
                log.warning("the worker at trial %s (%s, %s) was lost and the trial %s (%d of %d): %s", trial.key, trial.arm,
                            trial.measure, "is put back" if again else "fails", self._losses[trial.key], LOSSES, _line(error))
                if again:
                    self._queue.appendleft(trial)
                    return
                what = f"{LOSSES} workers died at this trial; the last: {_line(error)}"
                self._settle({**head_of(trial), "git": self._git, "subject": self._lab.subject.digest, "status": "failed",
                              "error": {"type": type(error).__name__, "what": what}, "wall_s": 0.0})
            case row:
                if row["status"] == "failed":  # whatever a worker logs stays in Ray's files on its node
                    log.warning("trial %s (%s, %s) failed: %s", row["id"], row["arm"], row["measure"], row["error"]["what"])
                self._settle(row)

    def _settle(self, row: dict[str, Any]) -> None:
        """Write the row of a trial that has none from this run."""
        if row["id"] not in self._left:
            return
        self._left.remove(row["id"])
        self._lab.ledger.append(row)
        self._lab.watch.row(row)
