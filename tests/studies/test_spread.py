"""Where an arm moves the stream, against the hidden states that the model itself gives: exact zeros, and figures by hand."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from features.codes import dictionary_digest
from interventions.applying import apply, apply_direction
from interventions.recipe import Recipe
from sae.dictionary import LinearDictionary, Provenance, TopK
from tests import tiny
from tests.studies import small_battery
from undertow.core.errors import EditError, NumericsError, SpecError
from undertow.core.seeds import generator
from undertow.studies.arms import sham_of
from undertow.studies.conditions import Condition, Cost, Under
from undertow.studies.measures import questions
from undertow.studies.situations import Kind, Line, Side, Teller, Telling, Told
from undertow.studies.spread import PLACES, _last, relative_change, spread
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject

SITE = "blocks.1.hook_resid_post"
Opened = Callable[[], AbstractContextManager[Under]]


class OneText(Teller):
    """Tells one of the tokenizer's own stories as unit i; `times` tellings of it, each a word longer."""

    def __init__(self, times: int = 1, end: str = " It was late") -> None:
        self.times, self.end = times, end

    @property
    def seed(self) -> int:
        """None is drawn."""
        return 0

    @property
    def facts(self) -> dict[str, str]:
        """None."""
        return {}

    def decision(self, i: int, side: Side = "base", kind: Kind = "need", before: str = "") -> Told:
        """The story, the sentence, and the end."""
        text = f"{tiny.STORIES[i]}{before}{self.end}"
        told = tuple(Telling(text + " indeed" * k, "", {"give": (" gave",), "keep": (" kept",)}, 0) for k in range(self.times))
        return Told(told, told[0], "Ana")


def tell(times: int = 1, end: str = " It was late") -> Teller:
    return OneText(times, end)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return small_battery.subject()


def arm(opened: Opened, line: Line | None = None, before: str = "") -> Condition:
    return Condition("L4", "base", line, before, opened, "0" * 16, Cost(0.0, 0.0))


def untouched(subject: Subject) -> Opened:
    @contextlib.contextmanager
    def opened() -> Iterator[Under]:
        yield Under(subject, lambda _column: None)

    return opened


def added(subject: Subject, layer: int, direction: torch.Tensor, **how: Any) -> Opened:
    @contextlib.contextmanager
    def opened() -> Iterator[Under]:
        with apply_direction(subject, Site(layer, "resid_post"), direction, 1.0, **how) as operated:
            yield Under(operated.subject, operated.announce, lambda: operated.firings)

    return opened


def surgery(subject: Subject, sham: bool) -> Opened:
    random = generator(0, "dictionary")
    made = LinearDictionary(torch.randn(tiny.D_MODEL, 24, generator=random), torch.zeros(24),
                            torch.randn(24, tiny.D_MODEL, generator=random), torch.zeros(tiny.D_MODEL), TopK(4),
                            Provenance.unknown())
    recipe = Recipe.checked({"name": "L4", "subject": subject.name, "sae": dictionary_digest(made), "site": SITE,
                             "edits": [{"latent": 3, "operator": {"kind": "add", "amount": 2.0}}]})

    @contextlib.contextmanager
    def opened() -> Iterator[Under]:
        with apply(sham_of(recipe) if sham else recipe, subject, made, must_act=False) as operated:
            yield Under(operated.subject, operated.announce, lambda: operated.firings)

    return opened


def streams(subject: Subject, ids: list[int]) -> np.ndarray:
    """After every block, by the model's own account; the last is left out, since the model gives it after its norm."""
    with torch.inference_mode():
        found = subject.hf_model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    return np.stack([state[0, -PLACES:].double().numpy() for state in found[1:-1]])


def of(condition: Condition, subject: Subject, teller: Teller | None = None, n: int = 3) -> np.ndarray:
    found = spread(condition, teller or tell(), range(n), subject)
    assert found["story"] == list(range(n))
    values = np.array(found["spread"])
    assert values.shape == (n, tiny.N_LAYERS, PLACES) and values.min() >= 0
    return values


