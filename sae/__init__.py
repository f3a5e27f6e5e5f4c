"""Sparse autoencoders: text, harvest, activation store, training, sae-lens' formats, metrics, sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from undertow.core.lazy import lazy_names

if TYPE_CHECKING:
    from sae.corpus import Corpus, TokenBatch, open_corpus
    from sae.dictionary import Codes, Dictionary, LinearDictionary, Provenance
    from sae.evaluation import Evaluation, evaluate
    from sae.formats import check_fits, import_sae, load, packaged_names, save_folder
    from sae.harvesting import Source, harvest, stream
    from sae.metrics import reconstruction
    from sae.store import ActivationStore, open_store
    from sae.text import Document, Message, TextSpec, read_documents
    from sae.training import Trainer, TrainSpec, train

__all__ = ["ActivationStore", "Codes", "Corpus", "Dictionary", "Document", "Evaluation", "LinearDictionary", "Message",
           "Provenance", "Source", "TextSpec", "TokenBatch", "TrainSpec", "Trainer", "check_fits", "evaluate", "harvest",
           "import_sae", "load", "open_corpus", "open_store", "packaged_names", "read_documents", "reconstruction",
           "save_folder", "stream", "train"]
__getattr__ = lazy_names(__name__, {
    "Corpus": "corpus", "TokenBatch": "corpus", "open_corpus": "corpus",
    "Codes": "dictionary", "Dictionary": "dictionary", "LinearDictionary": "dictionary", "Provenance": "dictionary",
    "Evaluation": "evaluation", "evaluate": "evaluation",
    "check_fits": "formats", "import_sae": "formats", "load": "formats", "packaged_names": "formats",
    "save_folder": "formats",
    "Source": "harvesting", "harvest": "harvesting", "stream": "harvesting",
    "reconstruction": "metrics",
    "ActivationStore": "store", "open_store": "store",
    "Document": "text", "Message": "text", "TextSpec": "text", "read_documents": "text",
    "TrainSpec": "training", "Trainer": "training", "train": "training",
})
