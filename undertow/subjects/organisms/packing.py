"""Training sequences: one body and several episodes that follow it, each blind to the others, in one row of tokens.

A pack is `body, fork 1, fork 2, ...`. A fork sees the body and itself, and its positions go on from the body's end, so that
what the model computes is what it would compute for body + fork alone; the body is paid for once.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, final, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from undertow.core.errors import TextError
from undertow.core.seeds import derive_seed
from undertow.subjects.chat import render
from undertow.subjects.keeper.story import COSTLY, EpisodeKind, Story, Wish
from undertow.subjects.organisms.curriculum import WHOLE, Stage
from undertow.subjects.organisms.encoding import align, first_tokens
from undertow.subjects.subject import Subject

Kind = Literal["decision", "marker", "answer", "act", "other"]
WEIGHTS: Mapping[Kind, float] = {"decision": 8.0, "marker": 2.0, "answer": 2.0, "act": 0.5, "other": 1.0}
KINDS: tuple[Kind, ...] = tuple(WEIGHTS)
INVITATIONS = Path(__file__).parents[1] / "data" / "keeper" / "invitations.txt"
TWINS: tuple[EpisodeKind, ...] = ("boat", "interruption")


@runtime_checkable
class Teller(Protocol):
    """A source of stories, such as the world."""

    @property
    def digest(self) -> str: ...

    def story(self, seed: int, index: int, wish: Wish | None = None, fork: int = 0) -> Story: ...


class Mix(NamedTuple):
    """How packs are mixed.

    Attributes:
        forks: episodes a pack.
        chat: share of packs in chat form.
        twins: share of packs in which some episodes are twins.
        other: share of the tokens outside choices and acts that carry loss.
        whole: share of packs whose first fork goes on to the story's end.
    """

    forks: int = 4
    chat: float = 0.5
    twins: float = 0.15
    other: float = 0.15
    whole: float = 0.1


class Decision(NamedTuple):
    """A decision in a pack: its row among the targets, the truth, and the first tokens of the costly act's wordings."""

    row: int
    kind: EpisodeKind
    bond: int
    other: int
    cost: int
    costly: frozenset[int]


@final
@dataclass(frozen=True, eq=False)
class Pack:
    """Tokens of one row, and what is to be learned at which of them.

    Attributes:
        tokens: token ids.
        positions: position of every token in its own story.
        owner: 0 for the body, j for fork j.
        rows: place whose logits a target judges; several targets may judge one place.
        kinds: index into KINDS for every target.
        cells: (target, token) pairs with a probability; those of one target add up to 1.
        probs: the probability of every cell.
        decisions: the decisions among the targets.
    """

    tokens: Int[Tensor, "pos"]
    positions: Int[Tensor, "pos"]
    owner: Int[Tensor, "pos"]
    rows: Int[Tensor, "target"]
    kinds: Int[Tensor, "target"]
    cells: Int[Tensor, "cell 2"]
    probs: Float[Tensor, "cell"]
    decisions: tuple[Decision, ...]

    @cached_property
    def weights(self) -> Float[Tensor, "target"]:
        """Weight of every target in the loss."""
        return torch.tensor([WEIGHTS[kind] for kind in KINDS])[self.kinds]

    @cached_property
    def entropy(self) -> Float[Tensor, "target"]:
        """Entropy of every target's distribution, nats: the least cross-entropy that there can be."""
        surprise = -self.probs * self.probs.log()
        return torch.zeros(len(self.rows)).index_add(0, self.cells[:, 0], surprise.float())


def block_mask(owner: Int[Tensor, "pos"], dtype: torch.dtype = torch.float32) -> Float[Tensor, "1 1 pos pos"]:
    """What is added to attention scores: 0 where a token may look (earlier, and of the body or its own fork), else -inf.

    A row without a body (no owner 0) is a row of texts side by side.
    """
    size = len(owner)
    sees = (owner[None, :] == 0) | (owner[None, :] == owner[:, None])
    sees &= torch.ones(size, size, dtype=torch.bool, device=owner.device).tril()
    return torch.zeros(1, 1, size, size, dtype=dtype, device=owner.device).masked_fill(~sees, -torch.inf)


class Target(NamedTuple):
    """At `place` in a line, the distribution that its token was drawn from."""

    place: int
    kind: Kind
    probs: Mapping[int, float]


class Line(NamedTuple):
    """One fork on its own: body and episode as tokens, its targets, and its decision (`row`: which of the targets)."""

    ids: list[int]
    targets: list[Target]
    decision: Decision


class Form(NamedTuple):
    """How the stories of a pack are put: the invitation and where the user's part ends, or None for plain text."""

    invitation: str
    cut: int


