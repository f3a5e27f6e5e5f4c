"""A real store: tiny subject, an SAE of random directions, and a text that holds a script and characters of several bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from starlette.testclient import TestClient

from dashboards.answering import Dashboard
from dashboards.building import Source, build_store
from dashboards.evidence import EvidenceShelf
from dashboards.finding import Collection, named
from dashboards.guard import Access
from dashboards.models import Models, Opener
from dashboards.notes import Notes
from dashboards.prompting import WAIT_S, Reader
from dashboards.runs import RunShelf
from dashboards.saes import SaeShelf
from dashboards.server import create_app
from dashboards.store import FeatureStore, open_feature_store
from dashboards.surgeon import Surgeon
from features.cards import Lens
from features.searching import Query
from sae.dictionary import LinearDictionary, Provenance, TopK
from sae.formats import save_folder
from sae.harvesting import StoreSpec, harvest
from sae.plan import open_held_out
from sae.store import ActivationStore
from sae.text import TextSpec
from tests import tiny
from undertow.lexicon.forms import Lexicon
from undertow.subjects import Subject, load_subject
from undertow.subjects.unembed import final_norm_and_unembed

SITE = "blocks.1.hook_resid_post"
D_SAE, K, DEAD = 48, 4, 47
SCRIPT = "<script>alert('x')</script>"
HOST = "127.0.0.1:8777"
LEXICON = Lexicon.load("love")


class Made(NamedTuple):
    """Everything behind the store of these tests."""

    folder: Path
    subject: Subject
    dictionary: LinearDictionary
    lens: Lens
    activations: ActivationStore
    store: FeatureStore


def write_text(path: Path) -> None:
    lines = [json.dumps({"id": f"<b>{copy}</b>-{i}", "text": f"{story} {SCRIPT} Été 🙂 {copy}."})
             for copy in range(2) for i, story in enumerate(tiny.STORIES)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("dashboards")
    tiny.save_subject(folder / "llama", "llama")
    write_text(folder / "text.jsonl")
    subject = load_subject(str(folder / "llama"), device="cpu")
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, tiny.D_MODEL, generator=torch.Generator().manual_seed(0)))
    bias = torch.zeros(D_SAE)
    bias[DEAD] = -1e4
    text = TextSpec(source=str(folder / "text.jsonl"), context=32, held_out=0.3)
    provenance = Provenance(str(folder / "llama"), SITE, 32, True,
                            {"text": text.model_dump(), "subject_digest": subject.digest})
    dictionary = LinearDictionary(rows.T.contiguous(), bias, rows, torch.zeros(tiny.D_MODEL), TopK(K), provenance)
    save_folder(dictionary, folder / "sae")
    corpus = open_held_out(provenance, subject, None, None, False)
    activations = harvest(subject, subject.site(SITE), corpus, 2000, folder / "cache", form=StoreSpec(dtype="float32"))
    lens = Lens(subject.tokenizer, final_norm_and_unembed(subject))
    source = Source(str(folder / "sae"), "toy/1", dictionary, lens, activations, 3)
    build_store(source, folder / "store", folder / "cache")
    return Made(folder, subject, dictionary, lens, activations, open_feature_store(folder / "store"))


def query_of(made: Made, dictionary: LinearDictionary | None = None) -> Query:
    """What the opener of the tests' store opens; with another SAE if one is given."""
    return Query(made.subject, made.subject.site(SITE), dictionary or made.dictionary, "toy/1", None)


def dashboard_of(made: Made, notes: Path, opener: Opener | None = None, runs: Path | None = None,
                 wait_s: float = WAIT_S) -> Dashboard:
    """A dashboard of the tests' store whose notes are in the file `notes`."""
    query = query_of(made)
    models = Models(opener or (lambda record: query))
    return Dashboard(Collection(named([made.store])), Notes(notes), Reader(models, wait_s),
                     Surgeon(models, LEXICON), RunShelf(runs), "here", EvidenceShelf(runs), SaeShelf(runs))


@pytest.fixture
def dashboard(made: Made, tmp_path: Path) -> Dashboard:
    return dashboard_of(made, tmp_path / "notes.sqlite")


@pytest.fixture
def client(dashboard: Dashboard) -> Iterator[TestClient]:
    with TestClient(create_app(dashboard, Access(frozenset({HOST}))), base_url=f"http://{HOST}") as made_client:
        yield made_client
