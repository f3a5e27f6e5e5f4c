"""Codes that come again: the dictionary's own, to the bit, computed once."""

from __future__ import annotations

import pytest
import torch

from interventions.applying import apply
from interventions.recall import Recall
from interventions.tune import floors
from sae.dictionary import Activation, JumpReLU, LinearDictionary, Provenance, TopK
from tests.interventions.benches import at, bench
from undertow.core.errors import DictionaryError

WANTED = torch.tensor([5, 0, 5, 11])  # a latent may be edited and looked at


def dictionary(activation: Activation) -> LinearDictionary:
    stream = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(6, 12, generator=stream), torch.randn(12, 6, generator=stream)
    return LinearDictionary(W_enc, torch.zeros(12), W_dec, torch.zeros(6), activation, Provenance.unknown())


def activations(seed: int, n: int = 40) -> torch.Tensor:
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def test_values_are_the_dictionary_s_the_second_time_without_encoding() -> None:
    made = dictionary(TopK(3))
    recall = Recall(made)
    for seed in (1, 2, 1, 1):
        x = activations(seed)
        assert torch.equal(recall.latent_values(x, WANTED), made.latent_values(x, WANTED))
    assert (recall.hits, recall.misses) == (2, 2)
    x = activations(1)
    assert torch.equal(recall.latent_values(x, torch.tensor([3])), made.latent_values(x, torch.tensor([3])))
    assert recall.hits == 3
    x[0, 0] += 1e-6  # other activations, though hardly
    recall.latent_values(x, WANTED)
    assert recall.misses == 3


def test_what_was_used_last_is_kept() -> None:
    recall = Recall(dictionary(TopK(3)), most_bytes=40 * 3 * 20 * 2)  # of two texts
    for seed in (1, 2, 1, 3, 1, 2):
        recall.latent_values(activations(seed), WANTED)
    assert (recall.hits, recall.misses) == (2, 4)  # 1 twice; 2 made room for 3


def test_an_architecture_that_reads_columns_is_asked_anew() -> None:
    made = dictionary(JumpReLU(torch.full((12,), 0.3)))
    recall = Recall(made)
    for _ in range(2):
        assert torch.equal(recall.latent_values(activations(1), WANTED), made.latent_values(activations(1), WANTED))
    assert recall.hits == recall.misses == 0


def test_an_unknown_latent_is_named() -> None:
    with pytest.raises(DictionaryError, match="12"):
        Recall(dictionary(TopK(3))).latent_values(activations(1), torch.tensor([12]))


def test_codes_of_another_dictionary_are_refused() -> None:
    own = bench()
    recipe = floors(own, at((0,), 1.0))
    with (pytest.raises(DictionaryError, match="another dictionary"),
          apply(recipe, own.subject, own.dictionary, recall=Recall(dictionary(TopK(3))))):
        pass