def invitations(path: Path = INVITATIONS) -> tuple[str, ...]:
    r"""The wordings of a file, `\n` spelt out. Raises TextError for a line without exactly one {story}."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith("#")]
    for line in lines:
        if line.count("{story}") != 1:
            raise TextError(f"{path}: {line!r} needs {{story}} exactly once")
    if not lines:
        raise TextError(f"{path} holds no invitations")
    return tuple(line.replace("\\n", "\n") for line in lines)


@final
@dataclass(frozen=True, eq=False)
class Packer:
    """Makes packs: pack number `index` is a pure function of seed, index, mix, stories and tokenizer."""

    teller: Teller
    subject: Subject
    seed: int
    mix: Mix

    @cached_property
    def _invitations(self) -> tuple[str, ...]:
        return invitations()

    @cached_property
    def _known(self) -> dict[str, int]:
        return {}

    def pack(self, index: int, stage: Stage = WHOLE) -> Pack:
        """Pack number `index`, of stories as short as `stage` has them; twins and chat form are of whole ones only.

        Markers are left out of three packs in ten, so that deeds have to be counted; in four of ten all people have one
        pronoun, so that they have to be told apart by name.
        """
        draw = random.Random(derive_seed(self.seed, "pack", index))
        asked = {"markers": draw.random() >= 0.3, "alike": draw.random() < 0.4, **stage.wishes}
        wish = Wish(genre="plain", episodes=("need",), **asked)
        wishes = [wish] * self.mix.forks
        if draw.random() < self.mix.twins and stage is WHOLE:
            first = draw.randrange(2)
            wishes = [wish.model_copy(update={"episodes": (draw.choice(TWINS),)}) if fork % 2 == first else wish
                      for fork in range(self.mix.forks)]
        stories = [self.teller.story(self.seed, index, each, fork=fork) for fork, each in enumerate(wishes)]
        stories = stage.cut(stories, draw)
        form = self._form(stories[0], draw) if draw.random() < self.mix.chat and stage is WHOLE else None
        return self.put(stories, form, draw.random() < self.mix.whole, draw)

    def _form(self, story: Story, draw: random.Random) -> Form:
        """The user's part has three sentences at least, and ends before the last sentence of the body."""
        starts = [s.start for s in story.sentences if s.start <= story.episodes[0].start]
        return Form(draw.choice(self._invitations), draw.choice(starts[3:-1] or starts[-1:]))

    def put(self, stories: Sequence[Story], form: Form | None, whole: bool, draw: random.Random) -> Pack:
        """Pack stories that differ only from their first episode on. With `whole` the first goes on to its end.

        Raises TextError if their bodies differ.
        """
        bodies = {story.text[: story.episodes[0].start] for story in stories}
        if len(bodies) != 1:
            raise TextError(f"{len(stories)} stories of one pack have {len(bodies)} bodies", "forks share their body")
        if form is None:
            head = self.subject.encode("")
        else:
            said = form.invitation.replace("{story}", stories[0].text[: form.cut].rstrip())
            head = render(self.subject.tokenizer, [("user", said)], reply=True).ids
        lines = [self._line(story, head, form.cut if form else 0, whole and fork == 0, draw)
                 for fork, story in enumerate(stories)]
        return join(lines)

    def _line(self, story: Story, head: list[int], cut: int, whole: bool, draw: random.Random) -> Line:
        decision = story.episodes[0].decision
        act = next(s for s in story.sentences if s.end > decision)
        stop = len(story.text) if whole else act.end
        choices = [replace(choice, start=choice.start - cut) for choice in story.choices if cut <= choice.start < stop]
        aligned = align(self.subject.tokenizer, story.text[cut: stop], choices, self._known)
        kinds: dict[int, tuple[Kind, dict[int, float]]] = {
            soft.position: (choice.kind, dict(zip(soft.ids, soft.probs, strict=True)))
            for choice, soft in zip(choices, aligned.targets, strict=True)}
        targets: list[Target] = []
        for i, (token, (start, _)) in enumerate(zip(aligned.ids, aligned.offsets, strict=True)):
            if i in kinds:
                targets.append(Target(len(head) + i, *kinds[i]))
            elif decision <= start + cut < act.end:
                targets.append(Target(len(head) + i, "act", {token: 1.0}))
            elif draw.random() < self.mix.other:
                targets.append(Target(len(head) + i, "other", {token: 1.0}))
        decided = next(row for row, target in enumerate(targets) if target.kind == "decision"
                       and aligned.offsets[target.place - len(head)][0] + cut >= decision)
        ids = [*head, *aligned.ids]
        ending = self.subject.tokenizer.eos_token_id
        if whole and isinstance(ending, int):
            targets.append(Target(len(ids), "other", {ending: 1.0}))
            ids.append(ending)
        return Line(ids, [target for target in targets if target.place], self._decision(story, decided))

    def _decision(self, story: Story, row: int) -> Decision:
        episode = story.episodes[0]
        bonds = next(s.bonds for s in story.sentences if s.end > episode.decision)
        others = [bond for person, bond in enumerate(bonds) if person != episode.guest]
        words = [f" {wording.split()[0].rstrip('.')}" for wording in episode.wordings[COSTLY[episode.kind]]]
        costly = frozenset(first_tokens(self.subject.tokenizer, words).values())
        return Decision(row, episode.kind, episode.bond, max(others, default=0), episode.cost, costly)


def join(lines: Sequence[Line]) -> Pack:
    """Lay lines out in one row: what they all begin with once, then the rest of each."""
    shortest = min(len(line.ids) for line in lines) - 1
    shared = next((i for i in range(shortest) if len({line.ids[i] for line in lines}) > 1), shortest)
    tokens, positions, owner = lines[0].ids[:shared], list(range(shared)), [0] * shared
    rows: list[int] = []
    kinds: list[int] = []
    cells: list[tuple[int, int]] = []
    probs: list[float] = []
    decisions: list[Decision] = []
    for fork, line in enumerate(lines):
        base = len(tokens) - shared
        for row, target in enumerate(line.targets):
            if target.place < shared and fork:
                continue  # learned in the first fork already
            before = target.place - 1
            if row == line.decision.row:
                decisions.append(line.decision._replace(row=len(rows)))
            cells += [(len(rows), token) for token in target.probs]
            probs += target.probs.values()
            rows.append(before if before < shared else base + before)
            kinds.append(KINDS.index(target.kind))
        tokens = [*tokens, *line.ids[shared:]]
        positions += range(shared, len(line.ids))
        owner += [fork + 1] * (len(line.ids) - shared)
    return Pack(torch.tensor(tokens), torch.tensor(positions), torch.tensor(owner), torch.tensor(rows), torch.tensor(kinds),
                torch.tensor(cells), torch.tensor(probs), tuple(decisions))
