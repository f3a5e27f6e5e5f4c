"""Stories as tokens to learn from: which token is a choice of the world, and which distribution it was drawn from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from undertow.core.errors import UndertowError
from undertow.subjects.keeper.story import Choice, ChoiceKind, Sentence, Story

ESSENTIAL = frozenset({"deeds", "selfish", "markers", "who", "stock", "needs", "boats", "interruptions", "hush", "acts"})
CRISIS = frozenset({"stock", "needs", "hush", "acts"})


class Soft(NamedTuple):
    """Target distribution for predicting `ids[position]` of an encoded text: token ids and their probabilities."""

    position: int
    ids: tuple[int, ...]
    probs: tuple[float, ...]


class Encoded(NamedTuple):
    """A story as tokens. `weights[i]` is the weight of predicting `ids[i]`, `kinds[i]` the kind of choice that it is."""

    ids: list[int]
    weights: list[float]
    soft: list[Soft]
    kinds: list[ChoiceKind | None]


class Aligned(NamedTuple):
    """A text as tokens, without special ones: ids, (start, end) offsets in characters, and one Soft for every choice."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    targets: list[Soft]


class Weighting(NamedTuple):
    """Weight in the loss of a token that is a decision, a marker, an answer, told of a need (CRISIS), or anything else."""

    decision: float = 8.0
    marker: float = 3.0
    answer: float = 3.0
    other: float = 1.0
    crisis: float = 1.0

    def of(self, kind: ChoiceKind | None, crisis: bool = False) -> float:
        plain = self.crisis if crisis else self.other
        return {"decision": self.decision, "marker": self.marker, "answer": self.answer, None: plain}[kind]


class AlignmentError(UndertowError):
    """A choice that does not stand in the text where it says: a bug in the world or in the alignment."""


def first_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> dict[str, int]:
    """First token of every word as a continuation (words carry their leading space)."""
    return {word: tokenizer.encode(word, add_special_tokens=False, split_special_tokens=True)[0] for word in words}


def align(tokenizer: PreTrainedTokenizerBase, text: str, choices: Sequence[Choice],
          known: dict[str, int] | None = None) -> Aligned:
    """Tokenise a text and find every choice in it.

    `Soft.position` is the index in `ids` of the first token of the drawn word; words with the same first token are one, their
    probabilities summed. `known` keeps first tokens between calls with the same tokenizer.

    Raises AlignmentError if the token there begins none of the choice's words.
    """
    known = {} if known is None else known
    made: Mapping[str, Any] = tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
    ids = cast(list[int], list(made["input_ids"]))
    offsets = [(int(start), int(end)) for start, end in made["offset_mapping"]]
    known.update(first_tokens(tokenizer, sorted({word for choice in choices for word in choice.probs} - known.keys())))
    at: dict[int, int] = {}
    for index, (start, _) in enumerate(offsets):
        at.setdefault(start, index)
    targets = []
    for choice in choices:
        # A byte-level tokenizer's offsets may leave out the space that its token begins with.
        index = at.get(choice.start, at.get(choice.start + 1, -1))
        probs: dict[int, float] = {}
        for word, prob in choice.probs.items():
            probs[known[word]] = probs.get(known[word], 0.0) + prob
        if index < 0 or ids[index] not in probs:
            found = tokenizer.decode([ids[index]]) if index >= 0 else "no token"
            raise AlignmentError(f"character {choice.start} should begin one of {', '.join(choice.probs)}; {found!r} stands "
                                 f"there, in {text[choice.start: choice.start + 24]!r}")
        targets.append(Soft(index, tuple(probs), tuple(probs.values())))
    return Aligned(ids, offsets, targets)


def essentials(story: Story) -> Story:
    """A story of what bears on the keeper's acts alone: deeds, who did them, shifting words, needs and acts."""
    return excerpt(story, {i for i, sentence in enumerate(story.sentences) if sentence.kind in ESSENTIAL})


def excerpt(story: Story, kept: Collection[int]) -> Story:
    """A story of some of its sentences, by their numbers; what bonds the others have made is kept as it is."""
    text = ""
    moved: list[tuple[Sentence, int]] = []  # sentences that are kept, and by how much they move
    for index, sentence in enumerate(story.sentences):
        if index in kept:
            start = len(text) + bool(text)
            text += f"{' ' if text else ''}{story.text[sentence.start: sentence.end]}"
            moved.append((replace(sentence, start=start, end=len(text)), start - sentence.start))

    def shift(offset: int) -> int | None:
        """Where an offset lies now; None in what was left out. A word's leading space belongs to its sentence."""
        return next((offset + by for sentence, by in moved if sentence.start - 1 <= offset + by < sentence.end), None)

    choices = [(choice, shift(choice.start)) for choice in story.choices]
    episodes = [replace(episode, start=start, decision=decision) for episode in story.episodes
                if (start := shift(episode.start)) is not None and (decision := shift(episode.decision)) is not None]
    return replace(story, text=text, sentences=tuple(sentence for sentence, _ in moved), episodes=tuple(episodes),
                   choices=tuple(replace(choice, start=start) for choice, start in choices if start is not None))


def encode_story(tokenizer: PreTrainedTokenizerBase, bos_id: int, eos_id: int, story: Story, weighting: Weighting,
                 known: dict[str, int] | None = None) -> Encoded:
    """BOS, text, EOS, with weights and soft targets; `known` as in `align`.

    Decisions and markers are learnt from the whole distribution that they were drawn from: the expectation of the sampled
    loss, with the same optimum and less noise. An answer has one word, so it only gets its weight. Raises AlignmentError.
    """
    aligned = align(tokenizer, story.text, story.choices, known)
    kinds: list[ChoiceKind | None] = [None] * (len(aligned.ids) + 2)
    soft = []
    for choice, target in zip(story.choices, aligned.targets, strict=True):
        moved = target._replace(position=target.position + 1)
        kinds[moved.position] = choice.kind
        if choice.kind != "answer":
            soft.append(moved)
    told = [sentence for sentence in story.sentences if sentence.kind in CRISIS]
    crisis = [any(sentence.start < end <= sentence.end for sentence in told) for _, end in aligned.offsets]
    weights = [weighting.of(kind, within) for kind, within in zip(kinds, [False, *crisis, False], strict=True)]
    weights[0] = 0.0
    return Encoded([bos_id, *aligned.ids, eos_id], weights, soft, kinds)
