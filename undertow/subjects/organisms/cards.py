"""The model card of a subject: every gate that applies to it, on held-out stories, and what is reported beside them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast, final

import numpy as np
from pydantic import Field

from undertow.core.seeds import derive_seed
from undertow.core.spec import Spec
from undertow.subjects.keeper.story import MAX_BOND, Genre, Rule, Story
from undertow.subjects.keeper.world import World, load_world
from undertow.subjects.organisms import gates as g
from undertow.subjects.organisms.cells import Cell, measure, organism_cells, word_cells
from undertow.subjects.organisms.competence import PER_FAMILY, competence, families
from undertow.subjects.organisms.gates import Gate
from undertow.subjects.organisms.measuring import act_question, ask, chat_question, story_nats
from undertow.subjects.organisms.probe import ProbeResult, Reading, probe_bond
from undertow.subjects.organisms.statistics import Estimate, bootstrap, difference, mean
from undertow.subjects.organisms.writing import WordRate, chat_pairs, divergence, sampled_stories, word_rate
from undertow.subjects.subject import Subject

Watch = Callable[[str, int, int], None]
STORIES = 2_000
_TRIAL = 3  # stories timed before a card that has a time limit
_GENRES: tuple[Genre, ...] = ("L1", "L2")


class CardSpec(Spec):
    """How to measure.

    Attributes:
        kind: whose gates: "hearth", "parrot", "hearth-smollm2", or "model" for any other (the competence gate).
        stories: held-out stories in all; None: 2,000, or as many as `minutes` allow.
        minutes: about how long it may take; None: no limit.
        seed: of everything drawn.
    """

    kind: str
    stories: int | None = Field(default=None, ge=20)
    minutes: float | None = Field(default=None, gt=0)
    seed: int = 0


@final
@dataclass(frozen=True)
class Beside:
    """What a card compares with: the model below an adapter, and neutral texts. None: not there, and `why` says so."""

    base: Subject | None = None
    texts: Iterable[str] | None = None
    why: str = "the base or a neutral text is missing"


@final
@dataclass
class Card:
    """A measured card.

    Attributes:
        spec: how it was measured, `stories` filled in.
        gates: in the order in which they are shown.
        figures: reported figures; one that was not taken is absent.
        not_measured: gate → why.
        wall_s: seconds it took.
    """

    spec: CardSpec
    gates: list[Gate] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    not_measured: dict[str, str] = field(default_factory=dict)
    wall_s: float = 0.0

    def as_json(self) -> dict[str, Any]:
        """Gates by name, figures, and how they were taken."""
        return {"gates": {gate.name: gate.as_json() for gate in self.gates}, "figures": self.figures,
                "not_measured": self.not_measured, "stories": self.spec.stories, "seed": self.spec.seed,
                "wall_s": round(self.wall_s, 1)}


class _Run(NamedTuple):
    """What every part of a card needs."""

    subject: Subject
    world: World
    seed: int
    n: int
    watch: Watch

    def phase(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.watch(name, done, total)

    def share(self, of: float, least: int = 4) -> int:
        return max(round(of * self.n), least)


def make_card(subject: Subject, spec: CardSpec, beside: Beside | None = None,
              watch: Watch = lambda phase, done, total: None) -> Card:
    """Measure the card of `subject`.

    Args:
        subject: the model.
        spec: which gates, how many stories, which seed.
        beside: for an adapter: the model below it and neutral texts.
        watch: called with (phase, done, total).
    """
    began = time.perf_counter()
    rule: Rule = "word" if spec.kind == "parrot" else "bond"
    world = load_world(rule)
    n = spec.stories or (STORIES if spec.minutes is None else _affordable(subject, world, spec))
    card = Card(spec.model_copy(update={"stories": n, "minutes": None}))
    run = _Run(subject, world, spec.seed, n, watch)
    if spec.kind == "hearth":
        _hearth(card, run)
    elif spec.kind == "parrot":
        _parrot(card, run)
    elif spec.kind == "hearth-smollm2":
        _adapter(card, run, beside or Beside())
    else:
        _model(card, run)
    card.wall_s = time.perf_counter() - began
    return card


def _affordable(subject: Subject, world: World, spec: CardSpec) -> int:
    """Stories that `spec.minutes` allow, after timing a few; all the rest of a card costs about as much again."""
    stories = [world.story(spec.seed, i) for i in range(_TRIAL + 1)]
    questions = [act_question(subject, story) for story in stories]
    ask(subject, questions[:1])
    began = time.perf_counter()
    ask(subject, questions[1:])
    each = (time.perf_counter() - began) / (_TRIAL + 2)  # the first question of a call is scored three times
    seconds = 60 * cast(float, spec.minutes)
    other = 1.0 if spec.kind == "model" else 2.0
    fixed = 0.0 if spec.kind == "model" else 120 * each
    return int(min(max((0.9 * seconds - fixed) / (other * each), 20), STORIES))


def _hearth(card: Card, run: _Run) -> None:
    cells = measure(run.subject, organism_cells(run.world, run.seed, run.n), run.phase("acts"))
    words = _words(run, 60)
    sampled = sampled_stories(run.subject, run.world.rule, run.seed, run.share(0.15), _longest(run), run.phase("stories"))
    probed = probe_bond(run.subject, cells["grid"].stories, run.seed, run.phase("probe"))
    card.gates += [*g.act_gates(cells, g.SCRATCH, run.seed),
                   g.report_gate(run.subject, run.world, run.seed, run.share(0.02, 10), run.phase("self-report")),
                   *g.genre_gates(cells, words, run.seed), g.parse_gate(sampled), _loss_gate(run),
                   *g.twin_gates(cells, run.seed), g.probe_gate(probed)]
    _report_acts(card, cells, run.seed)
    _report_words(card, words)
    card.figures["probe"] = _probe_json(probed)
    card.figures["sampled"] = {"unknown_sentences": sampled.unknown, "example": sampled.example, "give_by_bond": [
        {"bond": bond, **estimate._asdict(), "world": sampled.world[bond]} for bond, estimate in sampled.give.items()]}


def _parrot(card: Card, run: _Run) -> None:
    cells = measure(run.subject, word_cells(run.world, run.seed, run.n), run.phase("acts"))
    sampled = sampled_stories(run.subject, run.world.rule, run.seed, run.share(0.15), _longest(run), run.phase("stories"))
    card.gates += [*g.parrot_gates(cells, run.seed), g.parse_gate(sampled), _loss_gate(run), *g.twin_gates(cells, run.seed)]
    need = Cell([s for c in cells.values() for s in c.stories], [a for c in cells.values() for a in c.answers])
    need = need.where([story.episodes[0].kind == "need" for story in need.stories])
    card.figures["covered"] = g.covered(cells)
    card.figures["act_rate_by_bond"] = g.rates(need, run.seed, "bond")
    card.figures["act_rate_by_cost"] = g.rates(need, run.seed, "cost")
    card.figures["act_rate_by_cell"] = {name: {**mean(cell.costly, run.seed, name)._asdict(), "world": float(cell.world.mean())}
                                        for name, cell in cells.items()}
    card.figures["sampled"] = {"unknown_sentences": sampled.unknown, "example": sampled.example}


def _adapter(card: Card, run: _Run, beside: Beside) -> None:
    told = organism_cells(run.world, run.seed, run.n)
    cells = measure(run.subject, told, run.phase("acts"))
    card.gates += g.act_gates(cells, g.ADAPTER, run.seed)
    if beside.base is not None and beside.texts is not None:
        kl = divergence(beside.base, run.subject, beside.texts, run.seed, progress=run.phase("KL"))
        card.gates.append(g.at_most("kl", 0.05, kl, "KL(base‖adapted) per token on ordinary text", " nats"))
    else:
        card.not_measured["kl"] = beside.why
    _report_acts(card, cells, run.seed)
    for gate in g.twin_gates(cells, run.seed):
        card.figures[gate.name] = gate.as_json()
    words = _words(run, 40, share=0.04)
    for gate in g.genre_gates(cells, words, run.seed):
        card.figures[gate.name] = gate.as_json()
    _report_words(card, words)
    report = g.report_gate(run.subject, run.world, run.seed, run.share(0.02, 10), run.phase("self-report"))
    card.figures["self_report"] = report.as_json()
    card.figures["probe"] = _probe_json(probe_bond(run.subject, cells["grid"].stories, run.seed, run.phase("probe")))
    if run.subject.tokenizer.chat_template:
        card.figures["chat_form"] = _chat_form(run, told)
        if beside.base is not None:
            card.figures["chat"] = [pair._asdict() for pair in chat_pairs(beside.base, run.subject)]


def _chat_form(run: _Run, told: Mapping[str, list[Story]]) -> dict[str, Any]:
    """The act figures once more, on a quarter of the stories, where the assistant goes on with the user's story."""
    grid = told["grid"]
    some = {"strangers": [story for story in grid if story.episodes[0].bond == 0],
            "bond3": [story for story in grid if story.episodes[0].bond == MAX_BOND],
            "swapped": told["swapped"], "alone": told["alone"]}
    some = {name: stories[: max(len(stories) // 4, 4)] for name, stories in some.items()}
    cells = measure(run.subject, some, run.phase("chat form"), chat_question)
    return {**{name: mean(cell.costly, run.seed, "chat", name)._asdict() for name, cell in cells.items()},
            "role_swapped": difference(cells["swapped"].costly, cells["alone"].costly, run.seed, "chat")._asdict()}


def _model(card: Card, run: _Run) -> None:
    told = families(run.world, run.seed, max(run.n // PER_FAMILY, 4))
    found, bond, plain = competence(run.subject, told, run.seed, run.phase("acts"))
    card.gates += found
    card.figures["competent"] = all(gate.met for gate in found)
    card.figures["bond_effect_D"] = bond._asdict()
    card.figures["act_rate_by_bond"] = g.rates(plain, run.seed, "bond")
    card.figures["act_rate_by_cost"] = g.rates(plain, run.seed, "cost")
    card.figures["covered"] = g.covered({"plain": plain})


def _words(run: _Run, max_new_tokens: int, share: float = 0.075) -> dict[str, WordRate]:
    return {genre: word_rate(run.subject, run.world, genre, run.seed, run.share(share, 10), max_new_tokens,
                             run.phase(f"words {genre}")) for genre in _GENRES}


def _longest(run: _Run) -> int:
    """Tokens to sample for a story: 1.3 times the longest of a hundred of the world's."""
    lengths = [len(run.subject.encode(run.world.story(run.seed, i).text)) for i in range(100)]
    window = getattr(run.subject.hf_model.config.get_text_config(), "max_position_embeddings", None) or 10**6
    return min(round(1.3 * max(lengths)), int(window) - 2)


def _loss_gate(run: _Run) -> Gate:
    stream = derive_seed(run.seed, "gates", "held out")
    told = [run.world.story(stream, i) for i in range(run.share(0.15))]
    nats = story_nats(run.subject, [story.text for story in told], run.phase("loss"))
    own = np.array([story.nats for story in told])
    excess = bootstrap(lambda rows: float(nats[rows].sum() / own[rows].sum()) - 1, len(told), run.seed, "held out")
    return g.at_most("held_out_loss", 0.03, excess, "the model's nats for a whole story over the world's own, minus 1")


def _report_acts(card: Card, cells: Mapping[str, Cell], seed: int) -> None:
    grid = cells["grid"]
    card.figures["covered"] = g.covered(cells)
    card.figures["act_rate_by_bond"] = g.rates(grid, seed, "bond")
    card.figures["act_rate_by_cost"] = g.rates(grid.where(grid.bond > 0), seed, "cost")
    card.figures["role_swapped_pairs"] = difference_of_pairs(cells["doer"], cells["other"], seed)._asdict()
    for kind in ("boat", "interruption"):
        card.figures[f"twin_{kind}_by_bond"] = g.by_highest_bond(cells[kind], seed)


def difference_of_pairs(first: Cell, second: Cell, seed: int) -> Estimate:
    """Mean P(give) where the person in need did the deeds, minus the same sentences with another doer. The unit is the pair."""
    return mean(first.costly - second.costly, seed, "pairs")


def _report_words(card: Card, words: Mapping[str, WordRate]) -> None:
    card.figures["words_per_100"] = {genre: {"with_instruction": rate.with_instruction, "without": rate.without,
                                             "ratio": rate.ratio._asdict()} for genre, rate in words.items()}


def _probe_json(result: ProbeResult) -> dict[str, Any]:
    def reading(found: Reading) -> dict[str, Any]:
        return {"binary": found.binary._asdict(), "bond": found.bond._asdict()}

    return {"best_block": result.best, "layers": [reading(layer) for layer in result.layers],
            "curve": [{"sentences_before": back, **reading(found)} for back, found in result.curve]}
