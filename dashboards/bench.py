"""How fast the dashboard is: building, beside SAEDashboard on the same SAE, token rows, machine and threads; and answering.

SAEDashboard needs other versions of what we stand on, so it runs in a Python of its own (`dashboards/peer.py`).
"""

from __future__ import annotations

import http.client
import json
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from socket import create_server
from typing import Any, NamedTuple

import numpy as np
import torch
import uvicorn
from jaxtyping import Int

from dashboards import peer
from dashboards.answering import Dashboard
from dashboards.building import Source, build_store
from dashboards.finding import Collection
from dashboards.guard import access_for
from dashboards.models import Models
from dashboards.notes import Notes
from dashboards.prompting import Reader
from dashboards.runs import RunShelf
from dashboards.server import create_app
from dashboards.store import FeatureStore, open_feature_store
from dashboards.surgeon import Surgeon
from features.cards import Lens
from sae.corpus import Corpus
from sae.dictionary import LinearDictionary, Provenance, TopK
from sae.formats import CFG, save_folder
from sae.harvesting import harvest, rows_per_pass
from undertow.core.errors import DictionaryError, TextError
from undertow.core.seeds import generator
from undertow.core.storage import write_json
from undertow.lexicon.forms import Lexicon
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import tap
from undertow.subjects.unembed import final_norm_and_unembed

PEER = "SAEDashboard"
PEER_VENV = ("python3 -m venv peer",
             f"peer/bin/pip install torch=={torch.__version__.split('+')[0]} sae-dashboard 'pyarrow<21'",
             "peer/bin/pip uninstall -y torchvision torchaudio")
"""What makes the Python that has SAEDashboard; the last two words of it mend its own requirements as they stand in 0.8.0."""
UNIT = 1e-3  # by how much the length of a decoder row may differ from 1 where SAEDashboard is to read the SAE
SHARED_FROM = 65_536  # synthetic stores at least this wide show one feature's details for all


class Material(NamedTuple):
    """What is built from: an SAE, its subject and site, and the first `rows` token rows of a text."""

    dictionary: LinearDictionary
    subject: Subject
    site: Site
    corpus: Corpus
    rows: int

    def tokens(self) -> Int[torch.Tensor, "row pos"]:
        """The token rows. Raises TextError if the text has fewer whole ones."""
        found: list[torch.Tensor] = []
        for batch in self.corpus.batches(rows_per_pass(self.subject, self.corpus.spec.context)):
            found += batch.tokens[batch.attend.all(dim=1)]
            if len(found) >= self.rows:
                return torch.stack(found[:self.rows])
        raise TextError(f"the text has {len(found):,} whole token rows, and {self.rows:,} were asked for",
                        "lower --tokens, or name a longer --text")


class Built(NamedTuple):
    """A store that was built: seconds from the text to the finished folder, of the clock and of the processor; the store."""

    seconds: float
    cpu_seconds: float
    store: FeatureStore


