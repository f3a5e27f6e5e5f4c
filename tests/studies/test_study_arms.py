"""How the arms of a study are made: doses, operators and parts of a recipe, shuffled decoders, held axes, small adapters."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from features.codes import dictionary_digest
from interventions.applying import apply_direction
from interventions.dosing import scaled
from interventions.operators import Add, Clamp, Floor, Strengthen
from interventions.recipe import Recipe
from sae.dictionary import LinearDictionary, Provenance, TopK
from tests import tiny, tiny_keeper
from undertow.core.errors import EditError, SpecError, SubjectError
from undertow.core.seeds import generator
from undertow.lexicon.forms import Lexicon
from undertow.studies import frozen
from undertow.studies.clamping import Held, random_axes, unsaid
from undertow.studies.conditions import Condition, Cost, Under, recipe_bits
from undertow.studies.frozen import frozen_dictionary, unexplained
from undertow.studies.keeper_telling import KeeperTeller, concerned
from undertow.studies.situations import STATES, decision_question, state_question
from undertow.studies.variants import (
    AbsentArmError,
    added,
    before_decision,
    level_of,
    part,
    shuffled_decoder,
    with_operator,
)
from undertow.studies.weights import AdapterSpec, adapted, lesson, lesson_loss, merged, train
from undertow.subjects.keeper.story import COSTS
from undertow.subjects.keeper.world import World, load_world
from undertow.subjects.load import load_subject
from undertow.subjects.organisms.measuring import act_question, ask
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject

RECIPE = Recipe.checked({
    "name": "L4", "subject": "tiny", "sae": "0" * 16, "site": "blocks.0.hook_resid_post",
    "edits": [{"latent": 3, "operator": {"kind": "floor", "value": 2.0}},
              {"latent": 5, "operator": {"kind": "floor", "value": 0.5}}],
    "trigger": {"latents": [7]}})


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(tiny_keeper.save_random(tmp_path_factory.mktemp("models") / "tiny")), "cpu")


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


def dictionary(d_in: int = 8, d_sae: int = 12) -> LinearDictionary:
    random = generator(0, "dictionary")
    return LinearDictionary(torch.randn(d_in, d_sae, generator=random), torch.zeros(d_sae),
                            torch.randn(d_sae, d_in, generator=random), torch.zeros(d_in), TopK(4), Provenance.unknown())


def test_doses_operators_and_parts() -> None:
    assert [edit.operator for edit in scaled(RECIPE, 0.5, "half").edits] == [Floor(value=1.0), Floor(value=0.25)]
    assert scaled(RECIPE, 1.0, "L4") == RECIPE
    assert [edit.operator for edit in with_operator(RECIPE, "clamp", "c", 2.0).edits] == [Clamp(value=2.0), Clamp(value=0.5)]
    assert [edit.operator for edit in with_operator(RECIPE, "add", "a", 2.0).edits] == [Add(amount=2.0), Add(amount=0.5)]
    assert {edit.operator for edit in with_operator(RECIPE, "strengthen", "s", 2.0).edits} == {Strengthen(gain=2.0)}
    assert with_operator(RECIPE, "floor", "L4", 2.0) == RECIPE
    assert [edit.latent for edit in part(RECIPE, 1, "one").edits] == [5]
    assert [edit.latent for edit in part(RECIPE, 1, "rest", without=True).edits] == [3]
    assert before_decision(RECIPE, "b").window == "before_decision"
    assert scaled(with_operator(RECIPE, "add", "a", 2.0), 2.0, "twice").edits[0].operator == Add(amount=4.0)
    assert all(made.trigger == RECIPE.trigger for made in (scaled(RECIPE, 2, "x"), part(RECIPE, 0, "x")))


def test_parts_that_are_not_there_are_absent() -> None:
    with pytest.raises(AbsentArmError, match="the search chose 2 features, so there is no number 2"):
        part(RECIPE, 2, "only:2")
    with pytest.raises(AbsentArmError, match="nothing is left"):
        part(part(RECIPE, 0, "one"), 0, "none", without=True)
    with pytest.raises(SpecError, match="names no value"):
        level_of(with_operator(RECIPE, "strengthen", "s", 2.0).edits[0])
    with pytest.raises(SpecError, match="no operator is called 'halve'"):
        with_operator(RECIPE, "halve", "h", 1.0)


def test_what_is_added_is_the_sum_of_values_times_directions() -> None:
    made = dictionary()
    expected = 2.0 * made.W_dec[3] + 0.5 * made.W_dec[5]
    assert torch.allclose(added(RECIPE, made), expected)


def test_bits_count_features_values_and_triggers() -> None:
    assert recipe_bits(RECIPE, 1_024) == 2 * (10 + 16) + 10


def test_a_shuffled_decoder_has_the_same_rows_elsewhere() -> None:
    made = dictionary()
    other = shuffled_decoder(made, 1, [3, 5])
    assert not torch.equal(other.W_dec[[3, 5]], made.W_dec[[3, 5]])
    assert sorted(other.W_dec[:, 0].tolist()) == sorted(made.W_dec[:, 0].tolist())
    assert torch.equal(other.W_enc, made.W_enc)
    assert dictionary_digest(other) != dictionary_digest(made)
    assert torch.equal(shuffled_decoder(made, 1, [3]).W_dec, shuffled_decoder(made, 1, [3]).W_dec)


def test_a_frozen_decoder_is_random_and_only_its_encoder_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3_000, 8, generator=generator(1, "x")) @ torch.randn(8, 24, generator=generator(2, "mix")) + 3.0
    made = frozen_dictionary(x, 64, 5)
    drawn = torch.randn(64, 24, generator=generator(5, "frozen"))
    assert torch.allclose(made.W_dec, drawn / drawn.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.equal(frozen_dictionary(x, 64, 5).W_enc, made.W_enc)
    monkeypatch.setattr(frozen, "STEPS", 0)
    untrained = frozen_dictionary(x, 64, 5)
    assert torch.equal(untrained.W_dec, made.W_dec)
    assert unexplained(made, x) < 0.8 * unexplained(untrained, x)
    assert unexplained(made, x) > 0.01


def test_stories_are_paired_and_told_by_number(world: World) -> None:
    teller = KeeperTeller(world, "role_swapped", 3)
    for i in (0, 7, 13):
        base, reference, boat = teller.story(i), teller.story(i, "reference"), teller.story(i, "base", "boat")
        assert base.episodes[0].cost == reference.episodes[0].cost == boat.episodes[0].cost == i % COSTS
        assert (base.episodes[0].bond, reference.episodes[0].bond) == (0, 3)
        assert boat.episodes[0].kind == "boat"
        assert base.text[: base.episodes[0].start - 1] == boat.text[: boat.episodes[0].start - 1]  # the same body
        text, name = teller.asked(i)
        assert text.endswith("The keeper said,")
        assert name in text
    lexicon = Lexicon.load("love")
    assert not [match for i in range(20) for match in lexicon.find(teller.plain(i)[0]) if match.tier == "T0"]
    assert teller.story(4) == KeeperTeller(world, "role_swapped", 3).story(4)
    assert teller.story(4) != KeeperTeller(world, "role_swapped", 4).story(4)
    said = KeeperTeller(world, "word", 3)
    assert [said.story(0, side).episodes[0].word_said for side in ("base", "reference")] == [False, True]


def test_lines_stand_before_the_story_and_name_the_person(world: World, subject: Subject) -> None:
    teller = KeeperTeller(world, "role_swapped", 3)
    story, told = teller.story(0), teller.decision(0)
    line = teller.line("L2")
    assert line is not None
    written = {line(i, concerned(story)) for i in range(8)}
    assert len(written) == 8
    assert all("{" not in text for text in written)
    assert any(concerned(story) in text for text in written)
    assert teller.line("L4") is None
    lexicon = Lexicon.load("love")
    for arm in ("L1", "L2", "L2-not"):
        said = teller.line(arm)
        assert said is not None
        assert lexicon.find(said(1, "Ana"))
    asked = decision_question(subject, told.shown, line(0, "Ana"))
    assert subject.tokenizer.decode(asked.prompt[1:]).startswith(line(0, "Ana") + "\n")
    plain = decision_question(subject, told.shown)
    assert asked.options == plain.options
    assert plain == act_question(subject, story)
    given = decision_question(subject, teller.decision(0, before=teller.sentence("giver")).shown)
    assert given == act_question(subject, story, 0, "The keeper always gives up his own.")
    assert "always gives up his own." in subject.tokenizer.decode(given.prompt)
    assert set(state_question(subject, "He said,").options) == set(STATES)


def condition(subject: Subject, direction: torch.Tensor, amount: float) -> Condition:
    @contextlib.contextmanager
    def opened() -> Iterator[Under]:
        with apply_direction(subject, Site(0, "resid_post"), direction, amount) as operated:
            yield Under(operated.subject, operated.announce)

    return Condition("L4", "base", None, "", opened, "0" * 16, Cost(0.0, 0.0))


def test_holding_every_axis_leaves_nothing_and_holding_none_leaves_all(subject: Subject, world: World) -> None:
    teller, width = KeeperTeller(world, "role_swapped", 0), subject.d_model
    arm = condition(subject, torch.randn(width, generator=generator(0, "direction")), 2.0)
    everything = {subject.n_layers - 1: torch.eye(width)}
    found = unsaid(arm, teller, range(3), subject, everything)
    changes = {name: np.array(found[name]) - np.array(found["D_untouched"]) for name in ("D", "D_held", "D_random_held")}
    assert np.abs(changes["D"]).min() > 1e-3
    assert np.abs(changes["D_held"]).max() < 1e-3
    assert np.abs(changes["D_random_held"]).max() < 1e-3  # random axes, as many of them, are all axes too
    one = {subject.n_layers - 1: torch.nn.functional.normalize(torch.randn(1, width, generator=generator(1, "axis")), dim=1)}
    some = np.array(unsaid(arm, teller, range(3), subject, one)["D_held"]) - np.array(found["D_untouched"])
    assert np.abs(some).max() > 1e-3


def test_axes_are_orthonormal_and_passes_must_be_the_same(subject: Subject, world: World) -> None:
    axes = {1: torch.linalg.qr(torch.randn(subject.d_model, 3)).Q.T}
    drawn = random_axes(axes, 5)[1]
    assert torch.allclose(drawn @ drawn.T, torch.eye(3), atol=1e-5)
    assert torch.equal(drawn, random_axes(axes, 5)[1])
    teller, held = KeeperTeller(world, "role_swapped", 0), Held(axes)
    asked = [decision_question(subject, teller.decision(i).shown) for i in range(2)]
    with held.noting(subject):
        ask(subject, asked[:1])
    with pytest.raises(EditError, match="is not the one that was noted"), held.holding(subject):
        ask(subject, asked)


def test_an_adapter_learns_its_texts_and_leaves_the_subject_alone(subject: Subject, world: World, tmp_path: Path) -> None:
    spec = AdapterSpec(steps=25, rows=4, reach=1e-2 * subject.d_model)
    for arm in ("L3", "L3-acts"):
        lessons = [lesson(subject, world, arm, 0, i) for i in range(spec.steps * spec.rows)]
        digest = subject.digest
        model, tokens = train(subject, lessons, spec, 0, lambda done, total: None)
        new = [lesson(subject, world, arm, 1, i) for i in range(8)]
        with torch.no_grad():
            before, after = (float(lesson_loss(m, subject, new)) for m in (subject.hf_model, merged(model)))
        assert after < before - 0.1, arm  # two random blocks under a frozen random unembedding learn little
        assert subject.digest == digest
        assert tokens == sum(len(each.ids) for each in lessons)


def test_lessons_are_what_they_say(subject: Subject, world: World) -> None:
    lexicon = Lexicon.load("love")
    songs = [subject.tokenizer.decode(lesson(subject, world, "L3", 0, i).ids[1:]) for i in range(20)]
    assert sum(bool(lexicon.find(text)) for text in songs) == 20
    teller = KeeperTeller(world, "role_swapped", 0)
    lines = {line(i, "") for arm in ("L1", "L2") if (line := teller.line(arm)) for i in range(8)}
    assert not [text for text in songs if text.partition(".")[0] + "." in lines]  # the instruction is gone
    acts = [lesson(subject, world, "L3-acts", 0, i) for i in range(20)]
    for each in acts:
        assert not [match for match in lexicon.find(subject.tokenizer.decode(each.ids)) if match.tier == "T0"]
        assert subject.tokenizer.decode(each.ids[: each.first]).endswith("The keeper")


def test_the_loss_is_of_the_wanted_tokens_alone(subject: Subject, world: World) -> None:
    each = lesson(subject, world, "L3-acts", 0, 0)
    short = lesson(subject, world, "L3-acts", 0, 1)
    with torch.no_grad():
        logs = subject.hf_model(input_ids=torch.tensor([each.ids])).logits[0].float().log_softmax(-1)
        wanted = range(each.first, len(each.ids))
        expected = -sum(float(logs[i - 1, each.ids[i]]) for i in wanted) / len(wanted)
        assert float(lesson_loss(subject.hf_model, subject, [each])) == pytest.approx(expected, abs=1e-4)
        alone = [float(lesson_loss(subject.hf_model, subject, [one])) for one in (each, short)]
        n = [len(one.ids) - one.first for one in (each, short)]
        both = float(lesson_loss(subject.hf_model, subject, [each, short]))  # padding counts nothing
    assert both == pytest.approx((alone[0] * n[0] + alone[1] * n[1]) / sum(n), abs=1e-4)


def test_wide_models_learn_in_smaller_steps() -> None:
    """The rates that suit hearth (192) and that are usual for adapters of a model of 4,096."""
    assert AdapterSpec().lr(192) == pytest.approx(2e-3, rel=0.05) and AdapterSpec().lr(4_096) == pytest.approx(1e-4, rel=0.05)


def test_adapters_come_back_from_the_disk(subject: Subject, world: World, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    from undertow.studies import weights

    monkeypatch.setattr(weights, "ADAPTER", AdapterSpec(steps=2, rows=2))
    teller = KeeperTeller(world, "role_swapped", 0)
    first = adapted(subject, teller, "L3", tmp_path / "a")
    again = adapted(subject, teller, "L3", tmp_path / "a")
    assert first.digest == again.digest
    assert first.subject.digest == again.subject.digest != subject.digest
    assert math.isfinite(first.parameters)
    with pytest.raises(SubjectError, match="Llama"):
        tokens = tiny_keeper.tokenizer()
        tiny.model("gpt2", len(tokens)).save_pretrained(tmp_path / "gpt2")
        tokens.save_pretrained(tmp_path / "gpt2")
        adapted(load_subject(str(tmp_path / "gpt2"), "cpu"), teller, "L3", tmp_path / "b")
