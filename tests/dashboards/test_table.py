"""Filters, order, pages and neighbours in the filtered set against plain sorting; a million features."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboards.layout import COLUMNS
from dashboards.notes import Marks
from dashboards.store import FeatureStore
from dashboards.strings import Strings, write_strings
from dashboards.table import Query, Selection, select
from undertow.core.errors import SpecError

NOTHING = Marks({}, frozenset())
WORDS = ["the", " Sea", "<b>", "lamp", "é", "7"]


def synthetic(folder: Path, n: int, seed: int = 0) -> FeatureStore:
    """A store without texts: random columns with many ties."""
    rng = np.random.default_rng(seed)
    columns = {name: rng.integers(0, 50, n).astype(kind) for name, kind in COLUMNS.items()}
    columns["count"] = (rng.integers(0, 2000, n) * (rng.random(n) < 0.8)).astype("<i8")
    columns["peak_token"], columns["promoted_token"] = (rng.integers(-1, len(WORDS), n).astype("<i4") for _ in range(2))
    write_strings(folder, "vocabulary", WORDS)
    write_strings(folder, "passages", [])
    return FeatureStore(folder, {"n_tokens": 100_000, "name": "s", "dictionary": "d"}, columns, np.zeros(n, dtype="u1"),
                        np.zeros((0, 4), dtype=np.int32), np.zeros((0, 4), dtype=np.int32), [], Strings(folder, "passages"),
                        Strings(folder, "vocabulary"))


@given(keys=st.lists(st.integers(0, 4), max_size=40), start=st.integers(0, 45), size=st.integers(1, 12))
def test_window_and_around_against_sorting(keys: list[int], start: int, size: int) -> None:
    latents = np.arange(len(keys)) * 3
    selection = Selection(latents, np.array(keys, dtype=np.float64))
    order = [int(latents[i]) for i in sorted(range(len(keys)), key=lambda i: (keys[i], i))]
    assert selection.window(start, start + size).tolist() == order[start:start + size]
    for rank, latent in enumerate(order):
        around = selection.around(latent)
        assert around.rank == rank
        assert around.previous == (order[rank - 1] if rank else None)
        assert around.following == (order[rank + 1] if rank + 1 < len(order) else None)
    outside = selection.around(4)
    assert outside.rank is None
    assert (outside.previous, outside.following) == (3 if len(keys) > 1 else 0 if keys else None, 6 if len(keys) > 2 else None)


def test_the_linear_way_equals_sorting(tmp_path: Path) -> None:
    store = synthetic(tmp_path, 20_000)
    for order in ("up", "down"):
        selection = select(store, NOTHING, Query(sort="density", order=order))
        count = store.columns["count"].astype(int) * (1 if order == "up" else -1)
        assert selection.window(300, 400).tolist() == sorted(range(20_000), key=lambda i: (count[i], i))[300:400]


@pytest.mark.parametrize(("words", "passes"), [
    ({}, lambda s, i: True),
    ({"density_from": "0.5", "density_to": "1"}, lambda s, i: 500 <= s.columns["count"][i] <= 1000),
    ({"maximum_from": "10", "maximum_to": "20"}, lambda s, i: 10 <= s.columns["maximum"][i] <= 20),
    ({"state": "live"}, lambda s, i: s.columns["count"][i] > 0),
    ({"state": "dead"}, lambda s, i: s.columns["count"][i] == 0),
    ({"state": "rare"}, lambda s, i: 0 < s.columns["count"][i] < 10),
    ({"state": "dense"}, lambda s, i: s.columns["count"][i] > 1000),
    ({"labelled": "yes"}, lambda s, i: i in (3, 5, 8)),
    ({"labelled": "no", "starred": "yes"}, lambda s, i: i == 9),
    ({"starred": "no"}, lambda s, i: i not in (5, 9)),
    ({"q": "SEA"}, lambda s, i: 1 in (s.columns["peak_token"][i], s.columns["promoted_token"][i]) or i == 8),
    ({"q": "7"}, lambda s, i: i == 7 or 5 in (s.columns["peak_token"][i], s.columns["promoted_token"][i])),
    ({"q": "nothing like it"}, lambda s, i: False),
])
def test_filters_against_plain_code(tmp_path: Path, words: dict[str, str], passes: object) -> None:
    store = synthetic(tmp_path, 500)
    marks = Marks({3: "zebra", 5: "Apple", 8: "at sea", 999: "of another width"}, frozenset({5, 9, 999}))
    found = select(store, marks, Query.read(words)).latents.tolist()
    assert found == [i for i in range(500) if passes(store, i)]  # type: ignore[operator]


def test_labels_sort_by_letter_and_the_rest_last(tmp_path: Path) -> None:
    store, marks = synthetic(tmp_path, 12), Marks({3: "zebra", 5: "Apple", 8: "at sea"}, frozenset())
    assert select(store, marks, Query(sort="label")).window(0, 5).tolist() == [5, 8, 3, 0, 1]
    assert select(store, marks, Query(sort="label", order="down")).window(0, 5).tolist() == [3, 8, 5, 0, 1]


def test_a_query_and_its_address_are_one() -> None:
    query = Query.read({"q": " lamp ", "sort": "density", "order": "down", "density_from": "0.01", "page": "3", "state": "",
                        "foreign": "x"})
    assert query == Query(q="lamp", sort="density", order="down", density_from=0.01, page=3)
    assert Query.read(query.params(page=3)) == query
    assert query.params(sort="id") == {"q": "lamp", "order": "down", "density_from": "0.01"}, "a change goes to page 1"
    assert Query().params() == {}


@pytest.mark.parametrize(("words", "message"), [
    ({"sort": "beauty"}, "sort = 'beauty'"), ({"density_from": "many"}, "density_from = 'many'"),
    ({"density_to": "101"}, "density_to"), ({"page": "0"}, "page"), ({"maximum_from": "nan"}, "maximum_from"),
    ({"q": "x" * 201}, "q = "),
])
def test_bad_words_are_named(words: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Query.read(words)


def test_a_million_features(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = synthetic(tmp_path, 1_048_576)
    query = Query(sort="density", order="down", density_from=0.1, maximum_from=5)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        assert len(select(store, NOTHING, query).window(0, 100)) == 100
        times.append(time.perf_counter() - began)
    with capsys.disabled():
        print(f"[filter and sort of 1,048,576 features: {1000 * min(times):.0f} ms, best of 5]", end="")
    assert min(times) < 0.5  # 0.1 s is the aim; the machine of a test run may be busy
