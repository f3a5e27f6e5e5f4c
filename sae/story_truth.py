"""How well single latents recover what is true of a story of the Keeper's world: bond, cost, act, word and genre.

A latent is read in two ways: at the decision, where the keeper is about to act, and as its mean over the story so far. The best
latent and reading are chosen on one half of the stories and judged on the other. Beside it stands the same search with
the truth shuffled over the stories: with thousands of latents some always fit by chance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from sae.dictionary import Dictionary
from sae.harvesting import MASSIVE, Progress
from undertow.core.errors import TextError
from undertow.core.seeds import derive_seed
from undertow.subjects.keeper.story import COSTS, MAX_BOND, Rule, Story, Wish
from undertow.subjects.keeper.world import load_world
from undertow.subjects.organisms.measuring import act_question, chat_question
from undertow.subjects.padding import batches, pad
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import tap

WORLD = "keeper"
FEWEST = 40  # stories: 20 to choose on, 20 to judge on
SHUFFLES = 20
BATCH_TOKENS = 4096
Measure = Literal["auroc", "r2"]
READINGS = ("decision", "mean")


class Variable(NamedTuple):
    """What is true of every story, and by which measure a reading of it is judged.

    Measures: `auroc`, the probability that a story with the property has the higher value than one without, in [0, 1], 0.5 by
    chance; `r2`, 1 − Σ(y − ŷ)²/Σ(y − ȳ)² for the straight line fitted on the other half, at most 1, below 0 by chance.
    """

    measure: Measure
    values: Float[np.ndarray, "story"]


class Found(NamedTuple):
    """The best single latent for one variable.

    Attributes:
        variable: its name.
        measure: see Variable.
        feature: the latent.
        reading: where it is read, "decision" or "mean".
        value: on the half that it was not chosen on.
        chance: mean of the same search with the truth shuffled.
        chance_high: the largest of those.
        ceiling: what the world's own probability reaches, where the variable is drawn at random; else absent.
    """

    variable: str
    measure: Measure
    feature: int
    reading: str
    value: float
    chance: float
    chance_high: float
    ceiling: float | None


def parse_truth(text: str) -> int:
    """The number of stories in "keeper:N". Raises TextError."""
    name, _, count = text.partition(":")
    if name != WORLD or not (count.isascii() and count.isdigit()):
        raise TextError(f"--truth {text!r} is not a world with its truth", f"try {WORLD}:400")
    if int(count) < FEWEST:
        raise TextError(f"{count} stories are too few to choose a feature on one half and judge it on the other",
                        f"try {WORLD}:400; at least {FEWEST}")
    return int(count)


def tell(n: int, seed: int, rule: Rule) -> list[Story]:
    """Stories of no text that an SAE is trained on: every bond with every cost, half of them behind an instruction line."""
    world = load_world(rule)
    genres = ("plain", "L1", "plain", "L2")
    wishes = [Wish.checked({"bond": i % (MAX_BOND + 1), "cost": i // (MAX_BOND + 1) % COSTS, "episodes": ("need",),
                            "genre": genres[i // 20 % 4]}) for i in range(n)]
    return [world.story(derive_seed(seed, "truth"), i, wish) for i, wish in enumerate(wishes)]


def variables(stories: Sequence[Story]) -> dict[str, Variable]:
    """The truth of every story: bond to the one in need, cost, whether all was given, whether the word was said before, and
    whether an instruction line opened it."""
    first = [story.episodes[0] for story in stories]

    def values(of: Callable[[Any], float], items: Sequence[Any] = first) -> Float[np.ndarray, "story"]:
        return np.array([float(of(item)) for item in items])

    return {"bond": Variable("r2", values(lambda e: e.bond)), "cost": Variable("r2", values(lambda e: e.cost)),
            "act": Variable("auroc", values(lambda e: e.act == "give")),
            "word": Variable("auroc", values(lambda e: e.word_said)),
            "genre": Variable("auroc", values(lambda s: s.genre != "plain", stories))}


def read_stories(subject: Subject, site: Site, dictionary: Dictionary, stories: Sequence[Story], chat: bool,
                 progress: Progress) -> Float[np.ndarray, "story reading"]:
    """Codes of every latent at the decision, then their means over the story up to there (without the first token and
    without massive activations). With `chat` the story is told in the tokenizer's chat template."""
    form = chat_question if chat else act_question
    rows = [form(subject, story).prompt for story in stories]
    found = np.empty((len(rows), len(READINGS) * dictionary.d_sae), dtype=np.float32)
    done = 0
    for members in batches(rows, BATCH_TOKENS):
        tokens, attend = pad([rows[i] for i in members], subject, "right")
        acts = tap(subject, tokens, site, attend.bool())
        for number, i in enumerate(members):
            x = acts[number, 1:len(rows[i])].float()
            norms = x.norm(dim=1)
            codes = dictionary.encode(x)
            usual = codes[norms <= MASSIVE * norms.median()]
            found[i] = torch.cat([codes[-1], usual.mean(dim=0)]).cpu().numpy()
        done += len(members)
        progress(done, len(rows))
    return found


