"""A feature store, opened: memory-mapped, read-only, and without a model."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float64, Int, Shaped
from numpy import ndarray

from dashboards.layout import COLUMNS, DETAIL, FORMAT, KIND
from dashboards.strings import Strings
from undertow.core.errors import ArtifactError, DictionaryError
from undertow.core.storage import open_artifact


class Place(NamedTuple):
    """Where a firing lies: document, token row, position in the row."""

    document: str
    row: int
    position: int


@final
@dataclass(frozen=True, eq=False)
class FeatureStore:
    """All that is known of every feature of one SAE on one text.

    Attributes:
        path: the folder.
        record: the record of the run that built it.
        columns: one memory-mapped number a feature, by the names of layout.COLUMNS.
        details: one memory-mapped layout.DETAIL a feature.
        tokens: token rows; −1 after the last measured token.
        documents: index into `document_ids` of every token.
        document_ids: names of the documents.
        passages: what every token of the rows reads as, row after row.
        vocabulary: what every entry of the vocabulary reads as.
    """

    path: Path
    record: dict[str, Any]
    columns: Mapping[str, Shaped[ndarray, "d_sae"]]
    details: Shaped[ndarray, "d_sae"]
    tokens: Int[ndarray, "row pos"]
    documents: Int[ndarray, "row pos"]
    document_ids: list[str]
    passages: Strings
    vocabulary: Strings

    @property
    def d_sae(self) -> int:
        """Number of features."""
        return len(self.details)

    @property
    def n_tokens(self) -> int:
        """Number of tokens that the figures were measured on."""
        return int(self.record["n_tokens"])

    @property
    def name(self) -> str:
        """How the SAE is called in the ids of its features."""
        return str(self.record["name"])

    @property
    def title(self) -> str:
        """How the SAE is called where its folder or packaged name says more than the digest in `name`."""
        return title_of(str(self.record["spec"]["sae"]))

    @property
    def dictionary(self) -> str:
        """Digest of the SAE; labels, notes and stars are kept under it."""
        return str(self.record["dictionary"])

    @cached_property
    def density(self) -> Float64[ndarray, "d_sae"]:
        """Share of tokens on which each feature fires: count / n_tokens, in [0, 1]."""
        return self.columns["count"] / max(self.n_tokens, 1)

    @cached_property
    def folded_vocabulary(self) -> Shaped[ndarray, "vocab"]:
        """The vocabulary in folded case, for searching."""
        return np.array([text.casefold() for text in self.vocabulary.between(0, len(self.vocabulary))], dtype=np.str_)

    def known(self, latent: int) -> int:
        """`latent`. Raises DictionaryError if the SAE has no such feature."""
        if not 0 <= latent < self.d_sae:
            raise DictionaryError(f"no feature {latent}: this SAE has {self.d_sae:,}", f"choose from 0 to {self.d_sae - 1}")
        return latent

    def row_texts(self, row: int) -> list[str]:
        """What each position of a token row reads as; "" on padding and where a token shares the character before it."""
        width = self.tokens.shape[1]
        return self.passages.between(row * width, (row + 1) * width)

    def place(self, row: int, position: int) -> Place:
        """Document, row and position of a token; the document is "" where the token belongs to none."""
        index = int(self.documents[row, position])
        return Place(self.document_ids[index] if index >= 0 else "", row, position)

    def token(self, token_id: int) -> str:
        """What a vocabulary entry reads as; "" for −1."""
        return self.vocabulary[token_id] if token_id >= 0 else ""


def open_feature_store(path: Path) -> FeatureStore:
    """Open a store. Raises ArtifactError if it is missing, damaged, or of another format."""
    record = open_artifact(path, KIND).record
    if record.get("format") != FORMAT:
        raise ArtifactError(f"{path} has format {record.get('format')}; this version reads format {FORMAT}",
                            f"build it again: {build_command(record)}")
    columns = {name: _mapped(path / "columns" / f"{name}.npy") for name in COLUMNS}
    details = _mapped(path / "details.npy")
    if details.dtype != DETAIL:
        raise ArtifactError(f"{path / 'details.npy'} holds {details.dtype.itemsize} bytes a feature in another layout",
                            f"build it again: {build_command(record)}")
    ids = json.loads((path / "documents.json").read_text(encoding="utf-8"))
    return FeatureStore(path, record, columns, details, _mapped(path / "tokens.npy"), _mapped(path / "documents.npy"), ids,
                        Strings(path, "passages"), Strings(path, "vocabulary"))


def _mapped(path: Path) -> ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def title_of(source: str) -> str:
    """The last part of an SAE's folder, or its packaged name."""
    return Path(source).name if Path(source).is_absolute() else source


def slug(name: str) -> str:
    """A store's name in addresses: lower-case letters, digits and single hyphens; never a path."""
    return re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-") or "store"


def build_command(record: Mapping[str, Any]) -> str:
    """The command that builds a store with this record again (in another folder)."""
    spec = record["spec"]
    words = ["undertow", "dashboard", "build", spec["sae"], *spec["options"], "--split", spec["split"],
             "--tokens", str(spec["tokens"]), "--seed", str(record["seed"])]
    return f"{shlex.join(words)} --out DIR"
