"""What was used last: forgotten by age of use, within the bytes, the newest always there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from undertow.core.recency import Recent


def test_what_was_used_longest_ago_goes_first() -> None:
    recent: Recent[str] = Recent(6, len)
    recent.put(b"a", "aaa")
    recent.put(b"b", "bbb")
    assert recent.get(b"a") == "aaa"  # used again, so that b is the older one now
    recent.put(b"c", "ccc")
    assert (recent.get(b"a"), recent.get(b"b"), recent.get(b"c")) == ("aaa", None, "ccc")
    recent.put(b"d", "d" * 9)  # more than all may have: kept alone
    assert [recent.get(key) for key in (b"a", b"c", b"d", None)] == [None, None, "d" * 9, None]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), max_size=40), st.integers(0, 20))
def test_against_a_list_in_order_of_use(puts: list[tuple[int, int]], most: int) -> None:
    recent: Recent[str] = Recent(most, len)
    kept: list[tuple[bytes, str]] = []
    for number, size in puts:
        key, value = bytes([number]), "x" * size
        recent.put(key, value)
        kept = [pair for pair in kept if pair[0] != key] + [(key, value)]
        while sum(len(value) for _, value in kept) > most and len(kept) > 1:
            kept.pop(0)
    for number in range(6):
        assert recent.get(bytes([number])) == dict(kept).get(bytes([number]))
