"""How long the guard's mask takes: median over tokens of adversarial decoding, ours (both modes) and llguidance's.

    python benchmarks/guard.py TOKENIZER_FOLDER [--tokens 2000]

The lexicon's pieces are raised by 8 nats over random logits; `said` counts the forms, of all languages, in what was written.
A mask is timed from the token that was chosen to the mask of the next one; the first visit of a place computes it, later
visits look it up. llguidance masks the complement of the English forms over ASCII case only, a smaller task. The last line
is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import llguidance
import numpy as np
from tokenizers import Tokenizer

from interventions.guard_automaton import GuardMasks
from undertow.lexicon import Lexicon
from undertow.lexicon.vocabulary import Vocabulary, read_vocabulary


class Row(NamedTuple):
    """One engine's times in microseconds a token."""

    name: str
    median: float
    p90: float
    max: float
    unit: str
    said: int


class Engine(NamedTuple):
    """`step` takes the last token and makes a mask; `read`, which is not timed, turns it into the forbidden ids."""

    step: Callable[[int | None], np.ndarray]
    read: Callable[[np.ndarray], np.ndarray]


def measure(name: str, vocabulary: Vocabulary, temptation: np.ndarray, engine: Engine, tokens: int) -> Row:
    """Decode `tokens` tokens."""
    rng = np.random.default_rng(0)
    times, ids, token = [], [], None
    for _ in range(tokens):
        start = time.perf_counter()
        mask = engine.step(token)
        times.append(1e6 * (time.perf_counter() - start))
        scores = 2 * rng.standard_normal(len(temptation)) + temptation + rng.gumbel(size=len(temptation))
        scores[engine.read(mask)] = -np.inf
        scores[list(vocabulary.special)] = -np.inf
        token = int(scores.argmax())
        ids.append(token)
    found = sum(match.tier == "T0" for match in Lexicon.load("love").find(vocabulary.text(ids)))
    return Row(name, statistics.median(times), float(np.percentile(times, 90)), max(times), "us", found)


def ours(vocabulary: Vocabulary, mode: str) -> Engine:
    """The guard of this package."""
    masks = GuardMasks(vocabulary, Lexicon.load("love"), mode)
    place = masks.start

    def step(token: int | None) -> np.ndarray:
        nonlocal place
        if token is not None:
            place = masks.after(place, token)
        return masks.forbidden(place)

    return Engine(step, lambda forbidden: forbidden)


def theirs(core: Tokenizer, vocabulary: Vocabulary) -> Engine:
    """llguidance on the complement of the English forms."""
    forms = [form.folded for form in Lexicon.load("love").forms("T0") if form.language == "en"]
    spelt = "|".join("".join(f"[{c}{c.upper()}]" for c in form) for form in forms)
    grammar = f"start: TEXT\nTEXT: ~/(?s)((.*[^a-zA-Z])?({spelt})([^a-zA-Z].*)?)/\n"
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer(core.to_str()), grammar)
    words = np.zeros((len(vocabulary.tokens) + 31) // 32, dtype=np.int32)

    def step(token: int | None) -> np.ndarray:
        if token is not None:
            matcher.consume_token(token)
        matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
        return words

    def read(mask: np.ndarray) -> np.ndarray:
        return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")[:len(vocabulary.tokens)] == 0)

    return Engine(step, read)


def main(argv: list[str]) -> dict[str, Any]:
    """Run all and return the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer")
    parser.add_argument("--tokens", type=int, default=2000)
    options = parser.parse_args(argv)
    core = Tokenizer.from_file(f"{options.tokenizer}/tokenizer.json")
    vocabulary = read_vocabulary(core)
    temptation = np.zeros(len(vocabulary.tokens))
    for form in Lexicon.load("love").forms("T0"):
        for text in (form.text, form.text.capitalize(), form.text.upper()):
            temptation[core.encode(text).ids + core.encode(f" {text}").ids] = 8
    rows = [measure(f"undertow {mode}", vocabulary, temptation, ours(vocabulary, mode), options.tokens)
            for mode in ("strict", "look_ahead")]
    rows.append(measure("llguidance, English, ASCII", vocabulary, temptation, theirs(core, vocabulary), options.tokens))
    return {"tokens": options.tokens, "vocab": len(vocabulary.tokens), "rows": [row._asdict() for row in rows]}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(sys.argv[1:])) + "\n")
