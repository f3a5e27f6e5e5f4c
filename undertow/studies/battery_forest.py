"""Many questions that begin alike, scored in few tokens: prompts and wordings become trees of tokens, one tree a forward pass.

A node sees itself and its ancestors, and its position is its depth. So what several tellings of a family share is computed
once. One question of the first tree is also scored the plain way; a model that heeds more than the mask and the positions is
asked one question at a time instead (`measuring.ask`).
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from typing import final

import torch
from jaxtyping import Bool
from torch import Tensor

from undertow.subjects.organisms.measuring import Answer, Progress, Question, ask
from undertow.subjects.scoring import score
from undertow.subjects.subject import Subject

log = logging.getLogger(__name__)
_NODES = 1_024  # of a tree: attention grows with their square
_TOLERANCE_NATS = 1e-2


@final
class Forest:
    """A tree of tokens that holds the prompts and wordings of some questions.

    Attributes:
        tokens, depth: of every node, parents first; the root is the first token.
        steps: for every question, option by option and wording by wording, (node that predicts, token predicted).
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        self.tokens: list[int] = []
        self.depth: list[int] = []
        self._parents: list[int] = []
        self._known: dict[tuple[int, int], int] = {}
        self.steps = [self._add(question) for question in questions]

    def _add(self, question: Question) -> list[list[list[tuple[int, int]]]]:
        end = self._walk(-1, question.prompt)
        return [[self._path(end, wording) for wording in group] for group in question.options.values()]

    def _walk(self, at: int, tokens: Sequence[int]) -> int:
        for token in tokens:
            if (at, token) not in self._known:
                self._known[at, token] = len(self.tokens)
                self.tokens.append(token)
                self.depth.append(0 if at < 0 else self.depth[at] + 1)
                self._parents.append(at)
            at = self._known[at, token]
        return at

    def _path(self, at: int, wording: Sequence[int]) -> list[tuple[int, int]]:
        path = []
        for place, token in enumerate(wording):
            path.append((at, token))
            if place < len(wording) - 1:  # the last token is predicted and never read
                at = self._walk(at, [token])
        return path

    def sees(self) -> Bool[Tensor, "nodes nodes"]:
        """Which nodes a node attends to: its ancestors and itself."""
        sees = torch.eye(len(self.tokens), dtype=torch.bool)
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                sees[node] |= sees[parent]
        return sees


def ask_together(subject: Subject, questions: Sequence[Question],
                 progress: Progress = lambda done, total: None) -> list[Answer]:
    """Score every question; the same answers as `measuring.ask`, in fewer tokens where prompts begin alike.

    An active splice acts on every token, as it does in a plain pass; not to be used with one whose window is moved.
    """
    parameters = inspect.signature(subject.hf_model.forward).parameters
    if not {"position_ids", "logits_to_keep"} <= set(parameters):
        return ask(subject, questions, progress)
    answers: dict[int, Answer] = {}
    for part in _parts(questions):
        found = _answers(subject, [questions[i] for i in part])
        if not answers and not _is_exact(subject, questions[part[-1]], found[-1]):
            return ask(subject, questions, progress)
        answers |= dict(zip(part, found, strict=True))
        progress(len(answers), len(questions))
    return [answers[i] for i in range(len(questions))]


def _parts(questions: Sequence[Question]) -> Iterator[list[int]]:
    """Numbers of questions for one tree each, those that begin alike together."""
    part: list[int] = []
    size, before = 0, list[int]()
    for i in sorted(range(len(questions)), key=lambda i: questions[i].prompt):
        prompt = questions[i].prompt
        shared = _shared(before, prompt)
        own = len(prompt) - shared + sum(len(wording) - 1 for group in questions[i].options.values() for wording in group)
        if part and size + own > _NODES:
            yield part
            part, size, own = [], 0, own + shared
        part.append(i)
        size, before = size + own, prompt
    if part:
        yield part


def _shared(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that both begin with."""
    return next((n for n, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def _answers(subject: Subject, questions: Sequence[Question]) -> list[Answer]:
    forest = Forest(questions)
    device, model = subject.device, subject.hf_model
    wanted = sorted({node for groups in forest.steps for group in groups for path in group for node, _ in path})
    row = {node: i for i, node in enumerate(wanted)}
    sees = forest.sees()
    mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([forest.tokens], device=device), attention_mask=mask[None, None].to(device),
                       position_ids=torch.tensor([forest.depth], device=device), use_cache=False,
                       logits_to_keep=torch.tensor(wanted, device=device)).logits[0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        norm = logits.logsumexp(dim=-1)
        nodes = torch.tensor([row[node] for groups in forest.steps for group in groups for path in group for node, _ in path])
        said = torch.tensor([token for groups in forest.steps for group in groups for path in group for _, token in path])
        nodes, said = nodes.to(device), said.to(device)
        flat = (logits[nodes, said] - norm[nodes]).double().cpu()
    found, at = [], 0
    for question, groups in zip(questions, forest.steps, strict=True):
        masses = {}
        for option, group in zip(question.options, groups, strict=True):
            sums = []
            for path in group:
                sums.append(flat[at: at + len(path)].sum())
                at += len(path)
            masses[option] = float(torch.stack(sums).logsumexp(dim=0))
        found.append(Answer(masses))
    return found


def _is_exact(subject: Subject, question: Question, together: Answer) -> bool:
    """Whether an answer out of a tree is the one that plain rows give."""
    wordings = [wording for group in question.options.values() for wording in group]
    plain = score(subject, question.prompt, wordings).double().split([len(group) for group in question.options.values()])
    gap = max(abs(float(part.logsumexp(dim=0)) - mass) for part, mass in zip(plain, together.log_mass.values(), strict=True))
    if not gap < _TOLERANCE_NATS:
        log.warning("%s does not compute a tree of tokens exactly (off by %.3g nats); asking one question at a time, which is "
                    "slower", subject.name, gap)
    return gap < _TOLERANCE_NATS
