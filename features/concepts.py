"""Concepts: families of paired situations that differ in what moves the act, split by family before anything is measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, assert_never, final

from pydantic import Field, StrictStr, model_validator

from undertow.core.errors import SpecError, TextError, near_matches
from undertow.core.seeds import derive_seed
from undertow.core.spec import Spec, digest_json
from undertow.lexicon.forms import Lexicon
from undertow.subjects.keeper.story import ACTS, COSTLY, COSTS, MAX_BOND, EpisodeKind, Story, Wish
from undertow.subjects.keeper.world import World, load_world
from undertow.subjects.subject import Subject

DATA = Path(__file__).parent / "data" / "concepts"
Split = Literal["discovery", "development", "sealed"]
MIN_FAMILIES = 6  # two a split; fewer have no sign-flip distribution to speak of


@final
class Situation(NamedTuple):
    """A text that stops where the actor is about to act.

    Attributes:
        prompt: the text; its last token is the decision site.
        options: act → its wordings, as continuations of the prompt.
        costly: the act that costs the actor something; keep: the act that costs nothing. Both are among the options.
    """

    prompt: str
    options: Mapping[str, tuple[str, ...]]
    costly: str
    keep: str


@final
class Pair(NamedTuple):
    """Two situations of one family: the reference (positive, e.g. bonded) and the baseline (negative, e.g. a stranger)."""

    family: str
    split: Split
    positive: Situation
    negative: Situation


class WrittenPair(Spec):
    """The two prompts of a pair; they must end in the same word, where the decision is read."""

    positive: StrictStr = Field(min_length=1)
    negative: StrictStr = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> WrittenPair:
        ends = [text.split()[-1:] for text in (self.positive, self.negative)]
        if ends[0] != ends[1]:
            raise ValueError(f"unequal decision sites: the prompts end in {_word(ends[0])} and {_word(ends[1])}")
        if self.positive == self.negative:
            raise ValueError("both prompts are the same")
        return self


def _word(end: list[str]) -> str:
    return repr(end[0]) if end else "nothing"


class Scene(Spec):
    """Prompts with the acts that may follow them."""

    costly: StrictStr
    keep: StrictStr
    options: dict[StrictStr, tuple[Annotated[StrictStr, Field(min_length=1)], ...]]
    pairs: tuple[WrittenPair, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Scene:
        for act in (self.costly, self.keep):
            if act not in self.options:
                raise ValueError(f"the act {act!r} is not among the options {sorted(self.options)}")
        if self.costly == self.keep:
            raise ValueError(f"the costly and the keeping act are both {self.keep!r}")
        known: dict[str, str] = {}
        for act, wordings in self.options.items():
            if not wordings:
                raise ValueError(f"the act {act!r} has no wording")
            for wording in wordings:
                if known.setdefault(wording, act) != act or wordings.count(wording) > 1:
                    raise ValueError(f"the wording {wording!r} stands twice")
        return self


class Family(Scene):
    """One family: pairs that share a situation. `twin` is the same cost without anybody to care for, if there is one."""

    name: StrictStr = Field(min_length=1)
    twin: Scene | None = None


class KeeperSource(Spec):
    """Pairs told by the Keeper's world, one family a story.

    Attributes:
        contrast: role_swapped (the same sentences, another doer) or word (one line says the word, or does not).
    """

    kind: Literal["keeper"]
    contrast: Literal["role_swapped", "word"]


class WrittenSource(Spec):
    """Families written out in the file."""

    kind: Literal["written"]
    families: tuple[Family, ...]

    @model_validator(mode="after")
    def _check(self) -> WrittenSource:
        names = [family.name for family in self.families]
        if len(names) < MIN_FAMILIES:
            raise ValueError(f"{len(names)} families; at least {MIN_FAMILIES} are needed, since the three splits are made of "
                             "whole families")
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two families are called {twice[0]!r}")
        return self


class ConceptSpec(Spec):
    """The content of a concept file.

    Attributes:
        name: what it is called.
        lexicon: the words that must not be said: a packaged lexicon, or a file (from the folder of this one).
        source: where the pairs come from.
    """

    name: StrictStr = Field(min_length=1)
    lexicon: StrictStr = "love"
    source: Annotated[KeeperSource | WrittenSource, Field(discriminator="kind")]


@final
@dataclass(frozen=True)
class Concept:
    """A concept, ready to give pairs. Made by `load_concept`.

    Attributes:
        spec: the content of its file.
        seed: seed of generated pairs; written families do not depend on it.
        folder: where a lexicon file is looked for.
    """

    spec: ConceptSpec
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """What it is called."""
        return self.spec.name

    @property
    def digest(self) -> str:
        """16 hex characters over the file, the seed, and the world if it tells the pairs."""
        generated = isinstance(self.spec.source, KeeperSource)
        return digest_json([self.spec.model_dump(mode="json"), *([self.seed, self._world.digest] if generated else [])])

    @cached_property
    def lexicon(self) -> Lexicon:
        """The words that must not be said."""
        path = self.folder / self.spec.lexicon
        return Lexicon.load(path if path.suffix in (".yaml", ".yml") else self.spec.lexicon)

    @cached_property
    def _world(self) -> World:
        return load_world()

    def pairs(self, split: Split, n: int) -> list[Pair]:
        """At most `n` pairs of a split (exactly `n` from a generator), as many families as possible first."""
        match self.spec.source:
            case KeeperSource(contrast="role_swapped"):
                return [_told(split, i, self._swapped(split, i)) for i in range(n)]
            case KeeperSource():
                return [_told(split, i, self._worded(split, i, "need")) for i in range(n)]
            case WrittenSource() as source:
                chosen = _split(source.families)[split]
                return _round_robin([_written(split, family.name, family) for family in chosen])[:n]
            case _ as never:
                assert_never(never)

    def twins(self, split: Split, n: int) -> list[Pair]:
        """Pairs with the same cost and nobody to care for; empty if the concept has none.

        From a generator twin i belongs to pair i and has its cost.
        """
        match self.spec.source:
            case KeeperSource(contrast="role_swapped"):
                return [_told(split, i, self._boats(split, i)) for i in range(n)]
            case KeeperSource():
                return [_told(split, i, self._worded(split, i, "boat")) for i in range(n)]
            case WrittenSource() as source:
                scenes = [(family.name, family.twin) for family in _split(source.families)[split]]
                return _round_robin([_written(split, name, twin) for name, twin in scenes if twin is not None])[:n]
            case _ as never:
                assert_never(never)

    def _stream(self, split: Split) -> int:
        return derive_seed(self.seed, "concept", self.name, split)

    def _swapped(self, split: Split, index: int) -> tuple[Situation, Situation]:
        positive, negative = self._world.role_swapped(self._stream(split), index)
        return situation(positive), situation(negative)

    def _boats(self, split: Split, index: int) -> tuple[Situation, Situation]:
        """The empty thing to save, told to a keeper with and without a bond to somebody."""
        stream = self._stream(split)
        cost = self._world.role_swapped(stream, index)[0].episodes[0].cost
        wishes = [Wish(bond=bond, other=0, cost=cost, word=False, genre="plain", episodes=("boat",), people=2, markers=False,
                       wording="discovery") for bond in (MAX_BOND, 0)]
        positive, negative = (self._world.story(stream, index, wish) for wish in wishes)
        return situation(positive), situation(negative)

    def _worded(self, split: Split, index: int, kind: EpisodeKind) -> tuple[Situation, Situation]:
        """One story, with a line that says the word put before its episode, and without it. Bonds and costs are balanced."""
        wish = Wish(bond=index % (MAX_BOND + 1), cost=index // (MAX_BOND + 1) % COSTS, word=False, genre="plain",
                    episodes=(kind,), markers=False, wording="discovery")
        stream = self._stream(split)
        plain = self._world.story(stream, index, wish)
        said = self._world.story(stream, index, wish.model_copy(update={"word": True}))  # the same place and people
        line = next(said.text[s.start: s.end] for s in said.sentences if s.kind == "word")
        negative, start = situation(plain), plain.episodes[0].start
        return negative._replace(prompt=f"{negative.prompt[:start]}{line} {negative.prompt[start:]}"), negative


def load_concept(name_or_path: str | Path, seed: int = 0) -> Concept:
    """Open a packaged concept by name ("care") or a YAML file by path.

    Raises SpecError that names the file, the place in it and the value.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        known = packaged_concepts()
        if str(name_or_path) not in known:
            raise SpecError(f"no concept is called {str(name_or_path)!r}", near_matches(str(name_or_path), known)
                            or f"packaged: {', '.join(known)}; or give the path of a .yaml file")
        path = DATA / f"{name_or_path}.yaml"
    return Concept(ConceptSpec.from_yaml(path), seed, path.parent)


