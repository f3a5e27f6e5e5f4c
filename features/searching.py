"""Which latents fire on a given text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from features.cards import feature_id
from features.examples import ExampleTable
from features.wording import pieces
from sae.dictionary import Dictionary
from sae.harvesting import MASSIVE
from undertow.core.errors import DictionaryError, TextError
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import tap


class Firing(NamedTuple):
    """One latent on one token."""

    id: str
    latent: int
    value: float


class ReadToken(NamedTuple):
    """One token of the text and the latents that fire on it, strongest first.

    `measured` is False on massive activations, which no figure counts; no latent is listed there.
    `text` is empty where a character is spread over several tokens: the first of them carries it.
    """

    text: str
    token_id: int
    measured: bool
    firings: tuple[Firing, ...]


class FoundFeature(NamedTuple):
    """One latent that fires on the text.

    Attributes:
        id: name of the latent, e.g. "smollm2/12:1475".
        latent: its index.
        value: its largest activation on the text.
        token: index of the token where that is, and `text`, what it reads as.
        fired_on: number of tokens of the text on which it fires.
        density: share of tokens on which it fires in ordinary text, in [0, 1]; None if no table of examples is at hand.
    """

    id: str
    latent: int
    value: float
    token: int
    text: str
    fired_on: int
    density: float | None


class SearchResult(NamedTuple):
    """What a text sets off, strongest feature first; `n_tokens` is the number of tokens that were measured."""

    n_tokens: int
    tokens: tuple[ReadToken, ...]
    features: tuple[FoundFeature, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; a density that is not known is left out."""
        features = [{name: value for name, value in found._asdict().items() if value is not None}
                    for found in self.features]
        tokens = [{**token._asdict(), "firings": [firing._asdict() for firing in token.firings]}
                  for token in self.tokens]
        return {"n_tokens": self.n_tokens, "tokens": tokens, "features": features}


class Query(NamedTuple):
    """What to search with: subject, site, SAE, the SAE's name in ids, and a table of its examples if there is one."""

    subject: Subject
    site: Site
    dictionary: Dictionary
    sae: str
    table: ExampleTable | None


def search(query: Query, text: str, per_token: int) -> SearchResult:
    """Run `text` through the subject and list the latents that fire.

    The text is read in rows of the SAE's context size, each with the BOS token before it, as in training. Left out as
    everywhere: position 0, and massive activations (longer than the ceiling in the SAE's provenance; where there is
    none, than ten times the median of this text).

    Args:
        query: subject, site, SAE.
        text: any text of at least one token.
        per_token: latents listed a token, at most.

    Raises:
        TextError: nothing to measure in the text.
        DictionaryError: the SAE reads another width.
    """
    subject, dictionary = query.subject, query.dictionary
    if dictionary.d_in != subject.d_model:
        raise DictionaryError(f"the SAE reads activations of width {dictionary.d_in}; {subject.name} has "
                              f"{subject.d_model}", "give the subject that it was trained on with --model")
    ids, activations = _read(query, text)
    measured = _measured(activations, dictionary)
    with torch.inference_mode():
        codes = dictionary.encode_sparse(activations)
    fires = (codes.values > 0) & measured[codes.rows]
    rows, latents, values = codes.rows[fires], codes.latents[fires], codes.values[fires]
    texts = _texts(query, ids)
    strongest = torch.argsort(values, descending=True, stable=True).tolist()
    listed: list[list[Firing]] = [[] for _ in ids]
    found: dict[int, FoundFeature] = {}
    for i in strongest:
        token, latent, value = int(rows[i]), int(latents[i]), float(values[i])
        name = feature_id(query.sae, latent)
        if len(listed[token]) < per_token:
            listed[token].append(Firing(name, latent, value))
        if latent in found:
            found[latent] = found[latent]._replace(fired_on=found[latent].fired_on + 1)
        else:
            density = None if query.table is None else float(query.table.density[latent])
            found[latent] = FoundFeature(name, latent, value, token, texts[token], 1, density)
    tokens = (ReadToken(texts[i], ids[i], bool(measured[i]), tuple(listed[i])) for i in range(len(ids)))
    return SearchResult(int(measured.sum()), tuple(tokens), tuple(found.values()))


def _read(query: Query, text: str) -> tuple[list[int], Float[Tensor, "token d_model"]]:
    """Token ids (without position 0 of each row) and their activations."""
    ids: list[int] = []
    parts: list[Tensor] = []
    for row in _rows(query.subject, text, query.dictionary.provenance.context_size):
        acts = tap(query.subject, torch.tensor([row]), query.site)
        ids += row[1:]
        parts.append(acts[0, 1:].float().cpu())
    if not ids:
        raise TextError(f"the text {text!r} has no token to measure", "give a longer text")
    return ids, torch.cat(parts)


def _measured(activations: Float[Tensor, "token d_model"], dictionary: Dictionary) -> Bool[Tensor, "token"]:
    norms = activations.norm(dim=-1)
    return norms <= float(dictionary.provenance.extra.get("norm_ceiling", MASSIVE * norms.median()))


def _rows(subject: Subject, text: str, context: int) -> Iterator[list[int]]:
    ids = subject.encode(text)
    head = [] if subject.bos_id is None else [subject.bos_id]
    body = ids[len(head):]
    step = context - len(head)
    for start in range(0, len(body), step):
        yield head + body[start:start + step]


def _texts(query: Query, ids: list[int]) -> list[str]:
    """What each token reads as; of several tokens that share a character, the first."""
    texts = [""] * len(ids)
    for piece in pieces(query.subject.tokenizer, ids):
        texts[piece.start] = piece.text
    return texts
