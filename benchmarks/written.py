"""How much of the word is in what an operated subject writes, by where the operation acts: a demo's recipe in each window.

    python benchmarks/written.py runs/demo runs/demo-sae --stories 100 --seed 0

Fresh stories of the demo's kind are continued by 28 tokens under every arm, guard off. Printed for each: how often the keeper
gives, how often the first sentence is no known act, and the number of words to be expected in 400 such continuations (the
hazard summed over what was written, which is that number without the luck of the draw), under the arm and under the untouched
subject reading the same texts. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import final

import numpy as np

from interventions.applying import Operated, apply
from interventions.audit import AuditSpec, audit, spellings
from interventions.recipe import Recipe, WindowRule
from sae.dictionary import Dictionary
from sae.formats import load
from undertow.core.seeds import derive_seed
from undertow.lexicon import Lexicon
from undertow.lexicon.trie import TokenTrie
from undertow.studies.scenes import COSTLY_ACT, act_of, scenes
from undertow.subjects import Subject, load_subject
from undertow.subjects.keeper.story import Story
from undertow.subjects.keeper.world import load_world
from undertow.subjects.sampling import Generated, Sampling, generate

WINDOWS: tuple[WindowRule, ...] = ("everywhere", "reading", "before_decision")
DOCUMENTS = 400


@final
class Arm:
    """The subject, or the subject under a recipe whose window is placed at a prompt's end."""

    def __init__(self, subject: Subject, dictionary: Dictionary, recipe: Recipe | None) -> None:
        self._subject, self._dictionary, self._recipe = subject, dictionary, recipe

    @contextlib.contextmanager
    def at(self, prompt: int) -> Iterator[Subject]:
        """As it is for a text whose first `prompt` tokens are read and whose others are written."""
        opened = (contextlib.nullcontext() if self._recipe is None
                  else apply(self._recipe, self._subject, self._dictionary, must_act=False))
        with opened as operated:
            if isinstance(operated, Operated):
                operated.announce(prompt - 1)
            yield self._subject

    def write(self, stories: list[Story], seed: int) -> list[Generated]:
        """One continuation a story."""
        made = []
        for i, story in enumerate(stories):
            ids = self._subject.encode(story.prompt())
            with self.at(len(ids)) as subject:
                made += generate(subject, [ids], Sampling(max_new_tokens=28), [derive_seed(seed, "sample", i)])
        return made


def row(subject: Subject, arm: Arm, stories: list[Story], trie: TokenTrie, seed: int) -> dict[str, float]:
    """Figures of one arm."""
    written = arm.write(stories, seed)
    acts = [act_of(story, document.text) for story, document in zip(stories, written, strict=True)]
    hazards = []
    for document in written:
        prompt = len(document.prompt_ids)
        measured = audit(subject, arm.at(prompt), [[*document.prompt_ids, *document.token_ids]], trie,
                         AuditSpec(tolerance=3e-5, relative=0.02))
        hazards.append((measured.hazard[prompt - 1:].sum(), measured.hazard_base[prompt - 1:].sum()))
    own, base = np.array(hazards).T
    return {"gives": float(np.mean([act == COSTLY_ACT for act in acts])),
            "no_act": float(np.mean([act is None for act in acts])),
            "words": DOCUMENTS * float(own.mean()), "words_untouched": DOCUMENTS * float(base.mean())}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("sae", type=Path)
    parser.add_argument("--model", default="hearth")
    parser.add_argument("--stories", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    subject, dictionary, recipe = load_subject(given.model), load(given.sae), Recipe.load(given.run / "recipe.yaml")
    told = scenes(load_world(), "role_swapped", derive_seed(given.seed, "written"), given.stories, 0)
    trie = spellings(subject, Lexicon.load("love").only(languages=("en",)))
    untouched = Arm(subject, dictionary, None)
    made = {"strangers, untouched": row(subject, untouched, told.base, trie, given.seed),
            "bonded, untouched": row(subject, untouched, told.reference, trie, given.seed)}
    for window in WINDOWS:
        placed = Recipe.checked(recipe.model_dump() | {"window": window}, "recipe")
        made[window] = row(subject, Arm(subject, dictionary, placed), told.base, trie, given.seed)
    for name, figures in made.items():
        sys.stdout.write(f"{name:22}" + "   ".join(f"{key} {value:.3f}" for key, value in figures.items()) + "\n")
    sys.stdout.write(json.dumps(made) + "\n")


if __name__ == "__main__":
    main()
