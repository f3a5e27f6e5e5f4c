"""Hazard: the probability that the text goes on with a forbidden form, guard off.

    H_t = P(a T0 form starts inside token t | what stands before)        in [0, 1], no unit

summed over every way to spell it (`TokenTrie`), its end included: " love" counts with the probability that no letter follows.
Forms that exclude each other (all but a form that is the beginning of another in scripts without spaces) add up, so that this
is Σ over forms of P(form starts at t). Σ_t H_t is the expected number of forms, with less variance than counting them.

`hazard_bound` needs one forward pass and is an upper bound; `hazard_exact` asks the model for continuations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from torch import Tensor

from undertow.core.errors import NumericsError
from undertow.lexicon.folding import Kind
from undertow.lexicon.trie import Edges, TokenTrie

_AT_ONCE = 256  # continuations a call: their logits have to fit in memory, and their common text is computed once


class Continuation(NamedTuple):
    """Tokens that follow the prefix of row `row`."""

    row: int
    tokens: tuple[int, ...]


class Hazard(NamedTuple):
    """Hazard of each row.

    Attributes:
        value: the mass that was followed to its end: a lower bound, within `slack` of the truth.
        slack: the mass that was not followed. Its mean over the rows is within the tolerance, unless the depth ran out.
        expanded: continuations that the model was asked for.
    """

    value: Float[Tensor, "row"]
    slack: Float[Tensor, "row"]
    expanded: int


class _Front(NamedTuple):
    """Spellings that are not at their end yet; `parent` indexes the continuations that the last round asked for."""

    parent: npt.NDArray[np.int64]
    row: npt.NDArray[np.int64]
    token: npt.NDArray[np.int64]
    node: npt.NDArray[np.int64]
    mass: npt.NDArray[np.float64]


def hazard_bound(logits: Float[Tensor, "*row vocab"], contexts: Sequence[Kind], trie: TokenTrie) -> Float[Tensor, "*row"]:
    """Upper bound of the hazard from logits alone: the mass of all tokens with which a form may begin.

    A token that only begins a form ("a" of "amor") counts in full, so the bound is loose for a trie of all tokenisations and of
    many languages, and near the truth where forms are whole tokens.

    Args:
        logits: of the token that comes next, any number of rows.
        contexts: what stands before it, one a row (`TokenTrie.contexts`), rows flattened.
        trie: the spellings.

    Raises NumericsError for logits with NaN.
    """
    flat = _probabilities(logits).reshape(-1, logits.shape[-1])
    kinds = torch.tensor([int(kind) for kind in contexts], device=flat.device)
    enters = torch.zeros(len(Kind), flat.shape[-1], dtype=flat.dtype, device=flat.device)
    for kind in set(contexts):
        edges = trie.first(kind)
        begin = np.concatenate([edges.hit.nonzero()[0], edges.pending])
        enters[kind, torch.from_numpy(begin[begin < flat.shape[-1]]).to(flat.device)] = 1
    bound = (flat @ enters.T).gather(1, kinds[:, None]).clamp(0, 1)
    return bound.reshape(logits.shape[:-1])


def hazard_exact(logits: Float[Tensor, "row vocab"], contexts: Sequence[Kind], trie: TokenTrie,
                 next_logits: Callable[[list[Continuation]], Tensor], tolerance: float = 1e-6, depth: int = 8,
                 relative: float = 0.0) -> Hazard:
    """The hazard of each row, by following every spelling as far as it has mass.

    Args:
        logits: of the token that comes next.
        contexts: what stands before it, one a row.
        trie: the spellings; exact for all tokenisations, or for canonical ones, as it was made.
        next_logits: logits [continuation, vocab] (or log-probabilities) after each of the given continuations, 256 at most.
        tolerance: mass that need not be followed, in [0, 1], mean over the rows: of all rows' branches the smallest are left
            first, so that a row where a form may well begin does not pay for one where it hardly can. 0 follows all.
        depth: tokens a spelling may have, at most.
        relative: the same as a share of the mean of what has been found so far; the larger of the two holds.

    Raises NumericsError for logits with NaN.
    """
    value, slack = np.zeros(len(logits)), np.zeros(len(logits))
    asked = [Continuation(row, ()) for row in range(len(logits))]
    grown = [_grow(i, 1.0, i, trie.first(contexts[i]), shares, value) for i, shares in enumerate(_probabilities(logits))]
    expanded = 0
    for level in range(1, depth):
        # Half of what may be left goes to the first tokens, where nearly all branches are, a quarter to the next, and so on.
        front = _pruned(_joined(grown), slack, max(tolerance * len(value), relative * float(value.sum())) / 2 ** level)
        asked = [Continuation(row, (*asked[parent].tokens, token))
                 for parent, row, token in zip(front.parent.tolist(), front.row.tolist(), front.token.tolist(), strict=True)]
        expanded += len(asked)
        grown = []
        for start in range(0, len(asked), _AT_ONCE):
            after = _probabilities(next_logits(asked[start:start + _AT_ONCE]))
            grown += [_grow(i, float(front.mass[i]), int(front.row[i]), trie.edges(int(front.node[i])), shares, value)
                      for i, shares in enumerate(after, start=start)]
        if not grown:
            break
    left = _joined(grown)
    np.add.at(slack, left.row, left.mass)
    return Hazard(torch.from_numpy(value).float().clamp(0, 1), torch.from_numpy(slack).float().clamp(0, 1), expanded)


def _grow(parent: int, mass: float, row: int, edges: Edges, probabilities: Tensor, value: npt.NDArray[np.float64]) -> _Front:
    """Adds the mass of the tokens that complete a form to `value[row]`; the branches that go on."""
    known = np.zeros(len(edges.hit))  # a token for which the model has no logit cannot come
    shown = probabilities[:len(known)].detach().double().cpu().numpy()
    known[:len(shown)] = shown
    value[row] += mass * float(known[edges.hit].sum())
    shares = mass * known[edges.pending]
    on = np.flatnonzero(shares > 0)
    return _Front(np.full(len(on), parent), np.full(len(on), row), edges.pending[on], edges.nodes[on], shares[on])


def _joined(fronts: Sequence[_Front]) -> _Front:
    if not fronts:
        none = np.zeros(0, dtype=np.int64)
        return _Front(none, none, none, none, np.zeros(0))
    return _Front(np.concatenate([f.parent for f in fronts]), np.concatenate([f.row for f in fronts]),
                  np.concatenate([f.token for f in fronts]), np.concatenate([f.node for f in fronts]),
                  np.concatenate([f.mass for f in fronts]))


def _pruned(front: _Front, slack: npt.NDArray[np.float64], allowance: float) -> _Front:
    """All but the smallest branches, whose mass (at most `allowance`) goes to `slack`, in the order of parents."""
    order = np.argsort(front.mass, kind="stable")
    left, kept = np.split(order, [int(np.searchsorted(front.mass[order].cumsum(), allowance, side="right"))])
    np.add.at(slack, front.row[left], front.mass[left])
    kept = np.sort(kept)
    return _Front(front.parent[kept], front.row[kept], front.token[kept], front.node[kept], front.mass[kept])


def _probabilities(logits: Tensor) -> Tensor:
    if bool(logits.isnan().any()):
        raise NumericsError("the logits hold NaN, so no probability can be read from them")
    return logits.float().softmax(-1)