def whole_passes(subject: Subject, context: int, tokens: int) -> int:
    """Token rows for `tokens` tokens, up to a whole forward pass: the harvest reads no less."""
    per_pass = rows_per_pass(subject, context)
    return -(-tokens // (context * per_pass)) * per_pass


def random_dictionary(subject: Subject, site: str, d_sae: int, k: int) -> LinearDictionary:
    """An SAE of random directions: as much work as a trained one, and needs no training."""
    rows = torch.nn.functional.normalize(torch.randn(d_sae, subject.d_model, generator=generator(0, "bench")), dim=1)
    return LinearDictionary(rows.T.contiguous(), torch.zeros(d_sae), rows, torch.zeros(subject.d_model), TopK(k),
                            Provenance(subject.name, site, 256, True))


def build(material: Material, folder: Path) -> Built:
    """Read the rows with the subject, and write the store; nothing is taken from a cache."""
    dictionary, subject, site, corpus, rows = material
    wanted = rows * (corpus.spec.context - 1) - 16  # a massive activation left out must not cost another pass
    began, cpu = time.perf_counter(), time.process_time()
    activations = harvest(subject, site, corpus, wanted, folder / "cache")
    lens = Lens(subject.tokenizer, final_norm_and_unembed(subject))
    build_store(Source("bench", "bench", dictionary, lens, activations, 0), folder / "store", folder / "cache")
    return Built(time.perf_counter() - began, time.process_time() - cpu, open_feature_store(folder / "store"))


def store_bytes(store: FeatureStore) -> tuple[float, float]:
    """Bytes a feature: of what is kept for each one, and of the whole folder with its texts."""
    own = sum(path.stat().st_size for path in (store.path / "details.npy", *(store.path / "columns").iterdir()))
    whole = sum(path.stat().st_size for path in store.path.rglob("*") if path.is_file())
    return own / store.d_sae, whole / store.d_sae


def write_job(material: Material, features: int, folder: Path) -> Path:
    """Everything that SAEDashboard needs for the first `features` features, as files; returns the job's.

    Raises DictionaryError for an SAE that it would refuse: of TopK it takes those whose decoder rows have length 1.
    """
    dictionary, subject, site, _, _ = material
    lengths = dictionary.W_dec.float().norm(dim=1)
    if float((lengths - 1).abs().max()) > UNIT:
        raise DictionaryError(f"decoder rows are {float(lengths.min()):.3g} to {float(lengths.max()):.3g} long, and {PEER} "
                              "scales rows to length 1, which would make another SAE of it")
    tokens = material.tokens()
    folder.mkdir(parents=True)
    subject.hf_model.save_pretrained(folder / peer.MODEL)
    subject.tokenizer.save_pretrained(folder / peer.MODEL)
    theta = _older_layout(folder / peer.MODEL)
    save_folder(dictionary, folder / peer.SAE)
    cfg = json.loads((folder / peer.SAE / CFG).read_text(encoding="utf-8"))
    if cfg["architecture"] == "topk":
        write_json(folder / peer.SAE / CFG, {**cfg, "rescale_acts_by_decoder_norm": True})  # by 1: nothing, but it insists
    np.save(folder / peer.TOKENS, tokens.numpy(), allow_pickle=False)
    np.save(folder / peer.ACTS, tap(subject, tokens[:1], site, None).float().numpy(), allow_pickle=False)
    job = folder / "job.json"
    write_json(job, {"threads": torch.get_num_threads(), "site": site.name, "features": features, "rope_theta": theta})
    return job


def _older_layout(folder: Path) -> float | None:
    """Say what transformers 5 writes in the words of transformers 4 too; the base of the rotations, where there is one."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    theta = (config.get("rope_parameters") or {}).get("rope_theta", config.get("rope_theta"))
    write_json(folder / "config.json", {**config, **({} if theta is None else {"rope_theta": theta})})
    words = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer_config.json", {**words, "tokenizer_class": "PreTrainedTokenizerFast"})
    return theta


def ask_peer(python: str, job: Path) -> dict[str, Any]:
    """What SAEDashboard took. Raises DictionaryError with the last of its words if it could not run."""
    script = job.parent / "peer.py"  # a copy: the folder it lies in must not be a place to import from
    shutil.copyfile(Path(peer.__file__), script)
    if shutil.which(python) is None:
        raise DictionaryError(f"{python} is no program", _peer_hint())
    ran = subprocess.run([python, "-I", str(script), str(job)], capture_output=True, text=True, check=False,
                         cwd=job.parent)
    lines = (ran.stdout if ran.returncode == 0 else ran.stderr).strip().splitlines()
    if ran.returncode or not lines:
        raise DictionaryError(f"{PEER} could not run: {lines[-1] if lines else 'it said nothing'}", _peer_hint())
    return json.loads(lines[-1])


def _peer_hint() -> str:
    return "make a Python that has it: " + "; ".join(PEER_VENV)


def widened(store: FeatureStore, n: int, folder: Path) -> FeatureStore:
    """A store of `n` features made of those of `store`, with columns that were drawn from its own and jittered.

    Columns are memory-mapped, as in a real one. From SHARED_FROM features on all show the details of one.
    """
    drawn = generator(0, f"widened {n}")
    order = torch.randint(store.d_sae, (n,), generator=drawn).numpy()
    jitter = (0.5 + torch.rand(n, generator=drawn)).numpy()
    folder.mkdir(parents=True)
    columns = {}
    for name, values in store.columns.items():
        made = values[order]
        np.save(folder / f"{name}.npy", (made * jitter).astype(made.dtype) if name in ("count", "maximum", "mean") else made)
        columns[name] = np.load(folder / f"{name}.npy", mmap_mode="r")
    if n >= SHARED_FROM:
        details = np.lib.stride_tricks.as_strided(store.details[:1], (n,), (0,), writeable=False)
    else:
        np.save(folder / "details.npy", store.details[order])
        details = np.load(folder / "details.npy", mmap_mode="r")
    return replace(store, columns=columns, details=details)


@contextmanager
def served(store: FeatureStore) -> Iterator[Callable[[str], float]]:
    """A server of that store on a free port of this machine; gives what asks for a view and returns its milliseconds."""
    def opener(record: Any) -> Any:
        raise DictionaryError("no model here")

    models = Models(opener)
    with tempfile.TemporaryDirectory() as folder, create_server(("127.0.0.1", 0)) as listening:
        dashboard = Dashboard(Collection({"bench": store}), Notes(Path(folder) / "notes.sqlite"), Reader(models),
                              Surgeon(models, Lexicon.load("love")), RunShelf(None), "bench")
        port = listening.getsockname()[1]
        app = create_app(dashboard, access_for("127.0.0.1", port, ""))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield lambda view: _ask(port, f"/s/bench/{view}")
        finally:
            server.should_exit = True
            thread.join()


def timed(work: Callable[[], Any]) -> float:
    """Milliseconds that some work takes."""
    began = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - began)


def _ask(port: int, path: str) -> float:
    """Milliseconds from the request to the last byte of the answer. Raises DictionaryError for any answer but 200."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    answer.read()
    elapsed = 1e3 * (time.perf_counter() - began)
    connection.close()
    if answer.status != 200:
        raise DictionaryError(f"{path} was answered with {answer.status}")
    return elapsed