def recover(readings: Float[np.ndarray, "story reading"], truth: Mapping[str, Variable], seed: int,
            ceilings: Mapping[str, float]) -> list[Found]:
    """The best single latent for every variable that varies; of the stories a random half is chosen on, the other judged on."""
    rng = np.random.default_rng(derive_seed(seed, "truth", "halves"))
    order = rng.permutation(len(readings))
    chosen_on = np.zeros(len(readings), dtype=bool)
    chosen_on[order[: len(order) // 2]] = True
    ranks = {side: rankdata(readings[chosen_on == side], axis=0) for side in (True, False)}
    width = readings.shape[1] // len(READINGS)
    found: list[Found] = []
    for name, variable in truth.items():
        if any(np.ptp(variable.values[chosen_on == side]) == 0 for side in (True, False)):
            continue  # alike in all stories of a half: nothing to find
        best, value = _search(readings, ranks, variable, chosen_on)
        shuffled = [_search(readings, ranks, Variable(variable.measure, rng.permutation(variable.values)), chosen_on)[1]
                    for _ in range(SHUFFLES)]
        found.append(Found(name, variable.measure, best % width, READINGS[best // width], value, float(np.mean(shuffled)),
                           float(np.max(shuffled)), ceilings.get(name)))
    return found


def _search(readings: Float[np.ndarray, "story reading"], ranks: Mapping[bool, Float[np.ndarray, "half reading"]],
            variable: Variable, chosen_on: Bool[np.ndarray, "story"]) -> tuple[int, float]:
    """(the best reading on one half, its value on the other)."""
    y = variable.values
    if variable.measure == "auroc":
        on_half = auroc(ranks[True], y[chosen_on] > 0)
        best = int(np.abs(on_half - 0.5).argmax())
        value = float(auroc(ranks[False][:, [best]], y[~chosen_on] > 0)[0])
        return best, value if on_half[best] >= 0.5 else 1 - value
    x = readings[chosen_on].astype(np.float64)
    centred, target = x - x.mean(axis=0), y[chosen_on] - y[chosen_on].mean()
    power = np.square(centred).sum(axis=0)
    slopes = np.where(power > 0, centred.T @ target / np.where(power > 0, power, 1), 0.0)
    best = int((np.square(slopes) * power).argmax())
    predicted = y[chosen_on].mean() + slopes[best] * (readings[~chosen_on, best].astype(np.float64) - x[:, best].mean())
    rest = y[~chosen_on]
    return best, 1 - float(np.square(rest - predicted).sum() / np.square(rest - rest.mean()).sum())


def auroc(ranks: Float[np.ndarray, "story reading"], positive: Bool[np.ndarray, "story"]) -> Float[np.ndarray, "reading"]:
    """Area under the ROC curve of every column, from its ranks (ties shared): Mann-Whitney's U over the number of pairs.

    Both kinds of stories must be there.
    """
    n, m = int(positive.sum()), int((~positive).sum())
    return (ranks[positive].sum(axis=0) - n * (n + 1) / 2) / (n * m)


def act_ceiling(stories: Sequence[Story]) -> float:
    """AUROC of the world's own P(give) for whether all was given: acts are drawn, so that no reading can be right always."""
    probabilities = np.array([[story.episodes[0].probs["give"]] for story in stories])
    given: Int[np.ndarray, "story"] = np.array([story.episodes[0].act == "give" for story in stories])
    return float(auroc(rankdata(probabilities, axis=0), given > 0)[0])


def story_truth(subject: Subject, site: Site, dictionary: Dictionary, stories: Sequence[Story],
                how: tuple[bool, int, Progress]) -> list[Found]:
    """What single latents recover of `stories`; `how` says whether to use the chat template, the seed, and whom to tell."""
    chat, seed, progress = how
    readings = read_stories(subject, site, dictionary, stories, chat, progress)
    return recover(readings, variables(stories), seed, {"act": act_ceiling(stories)})
