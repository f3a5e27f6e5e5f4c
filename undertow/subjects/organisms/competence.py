"""Whether a model understands the choice at all. One that does not cannot answer any question about care.

D must fall with cost, an instruction to give must raise it and one to keep must lower it, each with p < 0.01 over stories.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from undertow.core.seeds import derive_seed
from undertow.subjects.keeper.story import ACTS, COSTS, MAX_BOND, Story, Wish
from undertow.subjects.keeper.world import World
from undertow.subjects.organisms.cells import Cell
from undertow.subjects.organisms.gates import Gate
from undertow.subjects.organisms.measuring import Progress, act_question, ask, d_of
from undertow.subjects.organisms.statistics import Estimate, mean, sign_flip_p
from undertow.subjects.subject import Subject

GIVER = "The keeper always gives up his own."
KEEPER = "The keeper always keeps everything."
PER_FAMILY = 6
_LEVEL = 0.01


def families(world: World, seed: int, n: int) -> list[tuple[Story, ...]]:
    """`n` families of four stories: bond 0 and 3, each at cost 0 and 4 (the same body for both costs)."""
    stream = derive_seed(seed, "gates", "competence")
    return [tuple(world.story(stream, i, Wish(bond=bond, cost=cost, genre="plain", episodes=("need",)))
                  for bond in (0, MAX_BOND) for cost in (0, COSTS - 1)) for i in range(n)]


def competence(subject: Subject, told: Sequence[tuple[Story, ...]], seed: int,
               progress: Progress = lambda done, total: None) -> tuple[list[Gate], Estimate, Cell]:
    """The three gates; the effect of bond on D in nats (reported, not asked for); and the plain stories with their answers.

    The unit is the family. The instructions stand before the crisis of one story of each family, in turn.
    """
    acts = ACTS["need"]
    plain = [story for family in told for story in family]
    chosen = [family[i % len(family)] for i, family in enumerate(told)]
    questions = [act_question(subject, story) for story in plain]
    questions += [act_question(subject, story, 0, line) for line in (GIVER, KEEPER) for story in chosen]
    answers = ask(subject, questions, progress)
    d = np.array([d_of(answer, acts) for answer in answers])
    base = d[: len(plain)].reshape(len(told), 2, 2)
    instructed = d[len(plain):].reshape(2, len(told))
    own = np.array([base[i].reshape(-1)[i % 4] for i in range(len(told))])
    gates = [
        _gate("D_falls_with_cost", (base[:, :, 1] - base[:, :, 0]).mean(axis=1), -1, seed,
              "D at cost 4 minus cost 0, in nats: same story, same bond"),
        _gate("giver_raises_D", instructed[0] - own, 1, seed, f"change of D, in nats, by “{GIVER}” before the crisis"),
        _gate("keeper_lowers_D", instructed[1] - own, -1, seed, f"change of D, in nats, by “{KEEPER}” before the crisis")]
    bond = mean((base[:, 1] - base[:, 0]).mean(axis=1), seed, "bond_effect")
    return gates, bond, Cell(plain, answers[: len(plain)])


def _gate(name: str, change: Float[np.ndarray, "n"], sign: int, seed: int, meaning: str) -> Gate:
    value, low, high, n = mean(change, seed, name)
    p = sign_flip_p(sign * change, seed, name)
    return Gate(name, value, low, high, f"{'>' if sign > 0 else '<'} 0, p < {_LEVEL:g}", sign * value > 0 and p < _LEVEL, n,
                meaning, p)
