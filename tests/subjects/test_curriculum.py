"""Short stories first: what a stage leaves out, and when the next one begins."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from undertow.subjects.keeper.story import Story, Wish
from undertow.subjects.keeper.world import load_world
from undertow.subjects.organisms import curriculum
from undertow.subjects.organisms.curriculum import GOAL, MEMORY, STAGES, UNKNOWN, WHOLE, Progress

WORLD = load_world()


def told(stage: int, index: int, forks: int = 3) -> list[Story]:
    wish = Wish(genre="plain", episodes=("need",), **STAGES[stage].wishes)
    return [WORLD.story(5, index, wish, fork=fork) for fork in range(forks)]


@pytest.mark.parametrize("stage", range(len(STAGES)))
def test_a_stage_cuts_the_body_and_nothing_else(stage: int) -> None:
    for index in range(8):
        whole = told(stage, index)
        short = STAGES[stage].cut(whole, random.Random(index))
        assert len({story.text[: story.episodes[0].start] for story in short}) == 1
        for before, after in zip(whole, short, strict=True):
            old, new = before.episodes[0], after.episodes[0]
            assert after.text[new.start:] == before.text[old.start:] and new.bond == old.bond and new.probs == old.probs
            assert after.text[new.decision:].startswith(before.text[old.decision: before.sentences[-1].end])
            assert all(after.text[choice.start:].startswith(tuple(choice.probs)) for choice in after.choices)
            body = Counter(s.kind for s in after.sentences if s.start < new.start)
            every = Counter(s.kind for s in before.sentences if s.start < old.start)
            assert all(body[kind] == every[kind] for kind in STAGES[stage].kinds)
            if not STAGES[stage].chatter:
                assert set(body) <= STAGES[stage].kinds


def test_stages_grow_from_one_doer_to_whole_stories() -> None:
    first = STAGES[0].cut(told(0, 1), random.Random(0))[0]
    assert sorted(first.sentences[-1].bonds) == [0, 3]
    assert {s.kind for s in first.sentences if s.start < first.episodes[0].start} == {"deeds"}
    words = [sum(len(STAGES[stage].cut(told(stage, i), random.Random(i))[0].text) for i in range(40))
             for stage in range(len(STAGES))]
    assert words == sorted(words)
    whole = told(len(STAGES) - 1, 0)
    assert WHOLE.cut(whole, random.Random(0)) == whole


def test_half_of_the_packs_are_of_the_present_stage_and_half_replayed() -> None:
    draw = random.Random(0)
    drawn = Counter(Progress(2).drawn(draw) for _ in range(3000))
    assert drawn[2] / 3000 == pytest.approx(0.5 + 0.5 / 3, abs=0.03)
    assert drawn[0] / 3000 == pytest.approx(0.5 / 3, abs=0.03) and set(drawn) == {0, 1, 2}
    assert {Progress().drawn(draw) for _ in range(20)} == {0}


def test_the_next_stage_begins_when_the_present_one_is_learnt(monkeypatch: pytest.MonkeyPatch) -> None:
    once = Progress().after([0.2])
    assert once == (0, pytest.approx(MEMORY * UNKNOWN + (1 - MEMORY) * 0.2), 1)
    assert Progress().after([]) == (0, UNKNOWN, 1)  # a step of replayed packs alone
    progress, steps = Progress(), 0
    while progress.stage == 0:
        progress, steps = progress.after([0.0, 0.0]), steps + 1
    assert progress == (1, UNKNOWN, 0)  # and what was known of the stage before is forgotten
    assert MEMORY ** (2 * steps) * UNKNOWN < GOAL <= MEMORY ** (2 * steps - 2) * UNKNOWN
    monkeypatch.setattr(curriculum, "GOAL", 2 * GOAL)
    assert Progress(len(STAGES) - 1, GOAL).after([0.0]).stage == len(STAGES) - 1  # nothing follows the last one


def test_a_stage_that_is_not_learnt_is_left_after_a_while() -> None:
    stuck = Progress()
    for _ in range(STAGES[0].patience - 1):
        stuck = stuck.after([GOAL * 1.1])
    assert stuck.stage == 0
    assert stuck.after([GOAL * 1.1]) == (1, UNKNOWN, 0)
    last = Progress(len(STAGES) - 1, UNKNOWN, 500)
    assert last.after([]) == (len(STAGES) - 1, UNKNOWN, 501)
