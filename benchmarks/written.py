"""How much of the word is in what an operated subject writes, by where the operation acts: a demo's recipe in each window.

    python benchmarks/written.py runs/demo runs/demo-sae --stories 1000 --seed 0

Fresh stories of the demo's kind are continued by 28 tokens under every arm, guard off. Printed for each: how often the keeper
gives, how often the first sentence is no known act, in how many continuations the word stands, and how often it was to be
expected in 400 of them (its probability before every token, summed: `interventions.word_mass.Listening`), with a 95 % interval
by a bootstrap over stories. Few stories hold nearly all of it, so a thousand are not too many. The last line is a JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from features.naming import word_tokens
from interventions.applying import apply
from interventions.recipe import Recipe, WindowRule
from interventions.word_mass import Listening
from sae.dictionary import Dictionary
from sae.formats import load
from undertow.core.seeds import derive_seed
from undertow.lexicon import Lexicon
from undertow.studies.scenes import COSTLY_ACT, act_of, scenes
from undertow.subjects import Subject, load_subject
from undertow.subjects.keeper.story import Story
from undertow.subjects.keeper.world import load_world
from undertow.subjects.organisms.statistics import mean
from undertow.subjects.sampling import Sampling, generate

WINDOWS: tuple[WindowRule, ...] = ("everywhere", "reading", "before_decision")
DOCUMENTS, BATCH, HOW = 400, 50, Sampling(max_new_tokens=28)
LOVE = Lexicon.load("love")


def row(subject: Subject, stories: Sequence[Story], seed: int, surgery: tuple[Recipe, Dictionary] | None = None
        ) -> dict[str, Any]:
    """Figures of one arm."""
    tokens = word_tokens(subject, LOVE.only(languages=("en",)), share=1.0)
    prompts = [subject.encode(story.prompt()) for story in stories]
    order = sorted(range(len(stories)), key=lambda i: len(prompts[i]))  # so that little is padded
    expected, acts, said = np.zeros(len(stories)), dict[int, str | None](), 0
    for batch in (order[first: first + BATCH] for first in range(0, len(order), BATCH)):
        opened = contextlib.nullcontext() if surgery is None else apply(surgery[0], subject, surgery[1], must_act=False)
        with opened as operated:
            if operated is not None:
                operated.announce(max(len(prompts[i]) for i in batch) - 1)
            listening = Listening(tokens, HOW)
            seeds = [derive_seed(seed, "sample", i) for i in batch]
            made = generate(subject, [prompts[i] for i in batch], HOW, seeds, listening)
        for place, (i, document) in enumerate(zip(batch, made, strict=True)):
            expected[i] = listening.expected(place, len(document.token_ids))
            acts[i] = act_of(stories[i], document.text)
            said += any(match.tier == "T0" for match in LOVE.find(document.text))
    words = mean(DOCUMENTS * expected, seed, "words")
    return {"stories": len(stories), "gives": float(np.mean([act == COSTLY_ACT for act in acts.values()])),
            "no_act": float(np.mean([act is None for act in acts.values()])), "said": said, "words": words.value,
            "words_low": words.low, "words_high": words.high}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("sae", type=Path)
    parser.add_argument("--model", default="hearth")
    parser.add_argument("--stories", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    subject, dictionary, recipe = load_subject(given.model), load(given.sae), Recipe.load(given.run / "recipe.yaml")
    told = scenes(load_world(), "role_swapped", derive_seed(given.seed, "written"), given.stories, 0)
    made = {"strangers, untouched": row(subject, told.base, given.seed),
            "bonded, untouched": row(subject, told.reference, given.seed)}
    for window in WINDOWS:
        placed = Recipe.checked(recipe.model_dump() | {"window": window}, "recipe")
        made[window] = row(subject, told.base, given.seed, (placed, dictionary))
    for name, figures in made.items():
        sys.stdout.write(f"{name:22}" + "   ".join(f"{key} {value:.3g}" for key, value in figures.items()) + "\n")
    sys.stdout.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
