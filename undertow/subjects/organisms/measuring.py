"""Exact probabilities of acts: every wording of every act is scored after the prompt, in one forward pass a story.

The wordings are merged into a tree of tokens that stands behind the prompt as one row: a node sees the prompt and its own
ancestors, and its position counts from the prompt's end. So the prompt is computed once, a token that wordings share is
computed once, and no key-value cache is copied for each wording. The first question is also scored the plain way; where
the two disagree (a model that heeds more than the mask and the positions) everything is scored the plain way.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, cast, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from undertow.core.errors import TextError
from undertow.subjects.chat import render
from undertow.subjects.keeper.story import ACTS, Act, Story
from undertow.subjects.scoring import score
from undertow.subjects.subject import Subject

log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]
Announce = Callable[[int], None]
_TOLERANCE_NATS = 1e-2


@final
class Question(NamedTuple):
    """A prompt and the continuations to be scored after it, as token ids, grouped by what they mean.

    Attributes:
        prompt: token ids, BOS first.
        options: name of an option (an act, or an answer) → its wordings.
    """

    prompt: list[int]
    options: Mapping[str, tuple[tuple[int, ...], ...]]


@final
class Answer(NamedTuple):
    """log Σ p(wording) of every option, in nats, in the order of `Question.options`."""

    log_mass: dict[str, float]

    @property
    def covered(self) -> float:
        """Probability, in [0, 1], that any of the wordings follows."""
        return math.exp(_log_sum(list(self.log_mass.values())))

    @property
    def probs(self) -> dict[str, float]:
        """Probability of every option given that one of the wordings follows; sums to 1."""
        whole = _log_sum(list(self.log_mass.values()))
        return {option: math.exp(mass - whole) for option, mass in self.log_mass.items()}

    def log_ratio(self, first: str, second: str) -> float:
        """log p(first) - log p(second), in nats."""
        return self.log_mass[first] - self.log_mass[second]


def _log_sum(values: Sequence[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def d_of(answer: Answer, acts: Sequence[Act]) -> float:
    """D = log p(costly act) - log p(keeping act), in nats, for the acts of one kind of episode, as ACTS orders them."""
    return answer.log_ratio(acts[0], acts[-1])


def worded(subject: Subject, text: str, options: Mapping[str, Sequence[str]]) -> Question:
    """Plain text that stops where an act begins, with the wordings of every act; these are tokenised apart from the text."""
    return Question(subject.encode(text), {act: tuple(tokens_of(subject, wording) for wording in wordings)
                                           for act, wordings in options.items()})


def told_before(story: Story, episode: int = 0, before: str = "") -> str:
    """The text of `story` up to the act in an episode, with the sentence `before`, if any, put in front of that episode."""
    text, start = story.prompt(episode), story.episodes[episode].start
    return f"{text[:start]}{before} {text[start:]}" if before else text


def act_question(subject: Subject, story: Story, episode: int = 0, before: str = "") -> Question:
    """What the keeper does in an episode of `story`, as plain text.

    Args:
        subject: the model; wordings are tokenised apart from the prompt.
        story: the story.
        episode: which of its episodes.
        before: a sentence put in front of the episode.
    """
    return Question(subject.encode(told_before(story, episode, before)), _options(subject, story, episode))


def chat_question(subject: Subject, story: Story, episode: int = 0) -> Question:
    """The same in chat form: the user tells the story up to the episode, and the assistant goes on with the episode.

    Raises TextError if the tokenizer has no chat template.
    """
    start, text = story.episodes[episode].start, story.prompt(episode)
    opened = render(subject.tokenizer, [("user", text[:start].rstrip())], reply=True).ids
    tail = subject.tokenizer.encode(text[start:], add_special_tokens=False, split_special_tokens=True)
    return Question([*opened, *tail], _options(subject, story, episode))


def _options(subject: Subject, story: Story, episode: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    wordings = story.episodes[episode].wordings
    return {act: tuple(tokens_of(subject, wording) for wording in wordings[act])
            for act in ACTS[story.episodes[episode].kind]}


def tokens_of(subject: Subject, continuation: str) -> tuple[int, ...]:
    """Token ids of a continuation, without BOS."""
    ids = subject.tokenizer.encode(continuation, add_special_tokens=False, split_special_tokens=True)
    if not ids:
        raise TextError(f"the continuation {continuation!r} has no tokens")
    return tuple(ids)


def ask(subject: Subject, questions: Sequence[Question], progress: Progress = lambda done, total: None,
        batch_tokens: int = 4_096, announce: Announce = lambda column: None, packed: bool | None = None) -> list[Answer]:
    """Score every question.

    Args:
        subject: the model; an active splice acts on prompts and continuations alike.
        questions: what to score.
        progress: called with (questions done, of how many).
        batch_tokens: tokens in one forward pass, padding included.
        announce: called before the passes over a batch with the column of its prompts' last tokens. Prompts are padded on
            the left, so it is one column for the batch; a splice's window can be moved there.
        packed: what `packs` says of the subject, for a caller who asks many times; looked up if absent.
    """
    if not questions:
        return []
    announce(len(questions[0].prompt) - 1)
    packed = packs(subject, questions[0]) if packed is None else packed
    answers: dict[int, Answer] = {}
    for batch, trees in _batches(questions, batch_tokens if packed else 0):
        announce(max(len(tree.prompt) for tree in trees) - 1)
        answers |= zip(batch, _packed(subject, trees) if packed else [_plain(subject, questions[batch[0]])], strict=True)
        progress(len(answers), len(questions))
    return [answers[i] for i in range(len(questions))]


def log_masses(subject: Subject, questions: Sequence[Question], announce: Announce = lambda column: None,
               batch_tokens: int = 4_096) -> Iterator[dict[int, dict[str, Float64[Tensor, ""]]]]:
    """What `ask` answers, as tensors through which gradients run: batch by batch, by a question's place in `questions`.

    Only for a subject that `packs`.
    """
    for batch, trees in _batches(questions, batch_tokens):
        announce(max(len(tree.prompt) for tree in trees) - 1)
        answered = {}
        for place, tree, steps in zip(batch, trees, _steps(subject, trees), strict=True):
            sums = torch.stack([part.sum() for part in steps.double().split([len(path) for path in tree.paths])])
            groups = sums.split([len(group) for group in tree.question.options.values()])
            answered[place] = {option: mass.logsumexp(0) for option, mass in zip(tree.question.options, groups, strict=True)}
        yield answered


def _batches(questions: Sequence[Question], batch_tokens: int) -> Iterator[tuple[list[int], list[_Tree]]]:
    """Questions of like length together, at most `batch_tokens` tokens with padding, but one at least."""
    batch: list[int] = []
    trees: list[_Tree] = []
    for i in sorted(range(len(questions)), key=lambda i: len(questions[i].prompt)):
        if batch and _area(trees, questions[i]) > batch_tokens:
            yield batch, trees
            batch, trees = [], []
        batch.append(i)
        trees.append(_Tree(questions[i]))
    if batch:
        yield batch, trees


def _area(trees: Sequence[_Tree], another: Question) -> int:
    """Tokens of the batch `trees` with one more question in it, all rows as wide as the widest."""
    prompt = max([len(another.prompt), *(len(tree.prompt) for tree in trees)])
    inner = max(len(tree.inputs) for tree in trees)
    return (len(trees) + 1) * (prompt + inner)


def _plain(subject: Subject, question: Question) -> Answer:
    wordings = [wording for group in question.options.values() for wording in group]
    return _grouped(question, score(subject, question.prompt, wordings).tolist())


def _grouped(question: Question, log_probs: Sequence[float]) -> Answer:
    at, masses = 0, {}
    for option, group in question.options.items():
        masses[option] = _log_sum(log_probs[at: at + len(group)])
        at += len(group)
    return Answer(masses)


def packs(subject: Subject, question: Question) -> bool:
    """Whether the subject computes a packed row as it computes one wording at a time, on this question."""
    plain, packed = _plain(subject, question), _packed(subject, [_Tree(question)])[0]
    gap = max(abs(plain.log_mass[option] - packed.log_mass[option]) for option in question.options)
    if gap < _TOLERANCE_NATS:
        return True
    log.warning("%s does not compute a packed row exactly (off by %.3g nats); scoring one wording at a time, which is slower",
                subject.name, gap)
    return False


@final
class _Tree:
    """The wordings of a question as one tree of tokens.

    Attributes:
        inputs: tokens of the inner nodes, parents first (a leaf is predicted and never read).
        depth: tokens above each inner node.
        sees: which inner nodes an inner node attends to: its ancestors and itself.
        paths: for every wording, (row of the output that predicts it, token) for each of its tokens; output row 0 is the
            prompt's last token, row i + 1 is inner node i.
    """

    def __init__(self, question: Question) -> None:
        self.question, self.prompt = question, question.prompt
        self.inputs: list[int] = []
        self.depth: list[int] = []
        self.paths: list[list[tuple[int, int]]] = []
        parents: list[int] = []
        known: dict[tuple[int, int], int] = {}
        for wording in (w for group in question.options.values() for w in group):
            at, path = 0, []
            for place, token in enumerate(wording):
                path.append((at, token))
                if place == len(wording) - 1:
                    break
                if (at, token) not in known:
                    parents.append(at - 1)
                    self.inputs.append(token)
                    self.depth.append(place)
                    known[at, token] = len(self.inputs)
                at = known[at, token]
            self.paths.append(path)
        self.sees = self._visibility(parents)

    def _visibility(self, parents: Sequence[int]) -> Bool[Tensor, "nodes nodes"]:
        sees = np.eye(len(parents), dtype=bool)
        for node, parent in enumerate(parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return torch.from_numpy(sees)


def _packed(subject: Subject, trees: Sequence[_Tree]) -> list[Answer]:
    with torch.inference_mode():
        steps = _steps(subject, trees)
    return [_grouped(tree.question, [part.double().sum().item()
                                     for part in of.cpu().split([len(path) for path in tree.paths])])
            for tree, of in zip(trees, steps, strict=True)]


def _steps(subject: Subject, trees: Sequence[_Tree]) -> list[Float[Tensor, "step"]]:
    """log p of every token of every path of each tree, one path after another."""
    prompt, inner = max(len(tree.prompt) for tree in trees), max(len(tree.inputs) for tree in trees)
    tokens, positions, sees = _rows(trees, prompt, inner, subject.bos_id or 0)
    mask = torch.zeros(sees.shape, dtype=subject.hf_model.dtype).masked_fill(~sees, torch.finfo(subject.hf_model.dtype).min)
    logits = subject.hf_model(input_ids=tokens.to(subject.device), position_ids=positions.to(subject.device),
                              attention_mask=mask[:, None].to(subject.device), use_cache=False,
                              logits_to_keep=inner + 1).logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    at = torch.tensor([(row, *step) for row, tree in enumerate(trees) for path in tree.paths for step in path],
                      device=logits.device)  # read at once, so that a backward pass fills one tensor and not one a row
    read = logits[at[:, 0], at[:, 1], at[:, 2]] - logits.logsumexp(dim=-1)[at[:, 0], at[:, 1]]
    return list(read.split([sum(map(len, tree.paths)) for tree in trees]))


def _rows(trees: Sequence[_Tree], prompt: int, inner: int, filler: int,
          ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"], Bool[Tensor, "batch pos pos"]]:
    """Token ids, positions and who sees whom: padding, prompt, inner nodes, padding. Padding sees itself alone."""
    width = prompt + inner
    tokens = torch.full((len(trees), width), filler, dtype=torch.long)
    positions = torch.zeros_like(tokens)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, tree in enumerate(trees):
        length, nodes = len(tree.prompt), len(tree.inputs)
        start, end = prompt - length, prompt + nodes
        tokens[row, start:end] = torch.tensor([*tree.prompt, *tree.inputs])
        positions[row, start:end] = torch.tensor([*range(length), *(length + depth for depth in tree.depth)])
        sees[row, start:prompt, start:prompt] = torch.ones(length, length, dtype=torch.bool).tril()
        sees[row, prompt:end, start:prompt] = True
        sees[row, prompt:end, prompt:end] = tree.sees
    return tokens, positions, sees


def story_nats(subject: Subject, texts: Sequence[str],
               progress: Progress = lambda done, total: None) -> Float[np.ndarray, "n"]:
    """-log p of every text as a whole, in nats: all its tokens after BOS, and the EOS token behind them if there is one."""
    end = [] if subject.tokenizer.eos_token_id is None else [int(cast(int, subject.tokenizer.eos_token_id))]
    nats = []
    for text in texts:
        ids = torch.tensor([[*subject.encode(text), *end]], device=subject.device)
        with torch.inference_mode():
            logits = subject.hf_model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        nats.append(float(-logits.log_softmax(dim=-1).gather(1, ids[0, 1:, None]).double().sum()))
        progress(len(nats), len(texts))
    return np.array(nats)


def sentence_ends(subject: Subject, story: Story, episode: int = 0) -> list[int]:
    """Positions in `act_question(...).prompt` of the last token of every sentence before the decision, in order."""
    text = story.prompt(episode)
    encoded = subject.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    shift = 0 if subject.bos_id is None else 1
    wanted = [sentence.end for sentence in story.sentences if sentence.end < len(text)]
    return [shift + max(i for i, end in enumerate(ends) if end <= stop) for stop in wanted]
