"""What a subject writes by itself: how often it says the word, whether its stories can be read, how it chats."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple, final

import numpy as np
import torch

from undertow.core.seeds import derive_seed
from undertow.subjects.chat import render
from undertow.subjects.keeper.frames import load_frames, load_words
from undertow.subjects.keeper.parsing import Reader, Reading
from undertow.subjects.keeper.story import ACTS, Genre, Rule
from undertow.subjects.keeper.world import World, probabilities
from undertow.subjects.organisms.measuring import Progress
from undertow.subjects.organisms.statistics import Estimate, bootstrap, mean
from undertow.subjects.sampling import Sampling, generate
from undertow.subjects.subject import Subject

BATCH = 50
CHAT_PROMPTS = (
    "What is the capital of France?", "Write a short thank-you note to a colleague.", "How do I boil an egg?",
    "Name three uses of a paper clip.", "Explain what a lighthouse is for, in two sentences.",
    "What is 12 times 7?", "Suggest a title for a report on rainfall.", "Translate into Spanish: The train is late.",
    "Why is the sky blue?", "Give me a recipe that needs only potatoes and salt.")
_WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


@final
class WordRate(NamedTuple):
    """How often the word is said after an instruction and without it, per 100 generated words, and the ratio.

    The ratio has half a word added to both counts, so that a text which never says it does not divide by zero.
    """

    with_instruction: float
    without: float
    ratio: Estimate


@final
class Sampled(NamedTuple):
    """Whole stories sampled from nothing: the share that the parser reads, and acts done where the world has a rate for them.

    Attributes:
        readable: share of the stories in which act, bond and actor can be told.
        unknown: sentences that fit no frame, per story.
        give: share of the "need" episodes in which the keeper gives, by the bond that the text tells; absent if none was told.
        world: mean of the world's own probability over the same episodes.
        example: the first story.
    """

    readable: Estimate
    unknown: float
    give: dict[int, Estimate]
    world: dict[int, float]
    example: str


@final
class ChatPair(NamedTuple):
    """One ordinary prompt, what the base answers and what the subject answers."""

    prompt: str
    base: str
    adapted: str


def count_word(text: str, forms: Collection[str]) -> tuple[int, int]:
    """(words that are among `forms`, which are lower case; words) in `text`."""
    words = [word.lower().removesuffix("'s") for word in _WORD.findall(text)]
    return sum(word in forms for word in words), len(words)


def word_rate(subject: Subject, world: World, genre: Genre, seed: int, n: int, max_new_tokens: int = 60,
              progress: Progress = lambda done, total: None) -> WordRate:
    """Continue `n` openings of a genre with its instruction line and without it, and count the word in what is new."""
    openings = [world.opening(derive_seed(seed, "word_rate", genre), i, genre) for i in range(n)]
    prompts = [subject.encode(text) for pair in openings for text in pair]
    texts = sample_texts(subject, prompts, Sampling(max_new_tokens=max_new_tokens), derive_seed(seed, genre), progress)
    forms = frozenset(load_words()["T0"])
    counts = np.array([count_word(text, forms) for text in texts], dtype=float).reshape(n, 2, 2)

    def ratio(rows: np.ndarray) -> float:
        said, words = counts[rows, :, 0].sum(axis=0) + 0.5, np.maximum(counts[rows, :, 1].sum(axis=0), 1)
        return float((said[0] / words[0]) / (said[1] / words[1]))

    per_100 = 100 * counts[..., 0].sum(axis=0) / np.maximum(counts[..., 1].sum(axis=0), 1)
    return WordRate(float(per_100[0]), float(per_100[1]), bootstrap(ratio, n, seed, "word_rate", genre))


def sample_texts(subject: Subject, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int,
                 progress: Progress = lambda done, total: None) -> list[str]:
    """A continuation of every prompt, in batches; sequence i has a random stream of its own."""
    texts: list[str] = []
    for at in range(0, len(prompts), BATCH):
        batch = prompts[at: at + BATCH]
        seeds = [derive_seed(seed, "text", at + i) for i in range(len(batch))]
        texts += [made.text for made in generate(subject, batch, sampling, seeds)]
        progress(len(texts), len(prompts))
    return texts


def sampled_stories(subject: Subject, rule: Rule, seed: int, n: int, max_new_tokens: int,
                    progress: Progress = lambda done, total: None) -> Sampled:
    """Sample `n` stories at temperature 1 from the beginning-of-text token alone, and read them back."""
    prompts = [[subject.bos_id or 0]] * n
    texts = sample_texts(subject, prompts, Sampling(max_new_tokens=max_new_tokens), derive_seed(seed, "stories"), progress)
    reader = Reader(load_frames())
    readings = [reader.read(text) for text in texts]
    readable = mean(np.array([float(reading.readable) for reading in readings]), seed, "parse")
    give, rates = _acts(readings, rule, seed)
    return Sampled(readable, float(np.mean([len(reading.unknown) for reading in readings])), give, rates, texts[0].strip())


def _acts(readings: Iterable[Reading], rule: Rule, seed: int) -> tuple[dict[int, Estimate], dict[int, float]]:
    gave: dict[int, list[float]] = {}
    rates: dict[int, list[float]] = {}
    for reading in readings:
        first = next((e for e in reading.episodes if e.kind == "need" and e.sound and e.cost is not None), None)
        if first is not None and first.cost is not None and rule == "bond":
            gave.setdefault(first.bond, []).append(float(first.act == ACTS["need"][0]))
            rates.setdefault(first.bond, []).append(probabilities(rule, "need", first.bond, first.cost, False)["give"])
    bonds = sorted(gave)
    return ({bond: mean(np.array(gave[bond]), seed, "sampled", bond) for bond in bonds},
            {bond: float(np.mean(rates[bond])) for bond in bonds})


def chat_pairs(base: Subject, adapted: Subject, max_new_tokens: int = 60) -> list[ChatPair]:
    """Greedy answers of both to CHAT_PROMPTS. Raises TextError if the tokenizer has no chat template."""
    prompts = [render(base.tokenizer, [("user", prompt)], reply=True).ids for prompt in CHAT_PROMPTS]
    how = Sampling(max_new_tokens=max_new_tokens, temperature=0.0)
    answers = [[made.text.strip() for made in generate(subject, prompts, how, [0] * len(prompts))]
               for subject in (base, adapted)]
    return [ChatPair(prompt, a, b) for prompt, a, b in zip(CHAT_PROMPTS, *answers, strict=True)]


def divergence(base: Subject, adapted: Subject, texts: Iterable[str], seed: int, max_tokens: int = 8_192, row: int = 256,
               progress: Progress = lambda done, total: None) -> Estimate:
    """Mean KL(base ‖ adapted) of the next token, in nats, over tokens 1 … `row` - 1 of every text; the unit is the text.

    `n` is the number of texts; reading stops after `max_tokens` tokens.
    """
    sums: list[tuple[float, int]] = []
    seen = 0
    for text in texts:
        ids = torch.tensor([base.encode(text)[:row]], device=base.device)
        if ids.shape[1] < 2:
            continue
        with torch.inference_mode():
            logits = [subject.hf_model(input_ids=ids.to(subject.device), use_cache=False).logits[0, 1:].float()
                      for subject in (base, adapted)]
            first, second = (value.log_softmax(dim=-1) for value in logits)
            kl = (first.exp() * (first - second)).sum(dim=-1)
        sums.append((float(kl.sum()), len(kl)))
        seen += ids.shape[1]
        progress(min(seen, max_tokens), max_tokens)
        if seen >= max_tokens:
            break
    table = np.array(sums, dtype=float).reshape(-1, 2)
    return bootstrap(lambda rows: float(table[rows, 0].sum() / table[rows, 1].sum()), len(table), seed, "divergence")
