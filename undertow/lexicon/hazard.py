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

import torch
from jaxtyping import Float
from torch import Tensor

from undertow.core.errors import NumericsError
from undertow.lexicon.folding import Kind
from undertow.lexicon.trie import Edges, TokenTrie

_AT_ONCE = 64  # continuations a call: their logits have to fit in memory


class Continuation(NamedTuple):
    """Tokens that follow the prefix of row `row`."""

    row: int
    tokens: tuple[int, ...]


class Hazard(NamedTuple):
    """Hazard of each row.

    Attributes:
        value: the mass that was followed to its end: a lower bound, within `slack` of the truth.
        slack: the mass that was not followed (less than the tolerance, unless the depth ran out).
        expanded: continuations that the model was asked for.
    """

    value: Float[Tensor, "row"]
    slack: Float[Tensor, "row"]
    expanded: int


class _Branch(NamedTuple):
    tokens: Continuation
    mass: float
    node: int


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
        enters[kind, torch.from_numpy(edges.hit.nonzero()[0]).to(flat.device)] = 1
        enters[kind, torch.from_numpy(edges.pending).to(flat.device)] = 1
    bound = (flat @ enters.T).gather(1, kinds[:, None]).clamp(0, 1)
    return bound.reshape(logits.shape[:-1])


def hazard_exact(logits: Float[Tensor, "row vocab"], contexts: Sequence[Kind], trie: TokenTrie,
                 next_logits: Callable[[list[Continuation]], Tensor], tolerance: float = 1e-6, depth: int = 8) -> Hazard:
    """The hazard of each row, by following every spelling as far as it has mass.

    Args:
        logits: of the token that comes next.
        contexts: what stands before it, one a row.
        trie: the spellings; exact for all tokenisations, or for canonical ones, as it was made.
        next_logits: logits [continuation, vocab] (or log-probabilities) after each of the given continuations, 64 at most.
        tolerance: mass a row that need not be followed, in [0, 1]; the smallest branches are left first. 0 follows all.
        depth: tokens a spelling may have, at most.

    Raises NumericsError for logits with NaN.
    """
    value, slack = [0.0] * len(logits), [0.0] * len(logits)
    branches: list[_Branch] = []
    for row, probabilities in enumerate(_probabilities(logits)):
        hit, begun = _branch(Continuation(row, ()), 1.0, trie.first(contexts[row]), probabilities)
        value[row] += hit
        branches += begun
    expanded = 0
    for _ in range(depth - 1):
        branches = _pruned(branches, slack, tolerance / max(depth - 1, 1))
        if not branches:
            break
        expanded += len(branches)
        grown: list[_Branch] = []
        for start in range(0, len(branches), _AT_ONCE):
            asked = branches[start:start + _AT_ONCE]
            after = _probabilities(next_logits([branch.tokens for branch in asked]))
            for branch, probabilities in zip(asked, after, strict=True):
                hit, begun = _branch(branch.tokens, branch.mass, trie.edges(branch.node), probabilities)
                value[branch.tokens.row] += hit
                grown += begun
        branches = grown
    for branch in branches:
        slack[branch.tokens.row] += branch.mass
    return Hazard(torch.tensor(value).clamp(0, 1), torch.tensor(slack).clamp(0, 1), expanded)


def _branch(tokens: Continuation, mass: float, edges: Edges, probabilities: Tensor) -> tuple[float, list[_Branch]]:
    """Mass of the tokens that complete a form, and the branches that go on."""
    known = probabilities[:len(edges.hit)].detach().double().cpu()
    hit = mass * float(known[torch.from_numpy(edges.hit)].sum())
    masses = (mass * known[torch.from_numpy(edges.pending)]).tolist()
    return hit, [_Branch(Continuation(tokens.row, (*tokens.tokens, token)), share, node)
                 for token, node, share in zip(edges.pending.tolist(), edges.nodes.tolist(), masses, strict=True) if share > 0]


def _pruned(branches: list[_Branch], slack: list[float], allowance: float) -> list[_Branch]:
    """All but the smallest branches, whose mass (at most `allowance` a row) goes to `slack`."""
    left: dict[int, float] = {}
    kept = []
    for branch in sorted(branches, key=lambda branch: branch.mass):
        row = branch.tokens.row
        if left.get(row, 0.0) + branch.mass <= allowance:
            left[row] = left.get(row, 0.0) + branch.mass
            slack[row] += branch.mass
        else:
            kept.append(branch)
    return sorted(kept, key=lambda branch: branch.tokens)


def _probabilities(logits: Tensor) -> Tensor:
    if bool(logits.isnan().any()):
        raise NumericsError("the logits hold NaN, so no probability can be read from them")
    return logits.float().softmax(-1)
