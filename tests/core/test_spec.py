"""Specs: strict, immutable, and with a digest that only the values decide."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from undertow.core.errors import SpecError, UserError, near_matches
from undertow.core.spec import Spec, digest_json


class Inner(Spec):
    kind: Literal["topk", "relu"] = "topk"
    k: int = Field(default=32, ge=1)


class Outer(Spec):
    width: int = Field(ge=1)
    rate: float = 1e-3
    inner: Inner = Inner()
    note: str | None = None


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
JSON = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
                    max_leaves=12)


def shuffled(value: Any) -> Any:
    """The same JSON value with every object's keys in the opposite order."""
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(JSON)
def test_digest_does_not_depend_on_the_order_of_keys(value: Any) -> None:
    assert digest_json(value) == digest_json(shuffled(value))


def test_digest_by_hand() -> None:
    assert digest_json({"b": 1, "a": [True, None]}) == hashlib.sha256(b'{"a":[true,null],"b":1}').hexdigest()[:16]


@given(st.integers(1, 10**6), st.floats(1e-9, 1e9), st.integers(1, 512), st.none() | st.text())
def test_spec_round_trip(width: int, rate: float, k: int, note: str | None) -> None:
    spec = Outer(width=width, rate=rate, inner=Inner(k=k), note=note)
    assert Outer(**spec.model_dump()) == spec
    turned = Outer.checked(shuffled(json.loads(spec.model_dump_json())))
    assert turned == spec
    assert turned.digest() == spec.digest()


def test_every_field_counts_in_the_digest() -> None:
    variants = [Outer(width=1), Outer(width=2), Outer(width=1, rate=2e-3), Outer(width=1, inner=Inner(k=1)),
                Outer(width=1, note="")]
    assert len({spec.digest() for spec in variants}) == len(variants)


@pytest.mark.parametrize(("values", "names"), [
    ({"width": 0}, ["width = 0", "greater than or equal to 1"]),
    ({"width": 4, "rate": float("nan")}, ["rate = nan", "finite"]),
    ({"width": 4, "rate": float("inf")}, ["rate = inf", "finite"]),
    ({"width": 4, "wdith": 5}, ["wdith = 5", "not permitted"]),
    ({}, ["width", "required"]),
    ({"width": 4, "inner": {"k": 0}}, ["inner.k = 0"]),
    ({"width": 4, "inner": {"kind": "jump"}}, ["inner.kind = 'jump'", "'topk' or 'relu'"]),
    ({"width": "many"}, ["width = 'many'"]),
])
def test_a_refusal_names_field_and_value(values: dict[str, Any], names: list[str]) -> None:
    with pytest.raises(SpecError) as caught:
        Outer.checked(values, "runs/x.yaml")
    assert "Outer refused (runs/x.yaml)" in caught.value.what
    for name in names:
        assert name in caught.value.what


def test_frozen() -> None:
    spec = Outer(width=1)
    with pytest.raises(ValidationError, match="frozen"):
        spec.width = 2  # type: ignore[misc]


def test_yaml(tmp_path: Path) -> None:
    good = tmp_path / "good.yaml"
    good.write_text("width: 8\ninner: {k: 4}\n")
    assert Outer.from_yaml(good) == Outer(width=8, inner=Inner(k=4))
    for name, data, reason in [("list", b"- 1\n", "holds list"), ("broken", b"a: [1\n", "cannot read"),
                               ("latin", b"note: \xe9\n", "cannot read"), ("empty", b"", "holds NoneType")]:
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(data)
        with pytest.raises(SpecError, match=reason) as caught:
            Outer.from_yaml(path)
        assert str(path) in caught.value.what
    with pytest.raises(SpecError, match="cannot read"):
        Outer.from_yaml(tmp_path / "absent.yaml")


def test_yaml_makes_no_python_objects(tmp_path: Path) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text("width: !!python/object/apply:os.getpid []\n")
    with pytest.raises(SpecError, match="cannot read"):
        Outer.from_yaml(path)


def test_user_error_text() -> None:
    error = UserError("unknown subject 'smol'", "did you mean smollm2?")
    assert (error.what, error.hint) == ("unknown subject 'smol'", "did you mean smollm2?")
    assert str(error) == "unknown subject 'smol'\n  did you mean smollm2?"
    assert str(UserError("plain")) == "plain"


def test_near_matches() -> None:
    assert near_matches("smolm2", ["smollm2", "hearth"]) == "did you mean smollm2?"
    assert near_matches("zzz", ["smollm2", "hearth"]) == ""