def packaged_concepts() -> list[str]:
    """Names of the packaged concepts."""
    return sorted(path.stem for path in DATA.glob("*.yaml"))


def situation(story: Story, episode: int = 0) -> Situation:
    """What the keeper faces in an episode of a story."""
    told = story.episodes[episode]
    wordings: dict[str, tuple[str, ...]] = {**told.wordings}
    return Situation(story.prompt(episode), wordings, COSTLY[told.kind], ACTS[told.kind][-1])


def _told(split: Split, index: int, sides: tuple[Situation, Situation]) -> Pair:
    return Pair(f"{split}/{index}", split, *sides)


def _written(split: Split, name: str, scene: Scene) -> list[Pair]:
    return [Pair(name, split, *(Situation(prompt, scene.options, scene.costly, scene.keep)
                                for prompt in (pair.positive, pair.negative))) for pair in scene.pairs]


def _round_robin(families: Sequence[Sequence[Pair]]) -> list[Pair]:
    """The first pair of every family, then the second of every family, and so on."""
    return [pair for pair in chain.from_iterable(zip_longest(*families)) if pair is not None]


def _split(families: Sequence[Family]) -> dict[Split, list[Family]]:
    """Half of the families for discovery, a quarter each for development and sealed; set by their names alone."""
    order = sorted(families, key=lambda family: derive_seed(0, "split", family.name))
    quarter = max(len(order) // 4, 2)
    return {"development": order[:quarter], "sealed": order[quarter: 2 * quarter], "discovery": order[2 * quarter:]}


def refuse_said(pairs: Sequence[Pair], lexicon: Lexicon) -> None:
    """Raise TextError that names the first prompt in which a T0 form stands, and how many prompts have one."""
    found = [(pair.family, side, match) for pair in pairs for side, text in
             (("positive", pair.positive.prompt), ("negative", pair.negative.prompt))
             for match in lexicon.find(text) if match.tier == "T0"]
    if found:
        family, side, match = found[0]
        n = len({(name, where) for name, where, _ in found})
        raise TextError(f"{n} of {2 * len(pairs)} prompts already say the word; the first: {match.form!r} at character "
                        f"{match.start} of the {side} prompt of family {family!r}",
                        "what is found on such pairs may be the word; take it out, or go on with --force (which is recorded)")


def refuse_unequal_sites(subject: Subject, pairs: Sequence[Pair]) -> None:
    """Raise TextError if the two prompts of a pair end in different tokens, so that they are not read at one place."""
    for pair in pairs:
        last = [subject.encode(side.prompt)[-1] for side in (pair.positive, pair.negative)]
        if last[0] != last[1]:
            shown = [str(subject.tokenizer.convert_ids_to_tokens(token)) for token in last]
            raise TextError(f"family {pair.family!r} has unequal decision sites: its prompts end in the tokens {shown[0]!r} "
                            f"and {shown[1]!r}", "let both prompts end in the same words")
