"""The gates: equal words pass, one word more fails, and a probe finds what it should and no more."""

from __future__ import annotations

import numpy as np
import pytest

from features.concepts import load_concept
from features.contrast import Families
from features.lexical import LexicalGate, bag_of_words_gate, forced_choice, refuse_lexical, shuffled_gate
from tests.features.planted import pairs, subject
from undertow.core.errors import TextError


def families(n: int) -> Families:
    return Families(np.arange(n, dtype=np.int64), n)


def test_equal_bags_are_at_chance_exactly() -> None:
    assert bag_of_words_gate(load_concept("care").pairs("discovery", 20)) == LexicalGate(0.5, 1.0, True)


def test_the_word_is_found() -> None:
    gate = bag_of_words_gate(load_concept("care-said").pairs("discovery", 30))
    assert gate.accuracy > 0.9
    assert not gate.passed
    with pytest.raises(TextError, match=r"bag of words: \d+% right, p = 0.001.*\n.*--force"):
        refuse_lexical({"bag of words": gate, "shuffled": LexicalGate(0.5, 1.0, True)})
    refuse_lexical({"bag of words": gate._replace(passed=True)})


def test_shuffled_activations_still_hold_a_word_but_not_who_did_what() -> None:
    site = subject().site("blocks.1.hook_resid_post")
    assert not shuffled_gate(subject(), site, pairs("warm", "cold", 12)).passed
    assert shuffled_gate(subject(), site, load_concept("care").pairs("discovery", 16)).passed


def test_probe_finds_a_planted_direction() -> None:
    rng = np.random.default_rng(0)
    differences = rng.normal(size=(60, 40))
    assert forced_choice(differences, families(60), 0).passed
    differences[:, 3] += 2.0
    found = forced_choice(differences, families(60), 0)
    assert found.accuracy > 0.8
    assert found.p == 0.001


def test_false_alarms_are_as_rare_as_they_say() -> None:
    rng = np.random.default_rng(1)
    p = np.array([forced_choice(rng.normal(size=(24, 6)), families(24), i, permutations=99).p for i in range(60)])
    assert np.mean(p <= 0.05) < 0.15
    assert p.min() >= 0.01


def test_families_are_not_split_between_training_and_test() -> None:
    """Twins of one family agree with each other and with nobody else: a probe that trained on one would know the other."""
    rng = np.random.default_rng(2)
    base = np.eye(12) * rng.choice([-1.0, 1.0], 12)[:, None]
    doubled = Families(np.repeat(np.arange(12), 2).astype(np.int64), 12)
    assert forced_choice(np.repeat(base, 2, axis=0), doubled, 0).accuracy == 0.5
    assert forced_choice(np.repeat(base, 2, axis=0), families(24), 0).accuracy > 0.5


def test_same_seed_same_answer() -> None:
    differences = np.random.default_rng(3).normal(0.2, 1.0, (30, 5))
    assert forced_choice(differences, families(30), 4) == forced_choice(differences, families(30), 4)
