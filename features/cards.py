"""Feature cards: all that is shown of one latent, as one value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from features.examples import BIN_EDGES, ExampleTable
from features.logit_lens import TokenEffect, logit_effect, promoted, suppressed
from features.ranking import AFTER, BEFORE, Examples
from features.wording import Tokenizer, pieces, token_text
from sae.dictionary import known_latents
from undertow.subjects.unembed import UnembedView

N_EFFECTS = 10


class Part(NamedTuple):
    """A readable run of tokens in a context, and the latent's largest activation on them (0: silent there)."""

    text: str
    value: float


class Context(NamedTuple):
    """One firing and the text around it; all text is printable.

    Attributes:
        before: the tokens before the one that fired.
        token: the token that fired (with its neighbours where they share a character).
        after: the tokens after it.
        value: activation of the latent on that token.
        row: token row of the text; position: position in the row. Together they find the place again.
    """

    before: tuple[Part, ...]
    token: Part
    after: tuple[Part, ...]
    value: float
    row: int
    position: int


class WordEffect(NamedTuple):
    """A vocabulary entry as text, and the latent's direct effect on its logit (see `logit_effect`)."""

    token: str
    token_id: int
    effect: float


class Bar(NamedTuple):
    """One histogram bin: activations from `low` up to `high`, and the number of firings in it."""

    low: float
    high: float
    firings: int


@final
@dataclass(frozen=True)
class FeatureCard:
    """All that is known of one latent without a causal test; it has an id and no name.

    Attributes:
        id: the SAE and the latent, e.g. "smollm2/12:1475".
        latent: index of the latent.
        n_tokens: number of tokens that it was measured on.
        measured_on: the text they come from, in words.
        count: number of tokens on which it fired; exact.
        density: count / n_tokens, in [0, 1].
        maximum: largest activation; 0 if it never fired.
        mean: mean activation where it fired; 0 if it never did.
        histogram: firings by activation, from the first to the last occupied bin; empty if it never fired.
        top: strongest contexts, strongest first, of different token rows.
        uniform: contexts drawn uniformly from all firings.
        promoted: tokens whose logit its direction raises most.
        suppressed: tokens whose logit its direction lowers most.
    """

    id: str
    latent: int
    n_tokens: int
    measured_on: str
    count: int
    density: float
    maximum: float
    mean: float
    histogram: tuple[Bar, ...]
    top: tuple[Context, ...]
    uniform: tuple[Context, ...]
    promoted: tuple[WordEffect, ...]
    suppressed: tuple[WordEffect, ...]

    def to_json(self) -> dict[str, Any]:
        """The card as plain JSON values; tuples with names become objects."""
        return {**asdict(self), "histogram": [bar._asdict() for bar in self.histogram],
                "top": [_context_json(context) for context in self.top],
                "uniform": [_context_json(context) for context in self.uniform],
                "promoted": [word._asdict() for word in self.promoted],
                "suppressed": [word._asdict() for word in self.suppressed]}


class Lens(NamedTuple):
    """What turns numbers into words: the tokenizer, and the way out of the residual stream."""

    tokenizer: Tokenizer
    unembed: UnembedView


def feature_id(sae: str, latent: int) -> str:
    """Stable short id of a latent: the SAE's packaged name or the start of its digest, and the index."""
    return f"{sae}:{latent}"


def card(sae: str, latent: int, direction: Float[Tensor, "d_model"], table: ExampleTable, lens: Lens,
         measured_on: str) -> FeatureCard:
    """Card of one latent.

    Args:
        sae: how the SAE is called in the id: its packaged name or its digest.
        latent: index of the latent.
        direction: what one unit of it writes (`Dictionary.directions`).
        table: statistics and examples of the same SAE.
        lens: tokenizer and unembedding of the subject.
        measured_on: the text of the table, in words.

    Raises DictionaryError if the latent is out of range or the direction does not fit the subject.
    """
    known_latents(torch.tensor([latent]), table.d_sae)
    effect = logit_effect(direction, lens.unembed)
    return FeatureCard(
        id=feature_id(sae, latent), latent=latent, n_tokens=table.n_tokens, measured_on=measured_on,
        count=int(table.counts[latent]), density=float(table.density[latent]), maximum=float(table.maxima[latent]),
        mean=float(table.means[latent]), histogram=_histogram(table, latent),
        top=_contexts(table.top, latent, table, lens.tokenizer),
        uniform=_contexts(table.uniform, latent, table, lens.tokenizer),
        promoted=_words(promoted(effect, N_EFFECTS), lens.tokenizer),
        suppressed=_words(suppressed(effect, N_EFFECTS), lens.tokenizer))


def _histogram(table: ExampleTable, latent: int) -> tuple[Bar, ...]:
    counts = table.histogram[latent]
    occupied = counts.nonzero()[0]
    if not len(occupied):
        return ()
    return tuple(Bar(float(BIN_EDGES[i]), float(BIN_EDGES[i + 1]), int(counts[i]))
                 for i in range(occupied[0], occupied[-1] + 1))


def _words(effects: tuple[TokenEffect, ...], tokenizer: Tokenizer) -> tuple[WordEffect, ...]:
    return tuple(WordEffect(token_text(tokenizer, item.token_id), item.token_id, item.effect) for item in effects)


def _contexts(examples: Examples, latent: int, table: ExampleTable, tokenizer: Tokenizer) -> tuple[Context, ...]:
    return tuple(_context(examples, latent, slot, table, tokenizer)
                 for slot in range(examples.indices.shape[1]) if examples.indices[latent, slot] >= 0)


def _context(examples: Examples, latent: int, slot: int, table: ExampleTable, tokenizer: Tokenizer) -> Context:
    row, position = int(examples.rows[latent, slot]), int(examples.positions[latent, slot])
    start = max(0, position - BEFORE)
    ids = table.tokens[row, start:position + AFTER + 1]
    ids = ids[ids >= 0].tolist()
    window = examples.windows[latent, slot, BEFORE - (position - start):]
    parts, fired = [], 0
    for number, piece in enumerate(pieces(tokenizer, ids)):
        parts.append(Part(piece.text, float(window[piece.start:piece.stop].max())))
        if piece.start <= position - start < piece.stop:
            fired = number
    return Context(tuple(parts[:fired]), parts[fired], tuple(parts[fired + 1:]),
                   float(examples.values[latent, slot]), row, position)


def _context_json(context: Context) -> dict[str, Any]:
    return {**context._asdict(), "before": [part._asdict() for part in context.before],
            "token": context.token._asdict(), "after": [part._asdict() for part in context.after]}
