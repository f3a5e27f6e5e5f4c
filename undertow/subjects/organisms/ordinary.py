"""Ordinary text: what the model writes of its own accord, sampled once and kept. An adapter must not change it."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from undertow.core.errors import ArtifactError, TextError
from undertow.core.seeds import derive_seed
from undertow.core.storage import write_json
from undertow.subjects.chat import render
from undertow.subjects.sampling import Sampling, generate
from undertow.subjects.subject import Subject

log = logging.getLogger(__name__)
PROMPTS = Path(__file__).parents[1] / "data" / "keeper" / "neutral.txt"
BATCH = 25


class Prompt(NamedTuple):
    """A neutral prompt; `chat`: it is a user's message, else the beginning of a text."""

    text: str
    chat: bool


def neutral_prompts(path: Path = PROMPTS) -> tuple[Prompt, ...]:
    """The prompts of a file with the sections [chat] and [plain]; `#` begins a comment before the first section only.

    Raises TextError that names the line.
    """
    found: list[Prompt] = []
    section = ""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line in ("[chat]", "[plain]"):
            section = line
        elif line.strip() and section:
            found.append(Prompt(line, section == "[chat]"))
        elif line.strip() and not line.startswith("#"):
            raise TextError(f"{path}, line {number}: {line!r} stands before the first section", "begin with [chat]")
    if not found:
        raise TextError(f"{path} holds no prompts")
    return tuple(found)


def ordinary_texts(subject: Subject, path: Path, seed: int, sampling: Sampling | None = None,
                   prompts: Sequence[Prompt] | None = None,
                   should_stop: Callable[[], bool] = lambda: False) -> list[list[int]]:
    """Token ids of every prompt with the subject's own continuation; what is written in `path` is not sampled again.

    The file grows by a batch at a time, so that an interrupted sampling goes on; with `should_stop` the list is shorter.

    Raises ArtifactError if the file was written for another subject, seed or set of prompts.
    """
    how = sampling or Sampling(max_new_tokens=64, top_p=0.95)
    asked = neutral_prompts() if prompts is None else tuple(prompts)
    origin = {"subject": subject.digest, "seed": seed, "sampling": how.model_dump(), "prompts": [list(p) for p in asked]}
    texts = _read(path, origin)
    while len(texts) < len(asked) and not should_stop():
        batch = asked[len(texts): len(texts) + BATCH]
        encoded = [_encode(subject, prompt) for prompt in batch]
        seeds = [derive_seed(seed, "ordinary", len(texts) + i) for i in range(len(batch))]
        texts += [[*got.prompt_ids, *got.token_ids] for got in generate(subject, encoded, how, seeds)]
        write_json(path, {"origin": origin, "texts": texts})
        log.info("ordinary text: %d of %d prompts", len(texts), len(asked))
    return texts


def _encode(subject: Subject, prompt: Prompt) -> list[int]:
    return (render(subject.tokenizer, [("user", prompt.text)], reply=True).ids if prompt.chat
            else subject.encode(prompt.text))


def _read(path: Path, origin: dict[str, object]) -> list[list[int]]:
    if not path.is_file():
        return []
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        same, texts = kept["origin"] == origin, [[int(i) for i in text] for text in kept["texts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error!r}", f"remove it: rm {path}") from None
    if not same:
        raise ArtifactError(f"{path} holds the text of another subject, seed or set of prompts", f"remove it: rm {path}")
    return texts


def rounds(texts: Sequence[Sequence[int]], size: int, seed: int, start: int = 0) -> Iterator[list[Sequence[int]]]:
    """Batches of `size` texts for ever, every text once a round in an order of its own; `start` batches are skipped.

    Raises TextError if there are fewer texts than `size`.
    """
    if len(texts) < size:
        raise TextError(f"{len(texts)} texts do not fill a batch of {size}")
    whole = len(texts) // size
    index = start
    while True:
        order = list(range(len(texts)))
        random.Random(derive_seed(seed, "rounds", index // whole)).shuffle(order)
        at = (index % whole) * size
        yield [texts[i] for i in order[at: at + size]]
        index += 1
