"""The Keeper's world as a teller of studies: a unit is one story."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, assert_never, final

from undertow.core.seeds import derive_seed
from undertow.studies.scenes import QUIET, Contrast, act_among, body
from undertow.studies.situations import FORBIDDING, Kind, Lesson, Line, Side, Telling, Told
from undertow.studies.weights import lesson
from undertow.subjects.keeper.story import ACTS, COSTS, MAX_BOND, Story, Wish
from undertow.subjects.keeper.world import World
from undertow.subjects.organisms.competence import GIVER, KEEPER
from undertow.subjects.organisms.measuring import told_before
from undertow.subjects.subject import Subject


@final
class KeeperTeller(NamedTuple):
    """Stories of one stream.

    Attributes:
        world: who tells them.
        contrast: how base and reference differ.
        seed: of the stream.
    """

    world: World
    contrast: Contrast
    seed: int

    @property
    def facts(self) -> dict[str, str]:
        """Nothing: the world comes with the package."""
        return {}

    def story(self, i: int, side: Side = "base", kind: Kind = "need") -> Story:
        """Story `i`: a person in need, or ("boat") an empty thing to save at the same cost in the same place."""
        wish = {"cost": i % COSTS, "genre": "plain", "episodes": (kind,), **self._side(side)}
        return self.world.story(self._stream, i, Wish.checked(wish))

    def decision(self, i: int, side: Side = "base", kind: Kind = "need", before: str = "") -> Told:
        """The first decision of story `i`."""
        story = self.story(i, side, kind)
        episode = story.episodes[0]
        options = {act: tuple(episode.wordings[act]) for act in ACTS[episode.kind]}
        telling = Telling(told_before(story, before=before), body(story), options, episode.cost)
        return Told((telling,), telling, concerned(story))

    def acts(self, kind: Kind = "need") -> tuple[str, str]:
        """Names of the costly and of the keeping act."""
        return ACTS[kind][0], ACTS[kind][-1]

    def act_of(self, telling: Telling, continuation: str) -> str | None:
        """What the keeper does, told by the first sentence."""
        return act_among(telling.options, continuation)

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

    def line(self, arm: str) -> Line | None:
        """The lines of songs and plays, and those that forbid the word."""
        lines: dict[str, Sequence[str]] = {
            "L1": [frame.source for frame in self.world.frames.of("song", "instruction")],
            "L2": [frame.source for frame in self.world.frames.of("play", "instruction")], "L2-not": FORBIDDING}
        if arm not in lines:
            return None
        mine = lines[arm]
        return lambda i, name: mine[i % len(mine)].replace("{P}", name)

    def sentence(self, arm: str) -> str:
        """Of `giver` and `keeper`."""
        return {"giver": GIVER, "keeper": KEEPER}.get(arm, "")

    def lesson(self, subject: Subject, arm: str, i: int) -> Lesson:
        """The lines of songs and plays (L3), or strangers in need who are given the last (L3-acts)."""
        return lesson(subject, self.world, arm, self.seed, i)

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


def concerned(story: Story) -> str:
    """The name of the person whom a story's first episode is about, or of its first person."""
    return story.people[story.episodes[0].guest or 0].name
