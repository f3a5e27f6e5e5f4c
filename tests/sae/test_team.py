"""Two processes train what one does: gradients, the choice over the batch, dead clocks and figures are of the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.architectures import Architecture
from sae.corpus import TextSpec, open_corpus
from sae.harvesting import StoreSpec, harvest
from sae.team import ALONE, Team
from sae.training import Trainer
from tests.cli.test_sae_cli import train_words
from tests.sae.test_training import spec_of, synthetic
from undertow.core.errors import SpecError
from undertow.subjects import Subject

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 20, 64
# gloo meets over a file and stays on the loopback device
WORKER = """
import json, sys
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from sae.team import Team
from sae.training import Trainer, TrainSpec

folder, rank, shared = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "shared"
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2,
                               timeout=timedelta(seconds=60))
team = Team(rank, 2)
x = load_file(folder / "x.safetensors")["x"]
for name, values in json.loads((folder / "specs.json").read_text()).items():
    spec = TrainSpec.checked(values, "test")
    trainer = Trainer.begin(spec, x[:256], team=team)
    for step in range(spec.steps):
        batch = x[step * spec.batch_size:(step + 1) * spec.batch_size]
        report = trainer.step(batch[team.share_of(len(batch))] if shared else batch[:len(batch) // 2])
    weights = {key: value.detach() for key, value in trainer.weights._asdict().items()}
    facts = torch.tensor([trainer.threshold, *report], dtype=torch.float64)
    save_file({**weights, "idle": trainer.idle, "facts": facts}, folder / f"{name}-{rank}.safetensors")
distributed.barrier()
distributed.destroy_process_group()
"""


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


def specs() -> dict[str, dict[str, Any]]:
    """Every architecture; AuxK has latents to revive, since a twentieth of the run is one batch."""
    return {name: spec_of(name, d_sae=48, steps=STEPS, batch_size=BATCH, lr=3e-3, aux_coefficient=1.0).model_dump(mode="json")
            for name in get_args(Architecture)}


def run_two(folder: Path, how: str) -> None:
    x = torch.cat(list(synthetic(STEPS, BATCH))).double()
    save_file({"x": x}, folder / "x.safetensors")
    (folder / "specs.json").write_text(json.dumps(specs()))
    workers = [subprocess.Popen([sys.executable, "-c", WORKER, str(folder), str(rank), how], cwd=ROOT, env=environment(),
                                stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors


def differences(folder: Path) -> dict[str, float]:
    """Largest relative difference from one process, by architecture; both members must hold the same bits."""
    x = load_file(folder / "x.safetensors")["x"]
    found: dict[str, float] = {}
    for name in get_args(Architecture):
        first, second = (load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first), name
        alone = Trainer.begin(spec_of(name, d_sae=48, steps=STEPS, batch_size=BATCH, lr=3e-3, aux_coefficient=1.0), x[:256])
        reports = [alone.step(batch) for batch in x.split(BATCH)]
        if name == "topk":
            assert max(report.dead_share for report in reports) > 0  # AuxK had something to do
        pairs = [(first[key], value.detach()) for key, value in alone.weights._asdict().items()]
        pairs.append((first["facts"], torch.tensor([alone.threshold, *reports[-1]], dtype=torch.float64)))
        found[name] = max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-300)) for a, b in pairs)
        if found[name] < 1e-6:
            assert torch.equal(first["idle"], alone.idle), name
    return found


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    run_two(tmp_path, "shared")
    assert {name: off for name, off in differences(tmp_path).items() if off > 1e-9} == {}


@pytest.mark.slow
def test_the_comparison_sees_members_that_repeat_one_share(tmp_path: Path) -> None:
    """Negative control: both members train on the first half of every batch."""
    run_two(tmp_path, "same")
    assert all(off > 1e-3 for off in differences(tmp_path).values())


# ---------------------------------------------------------------- one harvest by two


HARVESTER = """
import sys
from datetime import timedelta
from pathlib import Path

from torch import distributed

from sae.corpus import TextSpec, open_corpus
from sae.harvesting import Source, StoreSpec, harvest_together
from sae.team import Team
from undertow.subjects import load_subject

folder, cache, meet, rank, wanted, rounds = *map(Path, sys.argv[1:4]), *map(int, sys.argv[4:7])
distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
subject = load_subject(str(folder / "llama"), device="cpu")
corpus = open_corpus(TextSpec(source=str(folder / "text.jsonl"), context=32), "train", subject.tokenizer, subject.bos_id)
asked = iter(range(rounds))
store = harvest_together(Source(subject, subject.site("blocks.1.hook_resid_post"), corpus), wanted, cache,
                         StoreSpec(memory_mb=0.07), Team(rank, 2),
                         (lambda done, total: print("done", done), lambda: rank == 1 and next(asked, None) is None))
print("store", store and store.n)
distributed.barrier()
distributed.destroy_process_group()
"""


def harvest_by_two(folder: Path, cache: Path, wanted: int, rounds: int = 10**6) -> list[str]:
    """What both members print; the second one asks for a stop after so many rounds."""
    meet = cache.with_name(f"{cache.name}-{wanted}-{rounds}")
    workers = [subprocess.Popen([sys.executable, "-c", HARVESTER, str(folder), str(cache), str(meet), str(rank), str(wanted),
                                 str(rounds)], cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                text=True) for rank in range(2)]
    said = [worker.communicate(timeout=120) for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), said
    return [out for out, _ in said]


@pytest.mark.slow
@pytest.mark.parametrize("wanted", [1500, 10**6], ids=["to the end of a pass", "all there is"])
def test_two_processes_harvest_what_one_does(wanted: int, folder: Path, subject: Subject, tmp_path: Path) -> None:
    """The same files, byte for byte; also where the two were stopped in between and went on."""
    corpus = open_corpus(TextSpec(source=str(folder / "text.jsonl"), context=32), "train", subject.tokenizer, subject.bos_id)
    site = subject.site("blocks.1.hook_resid_post")
    alone = harvest(subject, site, corpus, wanted, tmp_path / "alone", form=StoreSpec(memory_mb=0.07))
    first, second = harvest_by_two(folder, tmp_path / "two", wanted)
    assert f"store {alone.n}" in first and f"store {alone.n}" in second and first.count("done") > 2 and "done" not in second
    stopped = harvest_by_two(folder, tmp_path / "again", wanted, rounds=1)
    assert all("store None" in out for out in stopped)
    work, = (tmp_path / "again" / "activations").iterdir()
    (work / "part-999.safetensors").write_bytes(b"of a process that was killed")
    harvest_by_two(folder, tmp_path / "again", wanted)
    for cache in ("two", "again"):
        other = tmp_path / cache / "activations" / alone.path.name
        names = sorted(path.name for path in alone.path.glob("*.safetensors"))
        assert sorted(path.name for path in other.glob("*.safetensors")) == names and len(names) > 4
        assert [(other / name).read_bytes() == (alone.path / name).read_bytes() for name in names] == [True] * len(names)
        assert [path.name for path in other.parent.iterdir()] == [alone.path.name]  # and nothing beside it


def test_a_batch_that_cannot_be_divided_is_refused() -> None:
    assert [Team(rank, 3).share_of(12) for rank in range(3)] == [slice(0, 4), slice(4, 8), slice(8, 12)]
    assert ALONE.share_of(7) == slice(0, 7)
    with pytest.raises(SpecError, match="a batch of 64 cannot be divided among 3 processes") as refused:
        Team(0, 3).share_of(64)
    assert "e.g. 63" in refused.value.hint


@pytest.mark.slow
def test_torchrun(folder: Path, tmp_path: Path) -> None:
    """The command line: two processes write one SAE, near the one that one process writes, and refuse what cannot be shared."""
    made: dict[str, dict[str, Any]] = {}
    for name, words in (("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
                                 "--nproc-per-node", "2", "-m", "undertow"]), ("one", [sys.executable, "-m", "undertow"])):
        command = [*words, *train_words(folder, tmp_path / name, {"--device": "cpu"})]
        done = subprocess.run([*command, "--json"], cwd=ROOT, text=True, capture_output=True, check=False, timeout=250,
                              env=environment(UNDERTOW_CACHE=str(tmp_path / f"{name}-cache")))
        assert done.returncode == 0, done.stderr[-3000:]
        made[name] = json.loads(done.stdout.splitlines()[-1])
        if name == "two":
            odd = subprocess.run([*words, *train_words(folder, tmp_path / "odd", {"--device": "cpu", "--batch-size": "33"})],
                                 cwd=ROOT, text=True, capture_output=True, check=False, timeout=250,
                                 env=environment(UNDERTOW_CACHE=str(tmp_path / "odd-cache")))
            assert odd.returncode != 0 and "a batch of 33 cannot be divided among 2 processes" in odd.stderr + odd.stdout
            assert not list(tmp_path.glob("odd*"))
    assert made["two"]["steps"] == made["one"]["steps"]
    assert made["two"]["fvu"] == pytest.approx(made["one"]["fvu"], rel=1e-2)
