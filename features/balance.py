"""How much of which latent, and where: the largest effect on the decision for a given change of ordinary text.

Let w_i be the floor of latent i in multiples of its typical activation h_i. By first order the decision moves by G·w, G being
the attribution (`carried`). By second order ordinary text moves by

    KL(base‖arm) ≈ ½ wᵀHw,   H_ij = mean of a_i·a_j over tokens and over next tokens drawn from the model,
    a_i = max(0, h_i − f_i) · d_i · ∂ log p(what was drawn) / ∂x

the Fisher information of what the model says next along the decoder directions (Amari 1998; drawn and not observed tokens:
Kunstner et al. 2019, arXiv 1905.12558). We depart from it in one point: each token is taken by itself. With the products
between tokens H is estimated too badly from a few texts, and what was chosen by it moved the decision less at the same KL.

The largest G·w at a given wᵀHw + c·(L·w)², w ≥ 0, with L what each latent does to the word, is a non-negative least squares
problem: latents that raise the word are taken together with others that lower it. Its solution is sparse by itself; it is cut
to a wanted number of latents by leaving out the least w_i·G_i, one at a time. G and L are summed over the tokens of situations
at which the operation acts; H over all tokens of ordinary text, as if it acted everywhere, since a gate that is seldom open
leaves too few for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from scipy.optimize import nnls
from scipy.sparse import csr_matrix
from torch import Tensor

from features.carried import Levels, Slope, room, slope_of
from sae.dictionary import Dictionary
from undertow.core.seeds import generator
from undertow.subjects.sites import Site
from undertow.subjects.splicing import Memory
from undertow.subjects.subject import Subject

DRAWS = 2
NEAR = 50  # tokens before a decision that belong to its situation
_CHANGE_PRICE = 1 / 3  # of all the change of ordinary text, where acting on all of its tokens costs 1
_RIDGE = 0.02  # of H's own diagonal, which is estimated from few texts
_WORD = 1.0  # c, where H and L·Lᵀ are scaled to a mean diagonal of 1


@final
class Firings(NamedTuple):
    """Where latents fire in some texts, one text after another.

    Attributes:
        fires: 1 where a latent is active, [token, d_sae].
        lengths: tokens of every text; their sum is the number of tokens.
    """

    fires: csr_matrix
    lengths: tuple[int, ...]

    def at(self, latents: Sequence[int]) -> Bool[np.ndarray, "token"]:
        """Where one of `latents` fires."""
        indicator = np.zeros(self.fires.get_shape()[1])
        indicator[list(latents)] = 1.0
        return self.fires @ indicator > 0

    def opened(self, latents: Sequence[int], memory: Memory) -> Bool[np.ndarray, "token"]:
        """Where a gate on `latents` with this memory is open; everywhere if there are no latents."""
        if not latents:
            return np.ones(self.fires.get_shape()[0], dtype=bool)
        fired = torch.from_numpy(self.at(latents)).split(list(self.lengths))
        return torch.cat([memory.opened(text[None], len(text))[0] for text in fired]).numpy()


@final
class Balance(NamedTuple):
    """Effects of floors at w = 1, token by token.

    Attributes:
        pool: the candidates, latents.
        gain: on D, nats, at the tokens of the situations; their sum over tokens, divided by the situations, is G.
        harm: a of the formula, nats, at the tokens of ordinary text, once for each draw.
        word: on the log of the word's probability in a situation, nats, at the same tokens as `gain`; likewise L.
        fires, fires_ordinary: where all latents are active at the tokens of the first two.
    """

    pool: tuple[int, ...]
    gain: Float[np.ndarray, "token pool"]
    harm: Float[np.ndarray, "token pool"]
    word: Float[np.ndarray, "token pool"]
    fires: Firings
    fires_ordinary: Firings


@final
class Balanced(NamedTuple):
    """Latents with their weights, the largest 1; the latents whose firings open the gate (none: it is always open), and the
    share of ordinary tokens at which it is open."""

    latents: tuple[int, ...]
    weights: tuple[float, ...]
    trigger: tuple[int, ...]
    open_share: float


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
        word: of the word in the same situations (`word_slopes`).
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
                   effects(slopes.word), _firings(dictionary, slopes.decisions), _firings(dictionary, slopes.drawn))


def balanced(made: Balance, price: float, memory: Memory, most: int) -> Balanced:
    """At most `most` latents, as long a trigger that suits them at this price, and their weights where that gate is open."""
    everywhere = np.ones(len(made.gain), dtype=bool)
    trigger = trigger_of(made, weights_of(made, everywhere, most), price, most)
    weights = weights_of(made, made.fires.opened(trigger, memory), most)
    kept = np.flatnonzero(weights)
    return Balanced(tuple(made.pool[i] for i in kept), tuple(float(weights[i]) for i in kept), trigger,
                    float(made.fires_ordinary.opened(trigger, memory).mean()))


def weights_of(made: Balance, acts: Bool[np.ndarray, "token"], most: int) -> Float[np.ndarray, "pool"]:
    """w of every candidate, the largest 1, at most `most` of them above 0, for an operation that acts where `acts`."""
    gain, word = made.gain[acts].sum(axis=0), made.word[acts].sum(axis=0)
    information = _scaled(made.harm.T @ made.harm)
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


def trigger_of(made: Balance, weights: Float[np.ndarray, "pool"], price: float, most: int) -> tuple[int, ...]:
    """The latents that tell the situation from ordinary text.

    Greedily maximises (share of the NEAR tokens before each decision where one of them fires) − price · [(share of ordinary
    tokens where one of them fires) + ⅓ (share of wᵀHw at these tokens)], until a further latent does not raise it. Empty if
    none is worth its price, or if nothing moves the decision.
    """
    if (made.gain @ weights).sum() <= 0:
        return ()
    gain = np.concatenate([np.arange(n)[::-1] < NEAR for n in made.fires.lengths]).astype(float)
    gain = gain / gain.sum()
    change = np.square(made.harm @ weights)
    left = price * (1 / len(change) + _CHANGE_PRICE * change / max(float(change.sum()), 1e-300))
    chosen: list[int] = []
    while len(chosen) < most:
        worth = made.fires.fires.T @ gain - made.fires_ordinary.fires.T @ left
        best = int(np.argmax(worth))
        if worth[best] <= 0:
            break
        chosen.append(best)
        gain = np.where(made.fires.at([best]), 0.0, gain)
        left = np.where(made.fires_ordinary.at([best]), 0.0, left)
    return tuple(chosen)


def _largest(information: Float[np.ndarray, "pool pool"], gain: Float[np.ndarray, "pool"]) -> Float[np.ndarray, "pool"]:
    """The w ≥ 0 that maximises gain·w − ½ wᵀ(information)w."""
    root = np.linalg.cholesky(information)
    return nnls(root.T, np.linalg.solve(root, gain))[0]


def _scaled(matrix: Float[np.ndarray, "pool pool"]) -> Float[np.ndarray, "pool pool"]:
    """To a mean diagonal of 1, unless it is zero."""
    return matrix / max(float(np.trace(matrix)) / len(matrix), 1e-300)


def _firings(dictionary: Dictionary, slopes: Sequence[Slope]) -> Firings:
    rows, latents, lengths = [], [], [len(slope.x) for slope in slopes]
    for slope, first in zip(slopes, np.cumsum([0, *lengths]), strict=False):
        codes = dictionary.encode_sparse(slope.x)
        rows.append(codes.rows.numpy(force=True) + first)
        latents.append(codes.latents.numpy(force=True))
    places = np.concatenate(rows), np.concatenate(latents)
    return Firings(csr_matrix((np.ones(len(places[0])), places), shape=(sum(lengths), dictionary.d_sae)), tuple(lengths))
