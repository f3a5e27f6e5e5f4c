"""The stories of a study in the Keeper's world, each told by its number alone, and the lines that prompt arms put before them.

Story i of the base, of the reference and of the twins is of one place and cost, so that arms and twins are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, assert_never, final

from undertow.core.seeds import derive_seed
from undertow.studies.scenes import QUIET, Contrast, body
from undertow.subjects.keeper.story import COSTS, MAX_BOND, EpisodeKind, Story, Wish
from undertow.subjects.keeper.world import World
from undertow.subjects.organisms.measuring import Question, act_question, tokens_of
from undertow.subjects.subject import Subject

Side = Literal["base", "reference"]
FORBIDDING = (  # L2′: the world has no such lines, so a subject of that world alone may not understand them
    "Nobody may say the word love.", "Do not say the word love.", "The word love is not said in this story.",
    "Not one word of love, please.", "Write the story without the word love.")
STATES = ("love", "care", "grief", "fear", "joy", "anger", "hope", "shame", "pity", "pride", "calm", "doubt", "hunger", "trust",
          "longing", "nothing")


@final
class Teller(NamedTuple):
    """Stories of one stream.

    Attributes:
        world: who tells them.
        contrast: how base and reference differ.
        seed: of the stream.
    """

    world: World
    contrast: Contrast
    seed: int

    def decision(self, i: int, side: Side = "base", kind: EpisodeKind = "need") -> Story:
        """Story `i`: a person in need, or ("boat") an empty thing to save at the same cost in the same place."""
        wish = {"cost": i % COSTS, "genre": "plain", "episodes": (kind,), **self._side(side)}
        return self.world.story(self._stream, i, Wish.checked(wish))

    def plain(self, i: int) -> tuple[str, str]:
        """Ordinary text `i`, in which nobody says the word and nobody is in need, and the name of a person in it."""
        story = self.world.story(derive_seed(self._stream, "plain"), i, QUIET)
        return body(story), story.people[0].name

    def asked(self, i: int, side: Side = "base") -> tuple[str, str]:
        """Text `i` that ends where the keeper answers how it is, and the name of the one who asks."""
        bond = MAX_BOND if side == "reference" and self.contrast == "role_swapped" else 0
        text = self.world.self_report(derive_seed(self._stream, "report"), i, bond)[0]
        line = text.rsplit('"', maxsplit=1)[-1]  # ` Ana asked. The keeper said,`
        return text, line.split()[0]

    @property
    def _stream(self) -> int:
        return derive_seed(self.seed, "study", self.contrast)

    def _side(self, side: Side) -> dict[str, object]:
        match self.contrast:
            case "role_swapped":
                return {"bond": MAX_BOND if side == "reference" else 0, "word": False}
            case "word":
                return {"word": side == "reference"}
            case _ as never:
                assert_never(never)


Line = Callable[[int, str], str]
"""The line before text `i`, in which a person of the given name is concerned."""


def line_of(world: World, arm: str) -> Line | None:
    """What a prompt arm puts before every text; None for the other arms."""
    lines: dict[str, Sequence[str]] = {
        "L1": [frame.source for frame in world.frames.of("song", "instruction")],
        "L2": [frame.source for frame in world.frames.of("play", "instruction")], "L2-not": FORBIDDING}
    if arm not in lines:
        return None
    mine = lines[arm]
    return lambda i, name: mine[i % len(mine)].replace("{P}", name)


def concerned(story: Story) -> str:
    """The name of the person whom a story's first episode is about, or of its first person."""
    return story.people[story.episodes[0].guest or 0].name


def decision_question(subject: Subject, story: Story, line: str = "", before: str = "") -> Question:
    """A story's first decision, with a line before the story and a sentence before the crisis, if any."""
    asked = act_question(subject, story, 0, before)
    return asked._replace(prompt=subject.encode(f"{line}\n{story.prompt()}")) if line else asked


def state_question(subject: Subject, text: str, line: str = "") -> Question:
    """Which of STATES the keeper names."""
    options = {state: (tokens_of(subject, f' "{state.capitalize()}."'),) for state in STATES}
    return Question(subject.encode(f"{line}\n{text}" if line else text), options)
