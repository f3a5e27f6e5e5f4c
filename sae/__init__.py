"""Sparse autoencoders: text, harvest, activation store, training, sae-lens' formats, metrics, sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undertow.core.lazy import lazy_names

if TYPE_CHECKING:
    from sae.architectures import Penalty, TrainSpec
    from sae.comparing import compare, overlap
    from sae.corpus import Corpus, TokenBatch, open_corpus
    from sae.dictionary import Codes, Dictionary, LinearDictionary, Provenance
    from sae.evaluation import Evaluation, evaluate
    from sae.formats import check_fits, import_sae, load, packaged_names, save_folder
    from sae.grid import GridSpec, run_grid
    from sae.harvesting import Source, harvest, harvest_sites, stream
    from sae.metrics import reconstruction
    from sae.normed import NormedDictionary, reconstruct
    from sae.store import ActivationStore, open_store
    from sae.text import Document, Message, TextSpec, read_documents
    from sae.training import Trainer, train

__all__ = ["ActivationStore", "Codes", "Corpus", "Dictionary", "Document", "Evaluation", "GridSpec", "LinearDictionary",
           "Message", "NormedDictionary", "Penalty", "Provenance", "Source", "TextSpec", "TokenBatch", "TrainSpec", "Trainer",
           "check_fits", "compare", "evaluate", "harvest", "harvest_sites", "import_sae", "load", "open_corpus", "open_store",
           "overlap", "packaged_names", "read_documents", "reconstruct", "reconstruction", "run_grid", "save_folder", "stream",
           "train"]
__getattr__ = lazy_names(__name__, {
    "Penalty": "architectures", "TrainSpec": "architectures",
    "compare": "comparing", "overlap": "comparing",
    "Corpus": "corpus", "TokenBatch": "corpus", "open_corpus": "corpus",
    "Codes": "dictionary", "Dictionary": "dictionary", "LinearDictionary": "dictionary", "Provenance": "dictionary",
    "Evaluation": "evaluation", "evaluate": "evaluation",
    "check_fits": "formats", "import_sae": "formats", "load": "formats", "packaged_names": "formats",
    "save_folder": "formats",
    "GridSpec": "grid", "run_grid": "grid",
    "Source": "harvesting", "harvest": "harvesting", "harvest_sites": "harvesting", "stream": "harvesting",
    "reconstruction": "metrics",
    "NormedDictionary": "normed", "reconstruct": "normed",
    "ActivationStore": "store", "open_store": "store",
    "Document": "text", "Message": "text", "TextSpec": "text", "read_documents": "text",
    "Trainer": "training", "train": "training",
})
