"""How much of which latent, and where: the largest effect on the decision for a given change of ordinary text.

Let w_i be the floor of latent i in multiples of its typical activation h_i. By first order the decision moves by G·w, G being
the attribution (`carried`). By second order ordinary text moves by

    KL(base‖arm) ≈ ½ wᵀHw,   H_ij = mean of a_i·a_j over tokens and over next tokens drawn from the model,
    a_i = max(0, h_i − f_i) · d_i · ∂ log p(what was drawn) / ∂x

the Fisher information of what the model says next along the decoder directions (Amari 1998; drawn and not observed tokens:
Kunstner et al. 2019, arXiv 1905.12558). We depart from it in one point: each token is taken by itself. With the products
between tokens H is estimated too badly from a few texts, and what was chosen by it moved the decision less at the same KL. The
largest G·w at a given wᵀHw + c·(L·w)², w ≥ 0, with L what each latent does to the word, is a non-negative least squares
problem: latents that raise the word are taken together with others that lower it. Its solution is sparse by itself; it is cut
to a wanted number of latents by leaving out the least w_i·G_i, one at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import nnls
from scipy.sparse import csr_matrix
from torch import Tensor

from features.carried import Levels, Slope, room, slope_of
from sae.dictionary import Dictionary
from undertow.core.seeds import generator
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject

DRAWS = 2
TOKEN_PRICE, CHANGE_PRICE = 0.35, 0.15  # of acting on all of ordinary text, and of all its change, in shares of the effect
MOST_TRIGGERS = 32
_RIDGE = 0.02  # of H's own diagonal, which is estimated from few texts
_WORD = 1.0  # c, where H and L·Lᵀ are scaled to a mean diagonal of 1
_ROUNDS = 2


@final
class Balance(NamedTuple):
    """Effects of floors at w = 1, token by token.

    Attributes:
        pool: the candidates, latents.
        gain: on D, nats, at the tokens of the situations; their sum over tokens, divided by the situations, is G.
        harm: a of the formula, nats, at the tokens of ordinary text, once for each draw.
        fires, fires_ordinary: 1 where a latent is active at the same tokens.
        word: on the log of the word's probability, summed over a text, nats, at the tokens of ordinary text; their sum is L.
        fires_word: as `fires`, at these tokens.
    """

    pool: tuple[int, ...]
    gain: Float[np.ndarray, "token pool"]
    harm: Float[np.ndarray, "token pool"]
    fires: csr_matrix
    fires_ordinary: csr_matrix
    word: Float[np.ndarray, "token pool"]
    fires_word: csr_matrix


@final
class Balanced(NamedTuple):
    """Latents with their weights, the largest 1, and the latents at whose firings they are held up; none: everywhere."""

    latents: tuple[int, ...]
    weights: tuple[float, ...]
    trigger: tuple[int, ...]


def drawn_slopes(subject: Subject, site: Site, rows: Sequence[Sequence[int]], seed: int, draws: int = DRAWS) -> list[Slope]:
    """Gradients of log p of next tokens that are drawn from the model, after every token of each text but its first.

    Args:
        subject: the model.
        site: where.
        rows: texts as token ids, three tokens or more.
        seed: of the draws.
        draws: a text, each a slope of its own.
    """
    random = generator(seed, "drawn tokens", device=str(subject.device))

    def said(logits: Float[Tensor, "pos vocab"]) -> Float[Tensor, ""]:
        logs = logits[1:].log_softmax(dim=-1)
        drawn = torch.multinomial(logs.detach().exp(), 1, generator=random)
        return logs.gather(1, drawn).sum()

    return [slope_of(subject, site, ids, said, 0) for ids in rows for _ in range(draws)]


def word_slopes(subject: Subject, site: Site, rows: Sequence[Sequence[int]], tokens: Int64[Tensor, "token"]) -> list[Slope]:
    """Gradients of log Σ P(one of `tokens` comes next), the sum being over the tokens of a text but its first."""
    def said(logits: Float[Tensor, "pos vocab"]) -> Float[Tensor, ""]:
        return logits[1:].log_softmax(dim=-1)[:, tokens.to(logits.device)].logsumexp(dim=-1).logsumexp(dim=0)

    return [slope_of(subject, site, ids, said, 0) for ids in rows]


@final
class Slopes(NamedTuple):
    """Gradients from which sets are proposed.

    Attributes:
        decisions: of D, in baseline situations (`carried.decision_slopes`).
        drawn: of what the model says next in ordinary text (`drawn_slopes`).
        word: of the word in ordinary text (`word_slopes`).
    """

    decisions: list[Slope]
    drawn: list[Slope]
    word: list[Slope]


def balance(dictionary: Dictionary, slopes: Slopes, pool: Sequence[int], known: Levels) -> Balance:
    """The effects of the candidates `pool` by first order."""
    chosen = list(pool)

    def effects(of: Sequence[Slope]) -> Float[np.ndarray, "token pool"]:
        return torch.cat([room(dictionary, slope, known)[:, chosen].double() for slope in of]).numpy(force=True)

    return Balance(tuple(chosen), effects(slopes.decisions), effects(slopes.drawn),
                   _firings(dictionary, slopes.decisions), _firings(dictionary, slopes.drawn),
                   effects(slopes.word) / len(slopes.word), _firings(dictionary, slopes.word))


def balanced(made: Balance, most: int) -> Balanced:
    """At most `most` latents, their weights and their trigger, each fitted to the other in turn."""
    weights, trigger = weights_of(made, (), most), ()
    for _ in range(_ROUNDS):
        trigger = trigger_of(made, weights)
        weights = weights_of(made, trigger, most)
    kept = np.flatnonzero(weights)
    return Balanced(tuple(made.pool[i] for i in kept), tuple(float(weights[i]) for i in kept), trigger)


def weights_of(made: Balance, trigger: Sequence[int], most: int) -> Float[np.ndarray, "pool"]:
    """w of every candidate, the largest 1, at most `most` of them above 0, for an operation that acts at the trigger."""
    acts, acts_ordinary = (_any(fires, trigger) for fires in (made.fires, made.fires_ordinary))
    gain = made.gain[acts].sum(axis=0)
    harm, word = made.harm[acts_ordinary], made.word[_any(made.fires_word, trigger)].sum(axis=0)
    information = _scaled(harm.T @ harm)
    information += np.diag(_RIDGE * np.diag(information) + 1e-9) + _WORD * _scaled(np.outer(word, word))
    kept = np.arange(len(gain))
    while True:
        found = _largest(information[np.ix_(kept, kept)], gain[kept])
        kept, found = kept[found > 0], found[found > 0]
        if len(kept) <= most:
            break
        kept = np.delete(kept, np.argmin(found * gain[kept]))
    weights = np.zeros(len(gain))
    weights[kept] = found / found.max(initial=1e-300)
    return weights


def trigger_of(made: Balance, weights: Float[np.ndarray, "pool"], prices: tuple[float, float] = (TOKEN_PRICE, CHANGE_PRICE),
               most: int = MOST_TRIGGERS) -> tuple[int, ...]:
    """The latents at whose firings the floors are worth holding: where they act on the decision, not on ordinary text.

    Greedily maximises (share of G·w at tokens where one of them fires) − price · (share of ordinary tokens where one of them
    fires) − price · (share of wᵀHw at these tokens), all in [0, 1], until a further latent does not raise it. Empty if none is
    worth its price.
    """
    gain = made.gain @ weights
    if gain.sum() <= 0:
        return ()
    gain = gain / gain.sum()
    change = np.square(made.harm @ weights)
    left = prices[0] / len(change) + prices[1] * change / max(float(change.sum()), 1e-300)
    chosen: list[int] = []
    while len(chosen) < most:
        worth = made.fires.T @ gain - made.fires_ordinary.T @ left
        best = int(np.argmax(worth))
        if worth[best] <= 0:
            break
        chosen.append(best)
        gain = np.where(_any(made.fires, [best]), 0.0, gain)
        left = np.where(_any(made.fires_ordinary, [best]), 0.0, left)
    return tuple(chosen)


def _largest(information: Float[np.ndarray, "pool pool"], gain: Float[np.ndarray, "pool"]) -> Float[np.ndarray, "pool"]:
    """The w ≥ 0 that maximises gain·w − ½ wᵀ(information)w."""
    root = np.linalg.cholesky(information)
    return nnls(root.T, np.linalg.solve(root, gain))[0]


def _scaled(matrix: Float[np.ndarray, "pool pool"]) -> Float[np.ndarray, "pool pool"]:
    """To a mean diagonal of 1, unless it is zero."""
    return matrix / max(float(np.trace(matrix)) / len(matrix), 1e-300)


def _firings(dictionary: Dictionary, slopes: Sequence[Slope]) -> csr_matrix:
    rows, latents, first = [], [], 0
    for slope in slopes:
        codes = dictionary.encode_sparse(slope.x)
        rows.append(codes.rows.numpy(force=True) + first)
        latents.append(codes.latents.numpy(force=True))
        first += len(slope.x)
    places = np.concatenate(rows), np.concatenate(latents)
    return csr_matrix((np.ones(len(places[0])), places), shape=(first, dictionary.d_sae))


def _any(fires: csr_matrix, latents: Sequence[int]) -> np.ndarray:
    """Where one of `latents` fires; everywhere if there are none."""
    if not len(latents):
        return np.ones(fires.get_shape()[0], dtype=bool)
    indicator = np.zeros(fires.get_shape()[1])
    indicator[list(latents)] = 1.0
    return fires @ indicator > 0
