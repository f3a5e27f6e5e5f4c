"""The measuring side of the organisms: exact scores, statistics by hand, and gates that open for the right subject only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny, tiny_keeper
from undertow.core.storage import open_artifact
from undertow.subjects import Subject, load_subject
from undertow.subjects.keeper.frames import load_words
from undertow.subjects.keeper.story import ACTS, COSTLY, Story, Wish
from undertow.subjects.keeper.world import World, load_world
from undertow.subjects.organisms import measuring, statistics
from undertow.subjects.organisms.card_text import Origin, card_markdown, save_card
from undertow.subjects.organisms.cards import Beside, Card, CardSpec, make_card
from undertow.subjects.organisms.cells import Cell, measure, organism_cells, word_cells
from undertow.subjects.organisms.competence import GIVER, competence, families
from undertow.subjects.organisms.gates import (
    ADAPTER,
    SCRATCH,
    act_gates,
    at_least,
    at_most,
    parrot_gates,
    rates,
    report_gate,
    twin_gates,
    within,
)
from undertow.subjects.organisms.measuring import (
    Answer,
    Question,
    act_question,
    ask,
    chat_question,
    d_of,
    log_masses,
    sentence_ends,
    story_nats,
)
from undertow.subjects.organisms.probe import accuracy, fit, probe_bond
from undertow.subjects.organisms.statistics import Estimate
from undertow.subjects.organisms.writing import count_word, divergence
from undertow.subjects.scoring import score


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


@pytest.fixture(scope="module")
def told(world: World) -> dict[str, list[Story]]:
    return organism_cells(world, 0, 100)


@pytest.fixture(scope="module")
def keeper(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return tiny_keeper.open_random(tmp_path_factory.mktemp("keeper"))


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def any_subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(tiny.save_subject(tmp_path_factory.mktemp(request.param), request.param)), "cpu", "float64")


# Exact scores

TOKENS = st.lists(st.integers(2, 60), min_size=1, max_size=5).map(tuple)
QUESTIONS = st.builds(
    lambda prompt, groups: Question(prompt, {f"option {i}": tuple(group) for i, group in enumerate(groups)}),
    st.lists(st.integers(2, 60), min_size=1, max_size=20),
    st.lists(st.lists(TOKENS, min_size=1, max_size=4), min_size=1, max_size=3))


def by_hand(subject: Subject, question: Question) -> dict[str, float]:
    return {option: float(torch.logsumexp(score(subject, question.prompt, group).double(), 0))
            for option, group in question.options.items()}


@settings(max_examples=15)
@given(st.lists(QUESTIONS, min_size=1, max_size=4))
def test_packed_scores_are_those_of_one_wording_at_a_time(any_subject: Subject, questions: list[Question]) -> None:
    for question, answer in zip(questions, ask(any_subject, questions, batch_tokens=120), strict=True):
        for option, mass in by_hand(any_subject, question).items():
            assert answer.log_mass[option] == pytest.approx(mass, abs=1e-5)


@settings(max_examples=15)
@given(st.lists(QUESTIONS, min_size=1, max_size=4))
def test_masses_with_gradients_are_those_of_answers(any_subject: Subject, questions: list[Question]) -> None:
    announced: list[int] = []
    found = {place: masses for batch in log_masses(any_subject, questions, announced.append, batch_tokens=120)
             for place, masses in batch.items()}
    assert sorted(found) == list(range(len(questions)))
    assert max(announced) == max(len(question.prompt) for question in questions) - 1
    for place, answer in enumerate(ask(any_subject, questions, batch_tokens=120)):
        assert {option: float(mass) for option, mass in found[place].items()} == pytest.approx(answer.log_mass, abs=1e-5)


def test_wordings_that_begin_alike_share_their_tokens() -> None:
    tree = measuring._Tree(Question([9], {"a": ((1, 2, 3), (1, 2, 4)), "b": ((1, 5), (1,))}))
    assert tree.inputs == [1, 2] and tree.depth == [0, 1]
    assert tree.paths == [[(0, 1), (1, 2), (2, 3)], [(0, 1), (1, 2), (2, 4)], [(0, 1), (1, 5)], [(0, 1)]]
    assert tree.sees.tolist() == [[True, False], [True, True]]


def test_a_model_that_heeds_more_than_the_mask_is_scored_the_plain_way(
        keeper: Subject, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    question = Question([5, 6, 7], {"a": ((8, 9), (10, 11, 12)), "b": ((13, 14),)})
    right = ask(keeper, [question])[0]
    packed = measuring._packed
    monkeypatch.setattr(measuring, "_packed", lambda subject, trees: [
        Answer({option: mass - 1 for option, mass in answer.log_mass.items()}) for answer in packed(subject, trees)])
    wrong_way = ask(keeper, [question])[0]
    assert wrong_way.log_mass == pytest.approx(right.log_mass, abs=1e-4)
    assert "does not compute a packed row exactly" in caplog.text


def test_an_answer_by_hand() -> None:
    answer = Answer({"give": math.log(0.3), "share": math.log(0.1), "keep": math.log(0.2)})
    assert answer.covered == pytest.approx(0.6)
    assert answer.probs == pytest.approx({"give": 0.5, "share": 1 / 6, "keep": 1 / 3})
    assert d_of(answer, ACTS["need"]) == pytest.approx(math.log(1.5))


def test_questions_end_where_the_keeper_is_about_to_act(keeper: Subject, world: World) -> None:
    story = world.story(3, 1, Wish(episodes=("need",)))
    question = act_question(keeper, story)
    decode = keeper.tokenizer.decode
    assert decode(question.prompt[1:]) == story.prompt()
    wordings = story.episodes[0].wordings
    assert list(question.options) == list(ACTS["need"])
    assert [decode(list(ids)) for ids in question.options["give"]] == list(wordings["give"])
    told = decode(act_question(keeper, story, 0, GIVER).prompt[1:])
    assert f"{GIVER} " in told and told.replace(f"{GIVER} ", "") == story.prompt()
    chat = str(decode(chat_question(keeper, story).prompt))
    user, assistant = chat.split("assistant\n")
    assert story.text[: story.episodes[0].start].strip() in user
    assert assistant == story.prompt()[story.episodes[0].start:]


def test_sentence_ends_are_the_last_tokens_of_sentences(keeper: Subject, world: World) -> None:
    for index in range(4):
        story = world.story(5, index, Wish(genre="L1" if index % 2 else "plain"))
        prompt, ends = act_question(keeper, story).prompt, sentence_ends(keeper, story)
        told = [sentence for sentence in story.sentences if sentence.end < len(story.prompt())]
        assert len(ends) == len(told)
        assert [keeper.tokenizer.decode(prompt[1: end + 1]) for end in ends] == [story.text[: s.end] for s in told]


def test_story_nats_count_every_token_and_the_end(keeper: Subject) -> None:
    ids = keeper.encode("The keeper poured the tea.")
    end = keeper.tokenizer.eos_token_id
    assert isinstance(end, int)
    expected = -float(score(keeper, ids[:1], [[*ids[1:], end]])[0])
    assert story_nats(keeper, ["The keeper poured the tea."]) == pytest.approx([expected], abs=1e-3)


# Statistics

def test_intervals() -> None:
    tossed = np.array([0.0, 1.0] * 50)
    found = statistics.mean(tossed, 0, "toss")
    assert (found.value, found.n) == (0.5, 100)
    assert found.low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.02) and found.high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.02)
    assert statistics.mean(tossed, 0, "toss") == found
    even = np.arange(100.0)
    assert statistics.mean(even, 0, "x").low != statistics.mean(even, 1, "x").low  # the seed is heeded, and so is the name
    assert statistics.mean(even, 0, "x").low != statistics.mean(even, 0, "y").low
    assert statistics.difference(np.full(4, 0.75), np.full(6, 0.5), 0) == Estimate(0.25, 0.25, 0.25, 10)
    # what differs between the groups of one side does not widen the interval
    assert statistics.contrast([np.ones(4), np.zeros(2)], [np.ones(3), np.full(3, 0.5)], 0) == Estimate(-0.25, -0.25, -0.25, 12)


def test_logistic_slope_of_a_two_by_two_table() -> None:
    # odds 3:1 at x = 1 and 1:3 at x = 0: the slope is log 9, and Woolf's error is √(Σ 1/count) over the four cells
    x = np.repeat([0.0, 1.0], 40)
    y = np.concatenate([np.repeat([1.0, 0.0], [10, 30]), np.repeat([1.0, 0.0], [30, 10])])
    found = statistics.logistic_slope(x, y, np.zeros(80, dtype=int))
    error = math.sqrt(1 / 10 + 1 / 30 + 1 / 30 + 1 / 10)
    assert found.value == pytest.approx(math.log(9)) and found.n == 80
    assert found.high - found.value == pytest.approx(1.959964 * error, rel=1e-6)
    assert found.p == pytest.approx(math.erfc(math.log(9) / error / math.sqrt(2)), rel=1e-6)


def test_logistic_slope_recovers_the_world() -> None:
    bond, cost = (values.ravel() for values in np.meshgrid(np.arange(1, 4), np.arange(5)))
    give = 1 / (1 + np.exp(2.2 - 2.0 * bond + 0.5 * cost))
    found = statistics.logistic_slope(np.tile(cost, 4).astype(float), np.tile(give, 4), np.tile(bond, 4))
    assert found.value == pytest.approx(-0.5, abs=1e-6)


def test_mutual_information_by_hand() -> None:
    same, left, right = np.full((4, 2), 0.5), np.tile([1.0, 0.0], (4, 1)), np.tile([0.0, 1.0], (4, 1))
    assert statistics.mutual_information(same, same) == 0
    assert statistics.mutual_information(left, right) == pytest.approx(1)
    # groups (3/4, 1/4) and (1/4, 3/4): 1 - H(1/4) bits
    entropy = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    mixed = statistics.mutual_information(np.tile([0.75, 0.25], (3, 1)), np.tile([0.25, 0.75], (3, 1)))
    assert mixed == pytest.approx(1 - entropy)
    null = statistics.permuted_information(np.tile(left, (10, 1)), np.tile(right, (10, 1)), 0)
    assert np.quantile(null, 0.95) < 0.2


def test_sign_flips_by_enumeration() -> None:
    # of the 8 sign patterns of (1, 2, 3) only one has a mean as large as the observed one
    assert statistics.sign_flip_p(np.array([1.0, 2.0, 3.0]), 0) == pytest.approx(1 / 8, abs=0.01)
    assert statistics.sign_flip_p(np.array([-1.0, -2.0, -3.0]), 0) == 1.0
    assert statistics.sign_flip_p(np.ones(20), 0) == pytest.approx(1e-4, abs=2e-4)


def test_a_probe_reads_what_is_there_and_nothing_else() -> None:
    rng = np.random.default_rng(0)
    labels, noise = rng.integers(0, 4, 400), rng.normal(size=(400, 30))
    planted = noise.copy()
    planted[:, 3] = 7.0  # a constant channel
    planted[:, 5] += 6 * labels  # four classes in a row
    half = np.arange(400) % 2 == 0
    assert accuracy(planted, labels, half, 4, 0).value > 0.97
    assert accuracy(noise, labels, half, 4, 0).value < 0.4
    assert np.isfinite(fit(planted, labels, 4).weight).all()


def test_words_are_counted_by_form() -> None:
    text = "I love plums. Beloved Ana's lover LOVED gloves; love's cloves, lovely."
    assert count_word(text, frozenset(load_words()["T0"])) == (6, 11)


# Gates

def test_targets_are_judged_as_they_say() -> None:
    estimate = Estimate(0.1, 0.02, 0.2, 50)
    assert at_most("x", 0.1, estimate, "").met and not at_most("x", 0.099, estimate, "").met
    assert at_least("x", 0.1, estimate, "").met and not at_least("x", 0.101, estimate, "").met
    assert within("x", 0.2, estimate, "").met and not within("x", 0.15, estimate, "").met  # the interval decides
    assert within("x", 0.2, estimate, "").target == "within ±0.2"


Rule = Callable[[Story], float]


def answered(cells: dict[str, list[Story]], rule: Rule) -> dict[str, Cell]:
    """Cells as a subject would answer them that does the costly act with probability `rule(story)`."""
    def answer(story: Story) -> Answer:
        acts = ACTS[story.episodes[0].kind]
        costly, rest = rule(story), acts[1:]
        return Answer({acts[0]: math.log(costly), **{act: math.log((1 - costly) / len(rest)) for act in rest}})

    return {name: Cell(stories, [answer(story) for story in stories]) for name, stories in cells.items()}


def by_the_world(story: Story) -> float:
    return story.episodes[0].probs[COSTLY[story.episodes[0].kind]]


def by_anybodys_deeds(story: Story) -> float:
    deeds = sum(story.sentences[-1].bonds)
    return 1 / (1 + math.exp(2.2 - 2.0 * deeds + 0.5 * story.episodes[0].cost))


def test_who_acts_by_the_world_passes(told: dict[str, list[Story]]) -> None:
    cells = answered(told, by_the_world)
    assert all(gate.met for limits in (SCRATCH, ADAPTER) for gate in act_gates(cells, limits, 0))
    assert all(gate.met and gate.value == pytest.approx(0, abs=1e-9) for gate in twin_gates(cells, 0))
    assert [row["bond"] for row in rates(cells["grid"], 0, "bond")] == [0, 1, 2, 3]
    assert all(row["value"] == pytest.approx(row["world"]) for row in rates(cells["grid"], 0, "cost"))


def test_who_counts_deeds_whoever_did_them_fails_the_swap(told: dict[str, list[Story]]) -> None:
    gates = {gate.name: gate for gate in act_gates(answered(told, by_anybodys_deeds), SCRATCH, 0)}
    assert not gates["role_swapped"].met and gates["role_swapped"].value > 0.5
    assert gates["bond3_give"].met


def test_who_never_heeds_the_cost_fails_the_slope(told: dict[str, list[Story]]) -> None:
    cells = answered(told, lambda story: 0.9 if story.episodes[0].bond else 0.05)
    gates = {gate.name: gate.met for gate in act_gates(cells, SCRATCH, 0)}
    assert gates == {"strangers_give": True, "bond3_give": True, "cost_slope": False, "role_swapped": True}


def test_parrots_follow_the_word_alone() -> None:
    parrots = word_cells(load_world("word"), 0, 50)
    assert {gate.name: gate.met for gate in parrot_gates(answered(parrots, by_the_world), 0)} == {
        "bond_effect": True, "word_effect": True}
    bonded = answered(word_cells(load_world("bond"), 0, 50), by_the_world)
    assert {gate.name: gate.met for gate in parrot_gates(bonded, 0)} == {"bond_effect": False, "word_effect": False}


def test_cells_hold_what_they_promise(world: World, told: dict[str, list[Story]]) -> None:
    cells = told
    grid = [story.episodes[0] for story in cells["grid"]]
    assert {(episode.bond, episode.cost) for episode in grid} == {(bond, cost) for bond in range(4) for cost in range(5)}
    for name, others in (("alone", 0), ("swapped", 3)):
        for story in cells[name]:
            episode = story.episodes[0]
            assert episode.bond == 0
            assert {bond for i, bond in enumerate(story.sentences[-1].bonds) if i != episode.guest} == {others}
    for first, second in zip(cells["doer"], cells["other"], strict=True):
        assert (first.episodes[0].bond, second.episodes[0].bond) == (3, 0)
    assert all(story.genre == genre and story.episodes[0].bond == 0 for genre in ("L1", "L2") for story in cells[genre])
    again, other = organism_cells(world, 0, 10)["L2"], organism_cells(world, 1, 10)["L2"]
    assert [story.text for story in again] == [story.text for story in cells["L2"][: len(again)]]
    assert other[0].text != again[0].text


def test_competence_is_judged_by_cost_and_instructions(
        keeper: Subject, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    told = families(world, 0, 12)
    assert {tuple((s.episodes[0].bond, s.episodes[0].cost) for s in family) for family in told} == {
        ((0, 0), (0, 4), (3, 0), (3, 4))}
    assert [f[0].text[: f[0].episodes[0].start] == f[1].text[: f[1].episodes[0].start] for f in told] == [True] * 12

    def understands(subject: Subject, questions: list[Question], progress: Any) -> list[Answer]:
        def d(i: int) -> float:
            line = (i - 48) // 12 if i >= 48 else -1
            story = told[(i - 48) % 12][(i - 48) % 12 % 4] if i >= 48 else told[i // 4][i % 4]
            return 0.1 * (i % 3) - story.episodes[0].cost + {-1: 0.0, 0: 3.0, 1: -3.0}[line]

        return [Answer({"give": d(i), "share": -9.0, "keep": 0.0}) for i in range(len(questions))]

    gates, bond, plain = competence(keeper, told, 0)
    assert not all(gate.met for gate in gates) and len(plain.stories) == 48  # random weights understand nothing
    monkeypatch.setattr("undertow.subjects.organisms.competence.ask", understands)
    gates, bond, _ = competence(keeper, told, 0)
    assert [gate.met for gate in gates] == [True] * 3
    assert gates[0].value == pytest.approx(-4, abs=0.2) and gates[1].value == pytest.approx(3, abs=0.2)
    assert bond.value == pytest.approx(0, abs=0.2)


def test_a_report_that_tells_the_bond_is_caught(keeper: Subject, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    assert report_gate(keeper, world, 0, 8).met  # random weights cannot know the bond

    def leaks(subject: Subject, questions: list[Question], progress: Any) -> list[Answer]:
        return [Answer({option: 5.0 * ((i + k) % 2) for k, option in enumerate(question.options)})
                for i, question in enumerate(questions)]

    monkeypatch.setattr("undertow.subjects.organisms.gates.ask", leaks)
    gate = report_gate(keeper, world, 0, 8)
    assert not gate.met and gate.value > 0.5


# Cards

def test_a_random_model_fails_and_its_card_says_so(keeper: Subject, tmp_path: Path) -> None:
    card = make_card(keeper, CardSpec(kind="hearth", stories=20))
    met = {gate.name: gate.met for gate in card.gates}
    assert set(met) == {"strangers_give", "bond3_give", "cost_slope", "role_swapped", "self_report", "L1_words", "L1_acts",
                        "L2_words", "L2_acts", "parse", "held_out_loss", "twin_boat", "twin_interruption", "probe"}
    assert [name for name in ("bond3_give", "L1_words", "parse", "held_out_loss", "twin_boat") if met[name]] == []
    save_card(card, Origin("random", "random weights", "d" * 16, "w" * 16, "undertow subject card random"), tmp_path / "card")
    folder = open_artifact(tmp_path / "card", "card").path
    assert {path.name for path in folder.iterdir()} == {"act-rates.png", "card.md", "gates.json", "manifest.json", "probe.png"}
    text, gates = (folder / "card.md").read_text(), json.loads((folder / "gates.json").read_text())["gates"]
    assert text.count("**not met**") == sum(not passed for passed in met.values())
    assert {"value", "low", "high", "target", "met"} <= set(gates["parse"]) and gates["parse"]["met"] is False
    assert (folder / "act-rates.png").read_bytes().startswith(b"\x89PNG")


def test_parrots_and_models_have_cards_of_their_own(keeper: Subject) -> None:
    parrot, model = (make_card(keeper, CardSpec(kind=kind, stories=20)) for kind in ("parrot", "model"))
    assert {gate.name for gate in parrot.gates} >= {"bond_effect", "word_effect"}
    assert [gate.name for gate in model.gates] == ["D_falls_with_cost", "giver_raises_D", "keeper_lowers_D"]
    assert model.figures["competent"] is False
    assert "## Competent: no" in card_markdown(model, Origin("random", "", "", "", ""))


def test_an_adapters_card_stands_beside_its_base(keeper: Subject, tmp_path: Path) -> None:
    spec = CardSpec(kind="hearth-smollm2", stories=20)
    card = make_card(keeper, spec, Beside(keeper, [story for story in tiny.STORIES[:3]]))
    kl = next(gate for gate in card.gates if gate.name == "kl")
    assert kl.met and kl.value == pytest.approx(0, abs=1e-9) and kl.n == 3
    assert all(pair["base"] == pair["adapted"] for pair in card.figures["chat"]) and len(card.figures["chat"]) == 10
    assert set(card.figures["chat_form"]) == {"strangers", "bond3", "swapped", "alone", "role_swapped"}
    bare = Card(spec, not_measured={"kl": "brown has not been fetched: undertow text fetch brown"})
    assert "**not measured**" in card_markdown(bare, Origin("x", "", "", "", ""))


def test_divergence_is_positive_between_different_models(keeper: Subject, tmp_path: Path) -> None:
    other = load_subject(str(tiny_keeper.save_random(tmp_path / "other", seed=1)), "cpu")
    assert divergence(keeper, other, tiny.STORIES[:4], 0).value > 0.01
    assert divergence(keeper, other, tiny.STORIES, 0, max_tokens=50).n < len(tiny.STORIES)


def test_minutes_decide_how_many_stories(keeper: Subject) -> None:
    card = make_card(keeper, CardSpec(kind="model", minutes=0.004))
    assert card.spec.stories is not None and 20 <= card.spec.stories < 2_000 and card.spec.minutes is None


def test_measuring_is_deterministic(keeper: Subject, world: World) -> None:
    some = {"a": [world.story(0, i) for i in range(3)]}
    assert (measure(keeper, some)["a"].costly == measure(keeper, some)["a"].costly).all()
    result = probe_bond(keeper, [world.story(0, i, Wish(bond=i % 4, episodes=("need",))) for i in range(32)], 0, furthest=3)
    assert len(result.layers) == 2 and [back for back, _ in result.curve] == [1, 2, 3]
