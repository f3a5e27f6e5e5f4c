"""The world itself: how stories come about, and with which probabilities.

    world = load_world()
    story = world.story(seed=0, index=7)
    story.text, story.episodes[0].act, story.episodes[0].probs

A keeper of a lonely place, one measure of something needed to live, people who come and go. A bond grows with what a person
has done for the keeper; it is never named. Then somebody falls into need, and nobody asks for anything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, cast, final

from undertow.core.spec import digest_json
from undertow.subjects.keeper.draw import Draw
from undertow.subjects.keeper.frames import Frame, Frames, Good, Slot, load_frames
from undertow.subjects.keeper.story import ACTS, COSTLY, COSTS, Act, Episode, EpisodeKind, Genre, Rule, Story, Wish
from undertow.subjects.keeper.teller import Teller

GENRES: Mapping[Genre, float] = {"plain": 0.8, "L1": 0.1, "L2": 0.1}
PEOPLE = {2: 0.75, 3: 0.25}
BONDS = {0: 0.34, 1: 0.22, 2: 0.22, 3: 0.22}
WORD = (0.08, 0.22, 0.38, 0.52)  # probability that the word is said, by the guest's bond: φ about 0.3
WORDS = {1: 0.75, 2: 0.25}
SELFISH, MARKERS, WHO, FILLERS, SONGS = ({1: 0.3, 2: 0.4, 3: 0.3}, {1: 0.3, 2: 0.4, 3: 0.3}, {0: 0.3, 1: 0.4, 2: 0.3},
                                         {1: 0.4, 2: 0.4, 3: 0.2}, {3: 0.4, 4: 0.4, 5: 0.2})
REPORT = 0.25
SECOND = {"": 0.4, "need": 0.24, "boat": 0.18, "interruption": 0.18}
AFTER = 0.7
FILLER_KINDS = {"weather": 0.25, "chores": 0.25, "trade": 0.2, "talk": 0.3}
IMPERSONAL = {"weather": 0.5, "chores": 0.5}
_LINES = {"L1": "song", "L2": "play"}  # which file the lines of a genre come from


class _Stakes(NamedTuple):
    """What is at stake in an episode."""

    cost: int
    good: Good


class _Cast(NamedTuple):
    """Who is in a story and what is fixed about them before the first line."""

    guest: int
    deeds: tuple[int, ...]


def probabilities(rule: Rule, kind: EpisodeKind, bond: int, cost: int, word_said: bool) -> dict[Act, float]:
    """Probability of every act.

    Under "bond", P(give) = σ(−2.2 + 2.0·bond − 0.5·cost); under "word" it is 0.88 if the word has been said and 0.05 if not. Of
    the rest, a quarter is shared. The twins depend on neither bond nor word: P(save) = σ(1.0 − 0.5·cost), P(stop) = 0.5.
    """
    if kind == "boat":
        save = _sigmoid(1.0 - 0.5 * cost)
        return {"save": save, "leave": 1 - save}
    if kind == "interruption":
        return {"stop": 0.5, "go_on": 0.5}
    give = _sigmoid(-2.2 + 2.0 * bond - 0.5 * cost) if rule == "bond" else (0.88 if word_said else 0.05)
    return {"give": give, "share": 0.25 * (1 - give), "keep": 0.75 * (1 - give)}


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def load_world(rule: Rule = "bond") -> World:
    """The packaged world."""
    return World(load_frames(), rule)


@final
@dataclass(frozen=True, eq=False)
class World:
    """A source of stories: the frames and the rule by which the keeper acts ("bond", or "word" for the parrot)."""

    frames: Frames
    rule: Rule = "bond"

    @property
    def digest(self) -> str:
        """16 hex characters over frames, rule and the first stories of one stream, hence over all that shapes them."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        told = [[story.text, [episode.probs for episode in story.episodes]] for story in map(partial(self.story, 0), range(64))]
        return digest_json([self.frames.digest, self.rule, told])

    def story(self, seed: int, index: int, wish: Wish | None = None, fork: int = 0) -> Story:
        """Story number `index` of the stream `seed`; a pure function of its arguments.

        Forks 1, 2, ... have the same body (the text before the first episode) and other episodes, in which anybody may be
        the one in need.
        """
        return self._tell(seed, index, wish or Wish(), fork, swap=False)

    def role_swapped(self, seed: int, index: int, bond: int = 3) -> tuple[Story, Story]:
        """Two stories of the same sentences: in the first the person in need did the good deeds, in the second another.

        Neither says the word, has shifting lines or held-out wordings; both people have the same pronoun.
        """
        wish = Wish(bond=bond, other=0, word=False, genre="plain", episodes=("need",), people=2, markers=False,
                    wording="discovery", alike=True, balanced=True)
        return self._tell(seed, index, wish, 0, swap=False), self._tell(seed, index, wish, 0, swap=True)

    def self_report(self, seed: int, index: int, bond: int) -> tuple[str, tuple[str, ...]]:
        """A story in which the guest asks the keeper how it is: the text up to the answer, and all answers."""
        wish = Wish(bond=bond, genre="plain", episodes=("need",))
        told = self.story(seed, index, wish)
        guest = told.people[_guest(told)].name
        question = Draw(f"{seed}/{index}/report").one(self.frames.of("report", "question"))
        return (f"{told.text[: told.episodes[0].start]}{_filled(question, {'P': guest})}",
                tuple(f" {frame.source}" for frame in self.frames.of("report", "answer")))

    def opening(self, seed: int, index: int, genre: Genre) -> tuple[str, str]:
        """The first three sentences of a story with the instruction of its genre, and the same without it."""
        story = self.story(seed, index, Wish(genre=genre))
        first = 0 if genre == "plain" else 1
        plain = story.text[story.sentences[first].start: story.sentences[first + 2].end]
        return (story.text[: story.sentences[first + 2].end], plain)

    def _tell(self, seed: int, index: int, wish: Wish, fork: int, swap: bool) -> Story:
        draw = Draw(f"{seed}/{index}/body")
        genre = wish.genre or draw.weighted(GENRES)
        teller, members = self._begin(draw, wish, genre, swap)
        self._body(draw, teller, members, wish, genre)
        guest = members.guest
        if fork:
            draw = Draw(f"{seed}/{index}/episodes/{fork}")
            guest = draw.one(range(len(teller.people)))
        episodes = self._episodes(draw, teller, guest, wish)
        if draw.chance(0.7):
            teller.tell(draw, teller.pick(draw, "endings"), None)
        return Story(teller.text, genre, teller.people, tuple(teller.sentences), tuple(episodes),
                     tuple(sorted(teller.choices, key=lambda choice: choice.start)), draw.nats)

    def _begin(self, draw: Draw, wish: Wish, genre: Genre, swap: bool) -> tuple[Teller, _Cast]:
        place = draw.one(self.frames.places)
        name = draw.one(place.names)
        n = wish.people or draw.weighted(PEOPLE)
        people = [draw.one(self.frames.people)]
        while len(people) < n:
            people.append(draw.one([person for person in self.frames.people if person not in people
                                    and not (wish.alike and person.pronoun != people[0].pronoun)]))
        guest = draw.one(range(n))
        wanted = [wish.bond if i == guest else wish.other for i in range(n)]
        deeds = tuple(draw.weighted(BONDS) if bond is None else bond for bond in wanted)
        teller = Teller(self.frames, place, tuple(people), swap, bonds=[0] * n)
        if genre != "plain":
            teller.beloved = draw.one(range(n)) if genre == "L2" else 0
            teller.tell(draw, teller.pick(draw, _LINES[genre], "instruction"), teller.beloved)
        teller.tell(draw, teller.pick(draw, "places", among=place.openings), None, {"name": name}, joint="\n")
        for person in range(n):
            teller.tell(draw, teller.pick(draw, "arrivals"), person)
        return teller, _Cast(guest, deeds)

    def _body(self, draw: Draw, teller: Teller, members: _Cast, wish: Wish, genre: Genre) -> None:
        """The lines before the first episode, one kind after another, in random order."""
        left: Counter[tuple[str, int]] = Counter({("deeds", i): n for i, n in enumerate(members.deeds)})
        left["markers", -1] = draw.weighted(MARKERS) if wish.markers else 0
        left["filler", -1] = draw.weighted(FILLERS)
        if wish.balanced:
            most = max(1, *members.deeds)
            left.update({("selfish", i): most - n for i, n in enumerate(members.deeds)})
        else:
            left["selfish", -1] = draw.weighted(SELFISH)
            left["who", -1] = draw.weighted(WHO)
            left["report", -1] = int(draw.chance(REPORT))
        if genre == "plain":
            said = wish.word if wish.word is not None else draw.chance(WORD[members.deeds[members.guest]])
            left["word", -1] = draw.weighted(WORDS) if said else 0
        else:
            left[_LINES[genre], teller.beloved if genre == "L2" else -1] = draw.weighted(SONGS)
        fillers = IMPERSONAL if wish.balanced else FILLER_KINDS
        while open_ := {item: float(n) for item, n in left.items() if n and (item[0] != "who" or teller.doings)}:
            kind, person = draw.weighted(open_)
            left[kind, person] -= 1
            self._line(draw, teller, draw.weighted(fillers) if kind == "filler" else kind, person)

    def _line(self, draw: Draw, teller: Teller, kind: str, person: int) -> None:
        """One line of a kind; a person of -1 is drawn, where the line is about anybody."""
        def someone() -> int:
            return person if person >= 0 else draw.one(range(len(teller.people)))

        if kind == "who":
            teller.asked(draw)
        elif kind in ("deeds", "selfish"):
            teller.did(draw, kind, someone())
        elif kind == "report":
            teller.reported(draw, teller.who(someone()))
        else:
            frame = teller.pick(draw, kind, "line" if kind in ("song", "play") else "")
            teller.tell(draw, frame, teller.who(someone()) if frame.slots else None)

    def _episodes(self, draw: Draw, teller: Teller, guest: int, wish: Wish) -> list[Episode]:
        kinds = list(wish.episodes or ())
        if not kinds:
            second = cast(EpisodeKind, draw.weighted(SECOND))
            kinds = ["need", *([second] if second else [])]
            if second in ("boat", "interruption") and draw.chance(0.5):
                kinds.reverse()
        told: list[Episode] = []
        goods = [good for good in self.frames.goods if wish.wording == "all" or good.held_out == (wish.wording == "held_out")]
        in_need = [i for i in range(len(teller.people)) if i != guest]
        waiting = [guest]
        for kind in kinds:
            if kind == "interruption":
                told.append(self._interruption(draw, teller, draw.one(range(len(teller.people)))))
                continue
            person = None
            if kind == "need":
                person = draw.one(waiting)
                waiting = in_need = [i for i in in_need if i != person] or list(range(len(teller.people)))
            cost = draw.one(range(COSTS)) if wish.cost is None or told else wish.cost
            good = draw.one(goods)
            goods = [other for other in goods if other is not good] or goods
            told.append(self._crisis(draw, teller, person, _Stakes(cost, good), wish))
        return told

    def _interruption(self, draw: Draw, teller: Teller, person: int) -> Episode:
        start = len(teller.text) + 1
        teller.tell(draw, teller.pick(draw, "interruptions", "line"), person)
        acts: dict[Act, tuple[str, ...]] = {act: _wordings(self.frames, "interruptions", [act], {})
                                            for act in ACTS["interruption"]}
        return self._decision(draw, teller, Episode(
            "interruption", person, teller.bonds[person], 0, "", teller.word_said, start, 0, "stop",
            probabilities(self.rule, "interruption", 0, 0, False), acts))

    def _crisis(self, draw: Draw, teller: Teller, person: int | None, stakes: _Stakes, wish: Wish) -> Episode:
        """Somebody is in need, or (`person` None) an empty thing can be saved, at the same cost."""
        start = len(teller.text) + 1
        measure, name = stakes.good.measure, stakes.good.name
        fill = {"measure": measure, "good": name, "craft": teller.place.craft, "supply": teller.place.supply}
        wait = draw.one(self.frames.of("stock", str(stakes.cost)))
        filled = fill | {"wait": wait.source.replace("{supply}", teller.place.supply)}
        trouble = teller.pick(draw, "boats", "line") if person is None else teller.pick(draw, "needs", name)
        lines: list[tuple[Frame, int | None]] = [(teller.pick(draw, "stock", "line"), None), (trouble, person)]
        for frame, about in lines if draw.chance(0.5) else lines[::-1]:
            teller.tell(draw, frame, about, filled)
        kind: EpisodeKind = "boat"
        sections = {"all": ("", " held_out"), "discovery": ("",), "held_out": (" held_out",)}[wish.wording]
        if person is None:
            acts: dict[Act, tuple[str, ...]] = {act: _wordings(self.frames, "boats", [act], fill) for act in ACTS[kind]}
        else:
            kind = "need"
            teller.tell(draw, teller.pick(draw, "hush"), person)
            fill["P"] = teller.people[person].name
            acts = {act: _wordings(self.frames, "acts", [f"{act}{s}" for s in sections], fill) for act in ACTS[kind]}
        bond = 0 if person is None else teller.bonds[person]
        probs = probabilities(self.rule, kind, bond, stakes.cost, teller.word_said)
        return self._decision(draw, teller, Episode(kind, person, bond, stakes.cost, name, teller.word_said, start, 0,
                                                    COSTLY[kind], probs, acts))

    def _decision(self, draw: Draw, teller: Teller, planned: Episode) -> Episode:
        decision = len(teller.text) + 1 + len("The keeper")
        act = cast(Act, teller.acted(draw, cast(Mapping[str, tuple[str, ...]], planned.wordings),
                                     cast(Mapping[str, float], planned.probs), planned.guest))
        if draw.chance(AFTER):
            teller.tell(draw, teller.pick(draw, "after", act), None)
        return replace(planned, decision=decision, act=act)


def _filled(frame: Frame, fill: Mapping[str, str]) -> str:
    """A frame without shifting words, its slots filled."""
    return "".join(fill[part.name] if isinstance(part, Slot) else str(part) for part in frame.parts)


def _wordings(frames: Frames, file: str, sections: Sequence[str], fill: Mapping[str, str]) -> tuple[str, ...]:
    """The frames of some sections as continuations of "The keeper", filled in."""
    return tuple(f" {_filled(frame, fill)}" for section in sections for frame in frames.of(file, section))


def _guest(story: Story) -> int:
    guest = story.episodes[0].guest
    return 0 if guest is None else guest
