"""What lies on the operating table as words of an address and as a recipe: nothing is lost, and what is wrong is named."""

from __future__ import annotations

import re
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.datastructures import QueryParams
from starlette.testclient import TestClient

from dashboards.guard import HEADER
from dashboards.operation import KINDS, MAX_EDITS, Edit, Operation, Turn, from_recipe
from dashboards.prompting import MAX_PROMPT
from features.codes import dictionary_digest
from interventions.operators import Cap, Floor, Strengthen
from interventions.recipe import Recipe, Trigger
from tests.dashboards.conftest import DEAD, HOST, SITE, Made
from undertow.core.errors import DictionaryError, SpecError

S = "/s/toy-1/surgery"
WRITE = {HEADER: "1", "origin": f"http://{HOST}"}
PROMPT = "The keeper of the mill"
FLOOR = [("f", "7"), ("op", "floor"), ("x", "0.5"), ("text", PROMPT), ("tokens", "12")]


def words(*pairs: tuple[str, str]) -> dict[str, str]:
    """Body of a request to operate."""
    return {"query": urlencode(pairs)}


def read(*pairs: tuple[str, str]) -> Operation:
    return Operation.read(QueryParams(list(pairs)))


EDITS = st.builds(Edit, latent=st.integers(0, 47), kind=st.sampled_from(KINDS),
                  dose=st.floats(-1000, 1000).map(lambda x: float(f"{x:.12g}")))
TEXTS = st.text(max_size=20).map(lambda text: text.replace("\r\n", "\n"))
TURNS = st.builds(lambda text: (Turn(text=text),), TEXTS) | st.lists(
    st.builds(Turn, text=TEXTS, role=st.sampled_from(["system", "user", "assistant"])), min_size=1, max_size=3).map(tuple)
TRIGGERS = st.none() | st.builds(Trigger, latents=st.lists(st.integers(0, 47), min_size=1, max_size=3).map(tuple),
                                 above=st.floats(-9, 9).map(lambda x: float(f"{x:.6g}")),
                                 when=st.sampled_from(["above", "below"]))
REMEMBERING = st.builds(
    lambda trigger, at_least, more: trigger.model_copy(update={"at_least": at_least, "within": at_least + more}),
    TRIGGERS.filter(bool), st.integers(1, 30), st.integers(1, 30))


@given(st.builds(Operation, edits=st.lists(EDITS, max_size=3).map(tuple), turns=TURNS, seed=st.integers(0, 2**63 - 1),
                 tokens=st.integers(1, 512), temperature=st.sampled_from([0.0, 0.7, 1.0]), top_p=st.sampled_from([0.5, 1.0]),
                 window=st.sampled_from(["everywhere", "reading", "before_decision", "assistant"]),
                 trigger=TRIGGERS | REMEMBERING,
                 ceiling=st.sampled_from(["", "none", "12.5"]), words=st.sampled_from(["en", "all"])))
def test_an_address_holds_the_whole_table(operation: Operation) -> None:
    assert Operation.read(QueryParams(urlencode(operation.pairs()))) == operation


def test_a_form_is_read_as_it_was_typed() -> None:
    assert read(("text", "a\r\nb")).turns == (Turn(text="a\nb"),)
    bare = [("f", " 7 "), ("op", "ablate"), ("x", "1"), ("add", ""), ("only", ""), ("when", "above"), ("above", "")]
    assert read(*bare) == Operation(edits=(Edit(latent=7, kind="ablate", dose=1),))
    assert read(("only", "3, 4 5"), ("when", "below"), ("above", "")).trigger == Trigger(latents=(3, 4, 5), when="below")


