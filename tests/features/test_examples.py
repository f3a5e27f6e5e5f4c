"""Counts by hand, strongest firings against brute force, the sample's uniformity, and independence of the chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.codes import scan_codes
from features.examples import (
    BIN_EDGES,
    ExampleTable,
    cached_examples,
    collect_examples,
    examples_path,
    find_examples,
    load_examples,
    save_examples,
)
from features.ranking import AFTER, BEFORE, Examples, priorities
from undertow.core.errors import ArtifactError, DictionaryError, NumericsError, SpecError

CHI_SQUARE_59 = 98.3  # 0.999 quantile of chi-square with 59 degrees of freedom
ARRAYS = ("counts", "maxima", "means", "histogram", "tokens")


def assert_equal(one: ExampleTable, other: ExampleTable) -> None:
    assert (one.text, one.n_tokens, one.seed) == (other.text, other.n_tokens, other.seed)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    for kind in ("top", "uniform"):
        for name, a, b in zip(Examples._fields, getattr(one, kind), getattr(other, kind), strict=True):
            np.testing.assert_array_equal(a, b, err_msg=f"{kind}.{name}")


@pytest.fixture
def by_hand(memory_store: Any) -> Any:
    """Two rows of 5 tokens, position 0 unmeasured and (0, 3) left out; three latents, of which the last is dead."""
    activations = torch.tensor([
        # (0,1)         (0,2)            (0,4)
        [1.0, 0, 0], [4.0, 2.0, -1.0], [2.0, 0, 0],
        # (1,1)         (1,2)            (1,3)         (1,4)
        [0, 0, -3.0], [3.0, 0, 0], [0, 0.25, 0], [0, 0, 0]])
    return memory_store(activations, 2, 5, ((0, 3),))


def test_figures_by_hand(by_hand: Any, identity_dictionary: Any) -> None:
    table = collect_examples(identity_dictionary(3), by_hand, seed=0, n_top=2, n_uniform=5)
    assert table.n_tokens == 7
    assert table.text == "memory"
    assert table.counts.tolist() == [4, 2, 0]
    assert table.density.tolist() == [4 / 7, 2 / 7, 0]
    assert table.maxima.tolist() == [4.0, 2.0, 0.0]
    assert table.means.tolist() == [2.5, 1.125, 0.0]
    # Two bins an octave from 2^-12: 1, 2, 3 = 2^1.58, 4 lie in bins 24, 26, 27, 28; 0.25 and 2 in bins 20 and 26.
    assert {int(b): int(table.histogram[0, b]) for b in table.histogram[0].nonzero()[0]} == {24: 1, 26: 1, 27: 1, 28: 1}
    assert table.histogram[1].nonzero()[0].tolist() == [20, 26]
    assert table.histogram[2].sum() == 0
    assert BIN_EDGES[24] == 1.0
    assert BIN_EDGES[28] == 4.0


def test_contexts_by_hand(by_hand: Any, identity_dictionary: Any) -> None:
    table = collect_examples(identity_dictionary(3), by_hand, seed=0, n_top=3, n_uniform=5)
    assert table.top.values[0].tolist() == [4.0, 3.0, 0.0]  # one a row, so 2.0 in row 0 is not listed
    assert table.top.rows[0].tolist() == [0, 1, -1]
    assert table.top.positions[0].tolist() == [2, 2, -1]
    around = table.top.windows[0, 0]
    assert around[BEFORE - 2:BEFORE + 3].tolist() == [0.0, 1.0, 4.0, 0.0, 2.0]  # positions 0 to 4; 3 is not measured
    assert around.sum() == 7.0
    assert (table.top.indices[2] == -1).all()
    assert (table.uniform.indices[2] == -1).all()
    assert sorted(table.uniform.values[0].tolist()) == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert table.tokens.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_what_follows_the_last_measured_token_is_no_text(memory_store: Any, identity_dictionary: Any) -> None:
    store = memory_store(torch.ones(10, 1), 2, 4, ((0, 3), (1, 1)))
    table = collect_examples(identity_dictionary(1), store, seed=0)
    assert table.tokens.tolist() == [[0, 1, 2, -1], [4, 5, 6, 7]]


@pytest.mark.parametrize("n_top", [1, 3, 50])
def test_top_against_brute_force(random_store: Callable[..., Any], identity_dictionary: Any, n_top: int) -> None:
    store = random_store(seed=1, d_sae=7, n_rows=15)
    table = collect_examples(identity_dictionary(7), store, seed=0, n_top=n_top, chunk=11)
    where = store.where.tolist()
    for latent in range(7):
        best: dict[int, tuple[float, int]] = {}
        for index, (row, _) in enumerate(where):
            value = float(store.activations[index, latent])
            if value > 0 and value > best.get(row, (0.0, 0))[0]:
                best[row] = (value, index)
        expected = sorted(best.values(), key=lambda item: (-item[0], item[1]))[:n_top]
        kept = table.top.indices[latent] >= 0
        assert [(float(v), int(i)) for v, i in zip(table.top.values[latent][kept], table.top.indices[latent][kept],
                                                    strict=True)] == expected


def test_windows_against_brute_force(random_store: Callable[..., Any], identity_dictionary: Any) -> None:
    store = random_store(seed=2, d_sae=3, n_rows=4, n_pos=60)
    table = collect_examples(identity_dictionary(3), store, seed=0, chunk=37)
    dense = torch.zeros(4, 60, 3)
    dense[store.measured] = store.activations.relu()
    for examples in (table.top, table.uniform):
        for latent, slot in np.argwhere(examples.indices >= 0):
            row, position = int(examples.rows[latent, slot]), int(examples.positions[latent, slot])
            for offset in range(-BEFORE, AFTER + 1):
                inside = 0 <= position + offset < 60
                expected = float(dense[row, position + offset, latent]) if inside else 0.0
                assert examples.windows[latent, slot, BEFORE + offset] == expected


@given(chunk=st.integers(1, 120), seed=st.integers(0, 5), n=st.integers(1, 6))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_independent_of_chunks(random_store: Callable[..., Any], identity_dictionary: Any, chunk: int, seed: int,
                               n: int) -> None:
    store = random_store(seed=seed, d_sae=5)
    assert_equal(collect_examples(identity_dictionary(5), store, seed, n, n, chunk=chunk),
                 collect_examples(identity_dictionary(5), store, seed, n, n, chunk=10_000))


def test_sums_are_consistent(random_store: Callable[..., Any], identity_dictionary: Any) -> None:
    store = random_store(seed=3, d_sae=6)
    table = collect_examples(identity_dictionary(6), store, seed=0)
    np.testing.assert_array_equal(table.histogram.sum(axis=1), table.counts)
    np.testing.assert_array_equal(table.counts, (store.activations > 0).sum(dim=0).numpy())
    np.testing.assert_allclose(table.means * table.counts, store.activations.double().sum(dim=0).numpy(), rtol=1e-12)


def chi_square(counts: Any) -> float:
    return float(((counts - counts.mean()) ** 2 / counts.mean()).sum())


def test_sample_is_uniform(memory_store: Any, identity_dictionary: Any) -> None:
    """One stream in 400 latents at once: 60 firings each, 6 drawn; every firing is drawn equally often."""
    n, latents, drawn = 60, 400, 6
    table = collect_examples(identity_dictionary(latents), memory_store(torch.ones(n, latents), 1, n + 1), seed=5,
                             n_uniform=drawn, chunk=13)
    for row in table.uniform.indices:
        assert len(set(row.tolist())) == drawn  # without replacement
    counts = np.bincount(table.uniform.indices.reshape(-1), minlength=n)
    assert chi_square(counts) < CHI_SQUARE_59
    first = np.bincount(table.uniform.indices[:, 0], minlength=n)
    assert chi_square(first) < CHI_SQUARE_59  # the first of the sample alone is uniform too
    # Negative control: the strongest firings of equal ones are the earliest, which the same test must reject.
    assert chi_square(np.bincount(table.top.indices[:, 0], minlength=n)) > 10 * CHI_SQUARE_59


def test_priorities_depend_on_each_argument() -> None:
    base = priorities(1, np.arange(1000), np.arange(1000))
    assert len(set(base.tolist())) == 1000
    assert not np.isin(priorities(2, np.arange(1000), np.arange(1000)), base).any()
    np.testing.assert_array_equal(priorities(1, np.arange(1000)[::-1].copy(), np.arange(1000)[::-1].copy()), base[::-1])
    share = base.astype(np.float64) / 2**64
    assert abs(share.mean() - 0.5) < 0.03  # standard error 0.009


def test_seed_changes_only_the_sample(random_store: Callable[..., Any], identity_dictionary: Any) -> None:
    store = random_store(seed=4, d_sae=4)
    one, other = (collect_examples(identity_dictionary(4), store, seed, 3, 3) for seed in (0, 1))
    assert (one.uniform.indices != other.uniform.indices).any()
    np.testing.assert_array_equal(one.top.indices, other.top.indices)


def test_nothing_fires(memory_store: Any, identity_dictionary: Any) -> None:
    table = collect_examples(identity_dictionary(3), memory_store(-torch.ones(8, 3), 2, 5), seed=0)
    assert table.counts.sum() == 0
    assert (table.top.indices == -1).all()
    assert table.means.tolist() == [0, 0, 0]


def test_progress_reaches_the_end(by_hand: Any, identity_dictionary: Any) -> None:
    seen: list[tuple[int, int]] = []
    collect_examples(identity_dictionary(3), by_hand, 0, chunk=3, progress=lambda *report: seen.append(report))
    assert seen == [(0, 7), (3, 7), (6, 7), (7, 7)]


def test_round_trip_and_cache(by_hand: Any, identity_dictionary: Any, tmp_path: Path) -> None:
    dictionary = identity_dictionary(3)
    assert find_examples(dictionary, tmp_path) is None
    table = cached_examples(dictionary, by_hand, 0, tmp_path)
    by_hand.activations = torch.zeros_like(by_hand.activations)  # what is read now comes from the cache
    assert_equal(cached_examples(dictionary, by_hand, 0, tmp_path), table)
    found = find_examples(dictionary, tmp_path)
    assert found is not None
    assert_equal(found, table)
    other = identity_dictionary(3)
    other.W_dec = 2 * other.W_dec
    assert find_examples(other, tmp_path) is None
    assert cached_examples(dictionary, by_hand, 1, tmp_path).counts.sum() == 0  # another seed: measured anew


def test_key_ignores_when_the_harvest_ran(by_hand: Any) -> None:
    path = examples_path(Path("cache"), "d", by_hand, 0, 8, 8)
    by_hand.record["written"] = "tomorrow"
    assert examples_path(Path("cache"), "d", by_hand, 0, 8, 8) == path
    by_hand.record["n"] = 6
    assert examples_path(Path("cache"), "d", by_hand, 0, 8, 8) != path


def test_changed_artifact_is_refused(by_hand: Any, identity_dictionary: Any, tmp_path: Path) -> None:
    save_examples(collect_examples(identity_dictionary(3), by_hand, 0), tmp_path / "table")
    weights = tmp_path / "table" / "examples.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x07")
    with pytest.raises(ArtifactError, match="changed since it was written"):
        load_examples(tmp_path / "table")


def test_bad_input(by_hand: Any, identity_dictionary: Any) -> None:
    with pytest.raises(DictionaryError, match="width 4; these have width 3"):
        collect_examples(identity_dictionary(4), by_hand, 0)
    with pytest.raises(SpecError, match="n_top = 0"):
        collect_examples(identity_dictionary(3), by_hand, 0, n_top=0)
    by_hand.activations[4, 1] = torch.inf
    with pytest.raises(NumericsError, match="activation 4 has"):
        collect_examples(identity_dictionary(3), by_hand, 0, chunk=2)


def test_scan_gives_every_code_once(random_store: Callable[..., Any], identity_dictionary: Any) -> None:
    store = random_store(seed=6, d_sae=4)
    rebuilt = torch.zeros_like(store.activations)
    for first, codes in scan_codes(identity_dictionary(4), store, chunk=10):
        assert int(codes.rows.max()) < 10
        rebuilt[codes.rows + first, codes.latents] += codes.values
    assert torch.equal(rebuilt, store.activations)
