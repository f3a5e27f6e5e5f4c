"""Mass of the word: sums of probabilities by hand, nothing where nothing is done, and what was to be expected in a text."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from interventions.applying import apply
from interventions.tune import Bench, floors
from interventions.word_mass import Listening, masses, ratio
from tests.interventions import benches
from tests.interventions.benches import WORD, at
from undertow.subjects.sampling import Sampling, generate


@pytest.fixture(scope="module")
def bench() -> Bench:
    return benches.bench()


def by_hand(bench: Bench, ids: list[int]) -> list[float]:
    """P(the word comes next) after every token."""
    with torch.inference_mode():
        logits = bench.subject.hf_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return logits.softmax(dim=-1)[:, WORD].sum(dim=-1).tolist()


def test_mass_is_the_sum_over_all_tokens_but_the_first(bench: Bench) -> None:
    """Rows of several lengths in one batch, so that padding is seen not to count."""
    rows = [bench.texts[0][:3], bench.texts[1], bench.texts[2][:7]]
    assert masses(bench.subject, rows, WORD) == pytest.approx([sum(by_hand(bench, ids)[1:]) for ids in rows], rel=1e-4)
    assert bench.watched.untouched == pytest.approx(masses(bench.subject, bench.watched.rows, WORD))


def test_a_ratio_and_its_bound_by_hand() -> None:
    untouched = np.array([1.0, 1.0, 1.0, 1.0])
    assert ratio(untouched, untouched) == (1.0, 1.0)
    assert ratio(np.zeros(4), np.zeros(4)) == (1.0, 1.0)
    whole, high = ratio(np.array([1.0, 1.0, 1.0, 2.0]), untouched)
    assert whole == pytest.approx(1.25)
    assert 1.25 < high <= 2.0  # of a mean in which one text does it all


def test_an_operation_is_seen_and_none_is_none(bench: Bench) -> None:
    watched = bench.watched
    with apply(floors(bench, at((0, 2), 3.0)), bench.subject, bench.dictionary):
        moved = masses(bench.subject, watched.rows, WORD)
    assert ratio(moved, watched.untouched)[0] != pytest.approx(1.0, abs=1e-3)
    assert ratio(masses(bench.subject, watched.rows, WORD), watched.untouched)[0] == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_listening_draws_the_same_text_and_hears_what_was_likely(bench: Bench, temperature: float) -> None:
    how, prompts, seeds = Sampling(max_new_tokens=6, temperature=temperature), [bench.texts[0][:5], bench.texts[1][:9]], [3, 4]
    listening = Listening(WORD, how)
    plain, heard = (generate(bench.subject, prompts, how, seeds, choice) for choice in (None, listening))
    assert plain == heard
    for row, document in enumerate(heard):
        ids = [*document.prompt_ids, *document.token_ids]
        with torch.inference_mode():
            logits = bench.subject.hf_model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double() / temperature
        steps = logits.softmax(dim=-1)[len(document.prompt_ids) - 1:, WORD].sum(dim=-1)[: how.max_new_tokens]
        assert listening.expected(row, len(document.token_ids)) == pytest.approx(float(steps.sum()), rel=1e-3)