def test_a_sham_is_zero_to_the_last_bit_and_the_surgery_is_not(subject: Subject) -> None:
    assert (of(arm(surgery(subject, sham=True)), subject) == 0).all()
    assert (of(arm(untouched(subject)), subject) == 0).all()
    changed = of(arm(surgery(subject, sham=False)), subject)
    assert (changed[:, 0] == 0).all() and (changed[:, 1:] > 0).all()


@pytest.mark.parametrize("layer", range(tiny.N_LAYERS))
def test_nothing_below_the_site_and_at_it_what_was_added(subject: Subject, layer: int) -> None:
    direction = torch.randn(tiny.D_MODEL, generator=generator(1, "direction"))
    found = of(arm(added(subject, layer, direction)), subject)
    assert (found[:, :layer] == 0).all() and (found[:, layer:] > 0).all()
    if layer < tiny.N_LAYERS - 1:
        base = streams(subject, subject.encode(tiny.STORIES[1] + " It was late"))[layer]
        expected = float(direction.norm()) / np.linalg.norm(base, axis=-1)
        assert found[1, layer] == pytest.approx(expected, rel=1e-4)


def test_an_arm_that_stops_before_the_decision_leaves_it_alone_at_its_block(subject: Subject) -> None:
    direction = torch.ones(tiny.D_MODEL)
    found = of(arm(added(subject, 0, direction, window="before_decision")), subject)
    assert (found[:, 0, -1] == 0).all() and (found[:, 0, :-1] > 0).all()
    assert (found[:, 1, -1] > 0).all()  # the decision's token reads the others
    with pytest.raises(EditError):  # a window that is never placed acts nowhere: so `announce` is what placed it
        never = added(subject, 0, direction, window="before_decision")

        @contextlib.contextmanager
        def mute() -> Iterator[Under]:
            with never() as under:
                yield under._replace(announce=lambda _column: None)

        of(arm(mute), subject)


def test_a_line_before_the_story_is_read_by_the_arm_alone(subject: Subject) -> None:
    line = "Nobody spoke for a while."
    found = of(arm(untouched(subject), lambda i, name: line), subject)
    text = tiny.STORIES[2] + " It was late"
    before, after = (streams(subject, subject.encode(said)) for said in (text, f"{line}\n{text}"))
    expected = np.linalg.norm(after - before, axis=-1) / np.linalg.norm(before, axis=-1)
    assert found[2, :-1] == pytest.approx(expected, rel=1e-3)
    assert expected.min() > 1e-3


def test_tellings_are_averaged(subject: Subject) -> None:
    condition = arm(added(subject, 1, torch.ones(tiny.D_MODEL)))
    both = of(condition, subject, tell(times=2))
    first, second = of(condition, subject), of(condition, subject, tell(end=" It was late indeed"))
    assert both == pytest.approx((first + second) / 2, rel=1e-4)
    assert np.abs(first - second).max() > 1e-3


def test_relative_change_by_hand() -> None:
    before, after = torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([[[3.0, 5.0], [1.0, 0.0]]])
    assert relative_change(before, after).tolist() == [[pytest.approx(0.2), 0.0]]


def test_what_cannot_be_compared_is_refused(subject: Subject) -> None:
    with pytest.raises(SpecError, match="a story of 24 tokens is too short: 24 are read before the decision"):
        _last(subject, [subject.bos_id or 0, *range(5, 28)])
    assert _last(subject, [subject.bos_id or 0, *range(5, 29)]).shape == (tiny.N_LAYERS, PLACES, tiny.D_MODEL)
    with pytest.raises(EditError, match="story 1 ends in other tokens"):
        spread(arm(untouched(subject), before=" He always gives."), tell(), range(1, 3), subject)
    broken = replace(subject, hf_model=copy.deepcopy(subject.hf_model))
    with torch.no_grad():
        next(iter(broken.blocks[2].parameters())).fill_(float("nan"))
    with pytest.raises(NumericsError, match="not finite in 24 of 72 places"):
        spread(arm(untouched(broken)), tell(), range(1), subject)
    assert len(questions(arm(untouched(subject)), tell(), range(2), subject)[0]) == 2
