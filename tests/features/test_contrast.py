"""The scan: figures by hand, its p against all sign patterns, a planted latent found, and nothing where there is nothing."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.contrast import Families, Origin, contrast, encode, load_table, scan, sign_flip_max
from features.deciding import read_last
from tests.features.planted import D_SAE, LATENT, pairs, planted, subject
from undertow.core.errors import ArtifactError, DictionaryError, NumericsError, TextError
from undertow.subjects.tapping import tap

ORIGIN = Origin("ab12", "cd34", "blocks.0.hook_resid_post", "ef56", 4, 3, 0)


def families(*names: str) -> Families:
    index = [sorted(set(names)).index(name) for name in names]
    return Families(np.array(index, dtype=np.int64), len(set(names)))


def test_figures_by_hand() -> None:
    # family means of the differences: a: (1 + 3) / 2 = 2, b: 4, c: 0; mean 2, variance 4, t = 2 / sqrt(4 / 3).
    positive = np.array([[1, 0], [3, 0], [5, 0], [1, 2]], dtype=np.float32)
    negative = np.array([[0, 0], [0, 0], [1, 0], [1, 2]], dtype=np.float32)
    table = contrast(positive, negative, families("a", "a", "b", "c"), ORIGIN)
    assert table.effect.tolist() == [2.0, 0.0]
    np.testing.assert_allclose(table.t, [2 / np.sqrt(4 / 3), 0.0], rtol=1e-6)
    np.testing.assert_allclose(table.mean_positive, [(2 + 5 + 1) / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(table.mean_negative, [(0 + 1 + 1) / 3, 2 / 3], rtol=1e-6)
    assert table.rate_positive.tolist() == [1.0, 0.25]
    assert table.rate_negative.tolist() == [0.5, 0.25]


def test_p_against_every_sign_pattern() -> None:
    values = np.random.default_rng(0).normal(0.6, 1.0, (8, 5)).astype(np.float32)
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=8)))

    def t_of(x: np.ndarray) -> np.ndarray:
        return x.mean(axis=0) / (x.std(axis=0, ddof=1) / np.sqrt(len(x)))

    null = np.array([np.abs(t_of(values * s[:, None])).max() for s in signs])
    exact = [(null >= abs(t) - 1e-5).mean() for t in t_of(values)]
    found = sign_flip_max(values, seed=0, flips=19_999)
    np.testing.assert_allclose(found.t, t_of(values), rtol=1e-4)
    np.testing.assert_allclose(found.p, exact, atol=0.015)


def noise(seed: int, planted_effect: float) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    positive, negative = (np.maximum(rng.normal(-0.5, 1.0, (60, 300)), 0).astype(np.float32) for _ in range(2))
    positive[:, 17] += planted_effect
    return positive, negative


def test_planted_latent_is_found_and_nothing_under_shuffled_labels() -> None:
    positive, negative = noise(0, 1.0)
    every = families(*(f"{i:02}" for i in range(60)))
    assert contrast(positive, negative, every, ORIGIN).significant(0.01) == [17]
    alarms = 0
    for i in range(20):
        swap = (np.random.default_rng(i).random(60) < 0.5)[:, None]
        table = contrast(np.where(swap, negative, positive), np.where(swap, positive, negative), every, ORIGIN)
        alarms += bool(table.significant(0.01))
    assert alarms <= 1


@given(st.integers(0, 1_000))
def test_exchanging_the_sides_changes_signs_and_nothing_else(seed: int) -> None:
    positive, negative = (side[:12, 10:20] for side in noise(seed, 0.5))
    every = families(*"aabbccddeeff")
    one, other = contrast(positive, negative, every, ORIGIN), contrast(negative, positive, every, ORIGIN)
    np.testing.assert_array_equal(one.t, -other.t)
    np.testing.assert_array_equal(one.p, other.p)
    assert one.raised(0.5) == other.opposed(0.5)


def test_repeating_a_pair_adds_no_evidence() -> None:
    positive, negative = noise(3, 0.5)
    few, names = slice(0, 6), [f"{i}" for i in range(6)]
    once = contrast(positive[few], negative[few], families(*names), ORIGIN)
    thrice = contrast(np.tile(positive[few], (3, 1)), np.tile(negative[few], (3, 1)), families(*names * 3), ORIGIN)
    np.testing.assert_allclose(once.t, thrice.t, rtol=1e-5)
    np.testing.assert_array_equal(once.p, thrice.p)


def test_families_that_agree_to_the_last_bit_stay_finite() -> None:
    values = np.full((10, 2), 0.7, dtype=np.float32)
    values[:, 1] = 0
    found = sign_flip_max(values, seed=0)
    assert np.isfinite(found.t).all()
    assert found.p[0] < 0.01
    assert found.p[1] == 1.0


def test_round_trip(tmp_path: Path) -> None:
    table = contrast(*noise(1, 1.0), families(*(f"{i:02}" for i in range(60))), ORIGIN)
    table.save(tmp_path / "table", {"concept": "care"})
    again = load_table(tmp_path / "table")
    assert again.origin == table.origin
    for name in ("mean_positive", "effect", "t", "p"):
        np.testing.assert_array_equal(getattr(again, name), getattr(table, name))
    (tmp_path / "table" / "origin.json").write_text("{}")
    with pytest.raises(ArtifactError, match="has changed"):
        load_table(tmp_path / "table")


def test_scan_of_a_subject_finds_the_planted_latent() -> None:
    made = planted()
    assert made.table.significant(0.01) == [LATENT]
    assert made.table.raised(0.01) == [LATENT]
    assert made.table.origin.n_families == len(made.pairs)
    assert made.table.d_sae == D_SAE


def test_read_last_is_the_plain_tap() -> None:
    made = planted()
    prompts = [made.subject.encode(pair.positive.prompt) for pair in made.pairs]
    prompts[3] = prompts[3][:5]
    together = read_last(made.subject, made.site, prompts, batch_tokens=40)
    for row, prompt in zip(together, prompts, strict=True):
        torch.testing.assert_close(row, tap(made.subject, torch.tensor([prompt]), made.site)[0, -1], atol=1e-5, rtol=1e-4)


def test_scan_refuses() -> None:
    made = planted()
    with pytest.raises(TextError, match="1 pairs of 1 families"):
        scan(made.subject, made.dictionary, made.site, made.pairs[:1], 0)
    other = pairs("warm", "cold")
    other[2] = other[2]._replace(negative=other[2].negative._replace(prompt="It was cold. The guest"))
    with pytest.raises(TextError, match="unequal decision sites"):
        scan(made.subject, made.dictionary, made.site, other, 0)
    with pytest.raises(NumericsError, match="prompt 1 is NaN"):
        encode(made.dictionary, torch.tensor([[0.0] * 16, [float("nan")] * 16]))
    narrow = type(made.dictionary)(torch.ones(3, 2), torch.zeros(2), torch.ones(2, 3), torch.zeros(3),
                                   made.dictionary.activation, made.dictionary.provenance)
    with pytest.raises(DictionaryError, match="width 3"):
        scan(subject(), narrow, made.site, made.pairs, 0)
