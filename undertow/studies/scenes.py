"""Situations of a study in the Keeper's world: strangers, the context in which a subject acts by itself, an instruction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar, assert_never, final

from undertow.core.seeds import derive_seed
from undertow.subjects.keeper.story import COSTLY, COSTS, MAX_BOND, Act, Story, Wish, Wording
from undertow.subjects.keeper.world import World
from undertow.subjects.organisms.measuring import Question, act_question
from undertow.subjects.subject import Subject

_Act = TypeVar("_Act", bound=str)
Contrast = Literal["role_swapped", "word"]
COSTLY_ACT, KEEPING_ACT = "give", "keep"
QUIET = Wish(genre="plain", word=False)  # ordinary text: where the word stands already, its hazard is near 1 in every arm


@final
class Scenes(NamedTuple):
    """Stories of one stream, the same index in every list being of one place and cost.

    Attributes:
        base: in which the subject is untouched and has no reason of its own: strangers, or nobody said the word.
        reference: in which it acts by itself: bonded people, or the word was said.
        held_out: as `base`, with goods and wordings of acts that no discovery pair has.
        twins: the same cost, for an empty thing.
        plain: stories whose bodies are ordinary text, without the word.
    """

    base: list[Story]
    reference: list[Story]
    held_out: list[Story]
    twins: list[Story]
    plain: list[Story]


def scenes(world: World, contrast: Contrast, seed: int, n: int, n_other: int, wording: Wording = "all") -> Scenes:
    """`n` stories of base and reference, with goods and acts of the given wording, and `n_other` of the others, that no
    discovery or development pair shares."""
    stream = derive_seed(seed, "scenes", contrast)

    def told(i: int, **wish: object) -> Story:
        common = {"cost": i % COSTS, "genre": "plain", "episodes": ("need",)}
        return world.story(stream, i, Wish.checked(common | wish))

    match contrast:
        case "role_swapped":
            base, reference = [{"bond": bond, "word": False} for bond in (0, MAX_BOND)]
        case "word":
            base, reference = [{"word": said} for said in (False, True)]
        case _ as never:
            assert_never(never)
    return Scenes([told(i, **base, wording=wording) for i in range(n)],
                  [told(i, **reference, wording=wording) for i in range(n)],
                  [told(n + i, **base, wording="held_out") for i in range(n_other)],
                  [told(n + i, **base, episodes=("boat",)) for i in range(n_other)],
                  [world.story(derive_seed(stream, "plain"), i, QUIET) for i in range(n_other)])


def body(story: Story) -> str:
    """The text before the first episode."""
    return story.text[: story.episodes[0].start].rstrip()


def instructed(subject: Subject, world: World, stories: Sequence[Story]) -> list[Question]:
    """The decisions of `stories` after an instruction line (L2) about the person in need."""
    lines = world.frames.of("play", "instruction")
    found = []
    for i, story in enumerate(stories):
        guest = story.people[story.episodes[0].guest or 0].name
        line = lines[i % len(lines)].source.replace("{P}", guest)
        found.append(act_question(subject, story)._replace(prompt=subject.encode(f"{line}\n{story.prompt()}")))
    return found


def act_of(story: Story, continuation: str) -> Act | None:
    """What the keeper does in the first episode, told by the first sentence of `continuation`; None if it is no known act."""
    return act_among(story.episodes[0].wordings, continuation)


def act_among(options: Mapping[_Act, Sequence[str]], continuation: str) -> _Act | None:
    """The act among whose wordings the first sentence of `continuation` is; None if there is none."""
    sentence = f"{continuation.split('.', maxsplit=1)[0]}."
    return next((act for act, wordings in options.items() if sentence in wordings), None)


def costly(story: Story) -> Act:
    """The costly act of a story's first episode."""
    return COSTLY[story.episodes[0].kind]
