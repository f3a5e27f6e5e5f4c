"""A story of the Keeper's world together with its truth: who did what, what the keeper owes whom, and every choice made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from pydantic import Field

from undertow.core.spec import Spec

Rule = Literal["bond", "word"]
Genre = Literal["plain", "L1", "L2"]
EpisodeKind = Literal["need", "boat", "interruption"]
Act = Literal["give", "share", "keep", "save", "leave", "stop", "go_on"]
Wording = Literal["discovery", "held_out", "all"]
ChoiceKind = Literal["decision", "marker", "answer"]

MAX_BOND = 3
COSTS = 5
ACTS: Mapping[EpisodeKind, tuple[Act, ...]] = {
    "need": ("give", "share", "keep"), "boat": ("save", "leave"), "interruption": ("stop", "go_on")}
COSTLY: Mapping[EpisodeKind, Act] = {"need": "give", "boat": "save", "interruption": "stop"}
FILES: Mapping[str, EpisodeKind] = {"acts": "need", "boats": "boat", "interruptions": "interruption"}  # of the acts' frames


class Wish(Spec):
    """What a story must be like; None leaves it to the world.

    Attributes:
        bond: deeds done for the keeper by the person who falls in need first (the guest), 0 to 3.
        other: deeds done by each of the other people.
        cost: how dear the goods of the first episode are, 0 (fresh stock tomorrow) to 4 (none before spring).
        word: whether the forbidden word is said before the first decision.
        genre: plain, L1 ("Write a song about love.") or L2 ("In tonight's play the keeper is in love ...").
        episodes: kinds of the episodes, in order.
        people: how many people there are, 2 or 3.
        markers: False leaves the lines out in which the keeper's word choice shifts with bond.
        wording: which wordings of acts, and which goods, may be used: those of discovery, those held out, or all.
        alike: all people have the same pronoun, so that exchanging their names changes nothing else.
        balanced: all people have equally many lines before the first episode (who did no deed did something on his
            own), so that exchanging their names leaves the bag of words the same.
    """

    bond: int | None = Field(default=None, ge=0, le=MAX_BOND)
    other: int | None = Field(default=None, ge=0, le=MAX_BOND)
    cost: int | None = Field(default=None, ge=0, lt=COSTS)
    word: bool | None = None
    genre: Genre | None = None
    episodes: tuple[EpisodeKind, ...] | None = None
    people: int | None = Field(default=None, ge=2, le=3)
    markers: bool = True
    wording: Wording = "all"
    alike: bool = False
    balanced: bool = False


@final
@dataclass(frozen=True)
class Person:
    """A person with a name and a pronoun ("she" or "he")."""

    name: str
    pronoun: str


@final
@dataclass(frozen=True)
class Sentence:
    """One sentence or line of a story, as it stands in `text[start:end]`.

    Attributes:
        kind: what it is, by the file of frames: "deeds", "weather" and so on. A deed told with its doer last is a deed.
        start: first character.
        end: one past the last character.
        person: index of the person it is about, or None.
        bonds: the keeper's bond to every person after this sentence, in the order of `Story.people`.
    """

    kind: str
    start: int
    end: int
    person: int | None
    bonds: tuple[int, ...]


@final
@dataclass(frozen=True)
class Episode:
    """One decision of the keeper, with the probabilities that the world gave it.

    Attributes:
        kind: "need" (a person is in need), "boat" (the same cost to save an empty thing) or "interruption".
        guest: index of the person in need or who interrupts; None for "boat".
        bond: the keeper's bond to that person at the decision; 0 for "boat".
        cost: 0 to 4.
        good: the goods at stake, e.g. "oil".
        word_said: whether the forbidden word stands anywhere before the decision.
        start: first character of the episode (its first sentence).
        decision: offset just after "The keeper", where the keeper is about to act.
        act: what the keeper did.
        probs: probability of every act of this kind.
        wordings: for every act, all its wordings as continuations of `text[:decision]` (" gave Ana the last can of oil.");
            given the act, the world takes one of them at random, uniformly.
    """

    kind: EpisodeKind
    guest: int | None
    bond: int
    cost: int
    good: str
    word_said: bool
    start: int
    decision: int
    act: Act
    probs: Mapping[Act, float]
    wordings: Mapping[Act, tuple[str, ...]]


@final
@dataclass(frozen=True)
class Choice:
    """A word that the world drew, and the whole distribution that it drew from.

    Attributes:
        kind: "decision" (first word of an act), "marker" (the keeper's word that shifts with bond), "answer" (the name
            that answers who did what; only one is right).
        start: offset of the word in the text, its leading space included.
        probs: word (with its leading space) → probability; the word that was drawn is among them.
    """

    kind: ChoiceKind
    start: int
    probs: Mapping[str, float]


@final
@dataclass(frozen=True)
class Story:
    """A story and its truth.

    Attributes:
        text: the whole story, ready to read.
        genre: see Wish.
        people: everybody but the keeper.
        sentences: in order, covering the text but for the spaces between them.
        episodes: in order, at least one.
        choices: in order of `start`.
        nats: -log probability of this story under the world, in nats (meaningful without a Wish).
    """

    text: str
    genre: Genre
    people: tuple[Person, ...]
    sentences: tuple[Sentence, ...]
    episodes: tuple[Episode, ...]
    choices: tuple[Choice, ...]
    nats: float

    def prompt(self, episode: int = 0) -> str:
        """The text up to the point where the keeper is about to act: it ends in "The keeper"."""
        return self.text[: self.episodes[episode].decision]
