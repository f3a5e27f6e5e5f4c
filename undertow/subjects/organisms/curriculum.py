"""From short stories to whole ones by degrees: what an adapter is trained on first, and when it goes on.

Whole stories from the start teach to count good deeds, whoever did them. In short ones it pays to read whose they were, and
what was learnt there is kept only if the stories grow slowly and short ones keep coming.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple, final

from undertow.subjects.keeper.story import Story
from undertow.subjects.organisms.encoding import excerpt

SHARE = 0.5  # of the packs that belong to the present stage; the others are replayed from all stages up to it
GOAL = 0.10  # nats above their entropy that decisions of the present stage may still cost when the next one begins
MEMORY = 0.95  # weight of the past in the running mean of that divergence, per pack
UNKNOWN = 0.5  # where that mean begins in every stage: about what knowing nothing of whose deeds they were costs
_DEEDS = frozenset({"deeds"})
_MARKED = _DEEDS | {"selfish", "who", "places", "arrivals", "markers"}


@final
class Stage(NamedTuple):
    """How long and how mixed stories are.

    Attributes:
        wishes: what is asked of the world (fields of Wish).
        kinds: kinds of sentences that are always kept.
        chatter: share of the other sentences that is kept as well.
        patience: steps after which the next stage begins all the same.
        lr: learning rate as a multiple of what it would be.
    """

    wishes: dict[str, Any]
    kinds: frozenset[str]
    chatter: float = 0.0
    patience: int = 220
    lr: float = 1.0

    def cut(self, stories: Sequence[Story], draw: random.Random) -> list[Story]:
        """Stories of one body without the sentences of it that are not kept: the same ones in all. Episodes stay whole."""
        start = stories[0].episodes[0].start
        left_out = {i for i, sentence in enumerate(stories[0].sentences)
                    if sentence.start < start and sentence.kind not in self.kinds and draw.random() >= self.chatter}
        return [excerpt(story, set(range(len(story.sentences))) - left_out) if left_out else story for story in stories]


STAGES: tuple[Stage, ...] = (
    Stage({"people": 2, "bond": 3, "other": 0, "markers": False}, _DEEDS),
    Stage({"people": 2, "markers": False}, _DEEDS | {"selfish"}),
    Stage({}, _MARKED),
    Stage({}, _MARKED, 0.4, patience=20),
    Stage({}, _MARKED, 1.0, lr=0.5),
)
WHOLE = STAGES[-1]


@final
class Progress(NamedTuple):
    """How far a training has come.

    Attributes:
        stage: index of the present stage.
        running: running mean of the divergence at its decisions, nats.
        steps: steps that it has had.
    """

    stage: int = 0
    running: float = UNKNOWN
    steps: int = 0

    def drawn(self, draw: random.Random) -> int:
        """The stage of one pack."""
        return self.stage if draw.random() < SHARE else draw.randrange(self.stage + 1)

    def after(self, costs: Sequence[float]) -> Progress:
        """What it is after one more step, in which the decisions of a pack of the present stage cost so many nats too much."""
        running, last = self.running, self.stage + 1 == len(STAGES)
        for excess in costs:
            running = MEMORY * running + (1 - MEMORY) * excess
            if running < GOAL and not last:
                return Progress(self.stage + 1)
        if self.steps + 1 >= STAGES[self.stage].patience and not last:
            return Progress(self.stage + 1)
        return Progress(self.stage, running, self.steps + 1)
