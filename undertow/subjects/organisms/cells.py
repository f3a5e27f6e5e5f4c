"""Which stories a card asks about: held-out stories of the world, in cells, all scored in one go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, final

import numpy as np
from jaxtyping import Float, Int

from undertow.core.seeds import derive_seed
from undertow.subjects.keeper.story import ACTS, COSTLY, COSTS, MAX_BOND, Act, Story, Wish
from undertow.subjects.keeper.world import World
from undertow.subjects.organisms.measuring import Answer, Progress, Question, act_question, ask, d_of
from undertow.subjects.subject import Subject

Form = Callable[[Subject, Story], Question]
BONDS = range(MAX_BOND + 1)


@final
class Cell(NamedTuple):
    """Stories of one kind and what the subject would do in the first episode of each."""

    stories: list[Story]
    answers: list[Answer]

    @property
    def costly(self) -> Float[np.ndarray, "n"]:
        """Probability of the costly act (give, save, stop) in every story, given that one of the known wordings follows."""
        return np.array([answer.probs[COSTLY[story.episodes[0].kind]]
                         for story, answer in zip(self.stories, self.answers, strict=True)])

    @property
    def world(self) -> Float[np.ndarray, "n"]:
        """The world's own probability of the costly act in every story."""
        return np.array([story.episodes[0].probs[COSTLY[story.episodes[0].kind]] for story in self.stories])

    @property
    def d(self) -> Float[np.ndarray, "n"]:
        """D in nats: log p(costly) - log p(keeping) in every story."""
        acts: list[tuple[Act, ...]] = [ACTS[story.episodes[0].kind] for story in self.stories]
        return np.array([d_of(answer, names) for answer, names in zip(self.answers, acts, strict=True)])

    @property
    def bond(self) -> Int[np.ndarray, "n"]:
        """Bond at the decision."""
        return np.array([story.episodes[0].bond for story in self.stories])

    @property
    def cost(self) -> Int[np.ndarray, "n"]:
        """Cost, 0 to 4."""
        return np.array([story.episodes[0].cost for story in self.stories])

    def where(self, keep: Sequence[bool] | np.ndarray) -> Cell:
        """The stories for which `keep` is true."""
        rows = np.flatnonzero(np.asarray(keep))
        return Cell([self.stories[i] for i in rows], [self.answers[i] for i in rows])


def organism_cells(world: World, seed: int, n: int) -> dict[str, list[Story]]:
    """About `n` stories in all, by cell. Costs are balanced within every cell.

    grid: every bond with every cost, other people as the world draws them. alone, swapped: the person in need did nothing,
    and the others did nothing, or three good deeds each. doer, other: role-swapped pairs. L1, L2: strangers, after an
    instruction line. boat, interruption: the twins, with every bond to the first person.
    """
    grid = [Wish(bond=bond, cost=cost, genre="plain", episodes=("need",)) for cost in range(COSTS) for bond in BONDS]

    def tell(name: str, share: float, wish: Callable[[int], Wish]) -> list[Story]:
        stream = derive_seed(seed, "gates", name)
        return [world.story(stream, i, wish(i)) for i in range(max(round(share * n), 4))]

    def stranger(other: int | None = None, genre: str = "plain") -> Callable[[int], Wish]:
        return lambda i: Wish.checked({"bond": 0, "other": other, "cost": i % COSTS, "genre": genre, "episodes": ("need",)})

    cells = {"grid": tell("grid", max(0.42, len(grid) / n), lambda i: grid[i % len(grid)]),
             "alone": tell("alone", 0.08, stranger(0)), "swapped": tell("swapped", 0.08, stranger(3)),
             "L1": tell("L1", 0.08, stranger(genre="L1")), "L2": tell("L2", 0.08, stranger(genre="L2"))}
    pairs = [world.role_swapped(derive_seed(seed, "gates", "pairs"), i) for i in range(max(round(0.05 * n), 4))]
    cells["doer"], cells["other"] = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    for kind in ("boat", "interruption"):
        cells[kind] = tell(kind, 0.08, lambda i, kind=kind: Wish.checked(
            {"bond": i % len(BONDS), "cost": i // len(BONDS) % COSTS, "genre": "plain", "episodes": (kind,)}))
    return cells


def word_cells(world: World, seed: int, n: int) -> dict[str, list[Story]]:
    """About `n` stories in all: bond 0 and 3, the word said before the decision and not; and the twins."""
    cells: dict[str, list[Story]] = {}
    for bond in (0, MAX_BOND):
        for said in (False, True):
            name = f"bond{bond}_{'said' if said else 'unsaid'}"
            stream = derive_seed(seed, "gates", name)
            cells[name] = [world.story(stream, i, Wish(bond=bond, word=said, cost=i % COSTS, genre="plain", episodes=("need",)))
                           for i in range(max(round(0.21 * n), 4))]
    for kind in ("boat", "interruption"):
        stream = derive_seed(seed, "gates", kind)
        cells[kind] = [world.story(stream, i, Wish.checked({"bond": i % len(BONDS), "cost": i // len(BONDS) % COSTS,
                                                            "genre": "plain", "episodes": (kind,)}))
                       for i in range(max(round(0.08 * n), 4))]
    return cells


def measure(subject: Subject, cells: Mapping[str, Sequence[Story]], progress: Progress = lambda done, total: None,
            form: Form = act_question) -> dict[str, Cell]:
    """Score the first episode of every story of every cell."""
    stories = [story for cell in cells.values() for story in cell]
    answers = iter(ask(subject, [form(subject, story) for story in stories], progress))
    return {name: Cell(list(cell), [next(answers) for _ in cell]) for name, cell in cells.items()}