@pytest.mark.parametrize(("pairs", "message"), [
    ([("f", "7"), ("op", "floor")], "1 features (f), 1 operators (op) and 0 strengths (x)"),
    ([("f", "7"), ("op", "melt"), ("x", "1")], "kind"), ([("f", "seven"), ("op", "floor"), ("x", "1")], "latent"),
    ([("f", "7"), ("op", "floor"), ("x", "nan")], "dose"), ([("f", "7"), ("op", "floor"), ("x", "1e9")], "dose"),
    ([("f", "-1"), ("op", "floor"), ("x", "1")], "latent"),
    ([("f", "7"), ("op", "floor"), ("x", "1")] * (MAX_EDITS + 1), "at most 64"),
    ([("text", "a"), ("text", "b")], "2 texts and no roles"), ([("role", "user")], "1 roles and 0 texts"),
    ([("role", "tool"), ("text", "a")], "role"), ([("text", "x" * (MAX_PROMPT + 1))], "4,001 characters; at most 4,000"),
    ([("role", "user"), ("text", "x" * 3000)] * 2, "6,000 characters"), ([("tokens", "513")], "tokens"),
    ([("temperature", "-1")], "temperature"), ([("top_p", "0")], "top_p"), ([("ceiling", "1e5")], "ceiling"),
    ([("only", "x")], "trigger"),
    ([("only", "3"), ("times", "4"), ("within", "2")], "at_least 4 is more than the 2 tokens"),
    ([("seed", "-1")], "seed"), ([("window", "never")], "window"),
])
def test_bad_words_are_named(client: TestClient, pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(SpecError, match=re.escape(message)):
        read(*pairs)
    answer = client.post(f"{S}/run", json=words(*pairs), headers=WRITE)
    assert (answer.status_code, message in answer.json()["error"]) == (400, True)


def test_doses_are_multiples_of_the_maximum(made: Made) -> None:
    maximum = float(made.store.columns["maximum"][7])
    pairs = [("f", "7"), ("op", "floor"), ("x", "0.5"), ("f", "7"), ("op", "strengthen"), ("x", "-1"),
             ("f", str(DEAD)), ("op", "cap"), ("x", "2")]
    recipe = read(*pairs, ("only", "3"), ("above", "0.25"), ("window", "assistant")).recipe(made.store)
    half = float(f"{maximum / 2:.9g}")
    assert [edit.operator for edit in recipe.edits] == [Floor(value=half), Strengthen(gain=-1), Cap(value=2)]
    assert (recipe.subject, recipe.sae, recipe.site) == (made.subject.digest, dictionary_digest(made.dictionary), SITE)
    assert recipe.norm_ceiling == made.store.record["norm_ceiling"] > 0, "massive activations are left alone unless it is said"
    assert read(*FLOOR, ("ceiling", "none")).recipe(made.store).norm_ceiling is None
    with pytest.raises(SpecError, match="press Add"):
        read().recipe(made.store)
    with pytest.raises(DictionaryError, match="no feature 48"):
        read(("f", "48"), ("op", "ablate"), ("x", "1")).recipe(made.store)


@given(value=st.floats(0.001, 500), kind=st.sampled_from(["floor", "clamp", "cap", "strengthen", "ablate", "add"]))
def test_a_loaded_recipe_is_written_back_as_it_was(made: Made, value: float, kind: str) -> None:
    figure = float(f"{value:.9g}")
    name = {"strengthen": "gain", "add": "amount"}.get(kind, "value")
    operator = {"kind": kind} if kind == "ablate" else {"kind": kind, name: figure}
    recipe = Recipe.checked({"name": "care", "subject": made.subject.digest, "sae": made.store.dictionary, "site": SITE,
                             "edits": [{"latent": 7, "operator": operator}], "window": "before_decision",
                             "trigger": {"latents": [3], "above": 0.5}})
    try:
        operation = from_recipe(recipe, made.store, read(("text", "kept"), ("seed", "9")))
    except SpecError as error:  # out of the table's range
        assert "dose" in str(error)
        return
    assert operation.recipe(made.store) == recipe
    assert (operation.turns[0].text, operation.seed) == ("kept", 9)
