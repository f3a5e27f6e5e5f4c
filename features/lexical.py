"""Gates on the pairs, before anything else runs: if words alone tell the two situations apart, what is found may be words.

Both gates ask the forced choice "which of the two is the positive one?": a ridge classifier on differences, trained on some
families and judged on others. Half right is chance; a tie counts one half.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float64
from numpy import ndarray

from features.concepts import Pair
from features.contrast import Families
from features.deciding import Progress, read_last, silent
from undertow.core.errors import TextError
from undertow.core.seeds import derive_seed, generator
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject

ALPHA = 0.01
FOLDS = 5
PERMUTATIONS = 999
_WORD = re.compile(r"\w+")


@final
class LexicalGate(NamedTuple):
    """How well the situations are told apart without their meaning.

    Attributes:
        accuracy: share of held-out pairs whose positive side is picked, in [0, 1]; chance is 0.5.
        p: one-sided p of that accuracy, by exchanging the sides of whole families.
        passed: p > 0.01.
    """

    accuracy: float
    p: float
    passed: bool


def bag_of_words_gate(pairs: Sequence[Pair], seed: int = 0) -> LexicalGate:
    """Gate on word counts (case folded, order ignored). Raises TextError for fewer than two families."""
    bags = [(_bag(pair.positive.prompt), _bag(pair.negative.prompt)) for pair in pairs]
    changes = [{word: positive[word] - negative[word] for word in positive | negative if positive[word] != negative[word]}
               for positive, negative in bags]
    column = {word: i for i, word in enumerate(sorted({word for change in changes for word in change}))}
    differences = np.zeros((len(pairs), len(column)))
    for row, change in enumerate(changes):
        for word, count in change.items():
            differences[row, column[word]] = count
    return forced_choice(differences, Families.of(pairs), derive_seed(seed, "bag_of_words"))


def _bag(text: str) -> Counter[str]:
    return Counter(_WORD.findall(text.casefold()))


def shuffled_gate(subject: Subject, site: Site, pairs: Sequence[Pair], seed: int = 0,
                  progress: Progress = silent) -> LexicalGate:
    """Gate on the activations at the decision site of prompts whose tokens (but for BOS and the last) are in random order.

    What survives the shuffling is carried by the words, not by what they say (empathy-probes, arXiv 2511.16699).
    """
    first = 0 if subject.bos_id is None else 1
    prompts = []
    for pair in pairs:
        for name, side in (("positive", pair.positive), ("negative", pair.negative)):
            ids = subject.encode(side.prompt)
            inner = ids[first:-1]
            order = torch.randperm(len(inner), generator=generator(seed, "shuffled", pair.family, name, len(prompts)))
            prompts.append([*ids[:first], *(inner[i] for i in order.tolist()), ids[-1]])
    x = read_last(subject, site, prompts, progress).double().numpy()
    differences = x[0::2] - x[1::2]
    scale = np.sqrt((differences**2).mean(axis=0))
    return forced_choice(differences / np.where(scale > 0, scale, 1.0), Families.of(pairs), derive_seed(seed, "shuffled"))


def forced_choice(differences: Float64[ndarray, "pair k"], families: Families, seed: int, folds: int = FOLDS,
                  permutations: int = PERMUTATIONS) -> LexicalGate:
    """Cross-validated accuracy of "the positive side is the one with the larger score", with its permutation p.

    Score: ridge regression through the origin, penalty = the mean squared length of a difference. Folds are made of families.
    """
    rng = np.random.default_rng(derive_seed(seed, "forced_choice"))
    fold = rng.permutation(families.n)[families.members] % min(folds, families.n)
    signs = np.vstack([np.ones(families.n), rng.integers(0, 2, (permutations, families.n)) * 2.0 - 1])[:, families.members].T
    kernel = differences @ differences.T
    right = np.zeros(signs.shape)
    for held in range(min(folds, families.n)):
        train, test = np.flatnonzero(fold != held), np.flatnonzero(fold == held)
        penalty = max(float(np.trace(kernel[np.ix_(train, train)])) / len(train), 1e-12)
        weights = np.linalg.solve(kernel[np.ix_(train, train)] + penalty * np.eye(len(train)), signs[train])
        scores = kernel[np.ix_(test, train)] @ weights * signs[test]
        right[test] = np.where(np.abs(scores) < 1e-9, 0.5, scores > 0)
    accuracies = right.mean(axis=0)
    p = float(np.mean(accuracies >= accuracies[0] - 1e-12))
    return LexicalGate(float(accuracies[0]), p, p > ALPHA)


def refuse_lexical(gates: Mapping[str, LexicalGate]) -> None:
    """Raise TextError that names the gates which did not pass."""
    failed = [f"{name}: {gate.accuracy:.0%} right, p = {gate.p:.3g}" for name, gate in gates.items() if not gate.passed]
    if failed:
        raise TextError(f"the pairs are lexical: their sides are told apart without what they say ({'; '.join(failed)})",
                        "write pairs with equal words, or go on with --force (which is recorded)")
