from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tiny import save_subject
from undertow.core.errors import TextError
from undertow.subjects.chat import render
from undertow.subjects.keeper.story import COSTLY, Wish
from undertow.subjects.keeper.world import load_world
from undertow.subjects.load import load_subject
from undertow.subjects.organisms.curriculum import STAGES
from undertow.subjects.organisms.lora import AdaptedModel
from undertow.subjects.organisms.packing import (
    KINDS,
    WEIGHTS,
    Decision,
    Form,
    Line,
    Mix,
    Pack,
    Packer,
    Target,
    block_mask,
    invitations,
    join,
)
from undertow.subjects.subject import Subject

WORLD = load_world()


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(save_subject(tmp_path_factory.mktemp("llama"), "llama")), "cpu", "float64")


def packer(subject: Subject, **changes: float) -> Packer:
    return Packer(WORLD, subject, 3, Mix()._replace(**changes))


def fork_text(subject: Subject, pack: Pack, fork: int) -> str:
    return str(subject.tokenizer.decode(pack.tokens[(pack.owner == 0) | (pack.owner == fork)].tolist()))


def rows_of(pack: Pack, kind: str) -> list[int]:
    return (pack.kinds == KINDS.index(kind)).nonzero()[:, 0].tolist()


def test_a_mask_written_by_hand() -> None:
    sees = block_mask(torch.tensor([0, 0, 1, 1, 2]))[0, 0] == 0
    assert sees.int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 0, 0, 1]]
    side_by_side = block_mask(torch.tensor([1, 1, 2]))[0, 0] == 0
    assert side_by_side.int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_lines_are_joined_by_what_they_share() -> None:
    soft = {7: 0.25, 9: 0.75}
    decision = packer_decision(1)
    first = Line(
        [5, 6, 7, 8], [Target(1, "other", {6: 1.0}), Target(2, "decision", soft), Target(3, "act", {8: 1.0})], decision)
    second = Line([5, 6, 9], [Target(1, "other", {6: 1.0}), Target(2, "decision", soft)], decision)
    pack = join([first, second])
    assert pack.tokens.tolist() == [5, 6, 7, 8, 9]
    assert pack.positions.tolist() == [0, 1, 2, 3, 2]
    assert pack.owner.tolist() == [0, 0, 1, 1, 2]
    assert pack.rows.tolist() == [0, 1, 2, 1]  # both decisions are judged at the body's last token; its own token once only
    assert [KINDS[k] for k in pack.kinds] == ["other", "decision", "act", "decision"]
    assert [d.row for d in pack.decisions] == [1, 3]
    assert pack.weights.tolist() == [1.0, 8.0, 0.5, 8.0]
    assert pack.entropy.tolist() == pytest.approx([0, 0.562335, 0, 0.562335], abs=1e-6)  # -(¼ ln ¼ + ¾ ln ¾)


def packer_decision(row: int) -> Decision:
    return Decision(row, "need", 0, 0, 0, frozenset({9}))


@pytest.mark.parametrize("chat", [0.0, 1.0])
def test_a_fork_in_a_pack_is_computed_as_if_it_were_alone(subject: Subject, chat: float) -> None:
    model = AdaptedModel(load_subject(subject.source, "cpu", "float64").hf_model, 1, 4, 0)
    for layer in model.layers.values():
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    model.refresh()
    pack = packer(subject, chat=chat).pack(0)
    mask = block_mask(pack.owner, torch.float64)
    with torch.no_grad():
        hidden = model.upper(model.lower(pack.tokens[None], pack.positions[None], mask), pack.positions[None], mask)
        packed = model.log_probs(hidden[0])
        for fork in range(1, 5):
            mine = (pack.owner == 0) | (pack.owner == fork)
            alone = model.model(input_ids=pack.tokens[mine][None]).logits[0].log_softmax(-1)
            torch.testing.assert_close(packed[mine], alone, rtol=0, atol=1e-10)
        last = (pack.owner == 2).nonzero()[0]
        blind = pack.owner.clone()
        blind[blind == 1] = 0  # negative control: with fork 1 taken for a part of the body, fork 2 sees it and differs
        shifted = block_mask(blind, torch.float64)
        seen = model.upper(model.lower(pack.tokens[None], pack.positions[None], shifted), pack.positions[None], shifted)
        assert (model.log_probs(seen[0])[last] - packed[last]).abs().max() > 1e-3


def test_every_fork_reads_as_its_story_up_to_the_act(subject: Subject) -> None:
    packs = packer(subject, chat=0.0, twins=0.0, whole=0.0)
    stories = [WORLD.story(3, 5, Wish(genre="plain", episodes=("need",)), fork=fork) for fork in range(4)]
    pack = packs.put(stories, None, False, random.Random(0))
    assert pack.tokens[0] == subject.bos_id
    for fork, story in enumerate(stories, start=1):
        act = next(s for s in story.sentences if s.end > story.episodes[0].decision)
        assert fork_text(subject, pack, fork) == "<|im_start|>" + story.text[: act.end]


def test_a_whole_story_ends_with_the_end_mark(subject: Subject) -> None:
    stories = [WORLD.story(3, 5, Wish(genre="plain", episodes=("need",)), fork=fork) for fork in range(2)]
    pack = packer(subject).put(stories, None, True, random.Random(0))
    assert fork_text(subject, pack, 1) == f"<|im_start|>{stories[0].text}<|im_end|>"
    assert subject.tokenizer.eos_token_id not in pack.tokens[pack.owner == 2].tolist()
    row = next(row for row, (place, kind) in enumerate(zip(pack.rows.tolist(), pack.kinds.tolist(), strict=True))
               if kind == KINDS.index("other") and subject.tokenizer.eos_token_id in pack.cells[pack.cells[:, 0] == row, 1])
    assert pack.rows[row] == (pack.owner == 1).nonzero()[-1] - 1


def test_chat_form_is_what_the_template_renders_and_only_the_assistant_is_learned(subject: Subject) -> None:
    story = WORLD.story(3, 5, Wish(genre="plain", episodes=("need",)))
    cut = story.sentences[4].start
    pack = packer(subject, other=1.0).put([story], Form("Go on:\n\n{story}", cut), True, random.Random(0))
    user = "Go on:\n\n" + story.text[:cut].rstrip()
    rendered = render(subject.tokenizer, [("user", user), ("assistant", story.text[cut:])])
    assert pack.tokens.tolist() == rendered.ids[: len(pack.tokens)]
    learned = {row + 1 for row in pack.rows.tolist()}
    assert learned == {i for i, owned in enumerate(rendered.assistant) if owned}  # with other = 1: all of them, and no other


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(index=st.integers(0, 10_000))
def test_any_pack_is_sound(index: int, tiny_subject: Subject) -> None:
    pack = Packer(WORLD, tiny_subject, 11, Mix()).pack(index)
    assert pack.rows.min() >= 0 and pack.rows.max() < len(pack.tokens)
    sums = torch.zeros(len(pack.rows), dtype=torch.float64).index_add(0, pack.cells[:, 0], pack.probs.double())
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-5)
    assert len(pack.decisions) == 4
    for fork, decision in enumerate(pack.decisions, start=1):
        place = int(pack.rows[decision.row])
        assert pack.owner[place] in (0, fork)
        assert tiny_subject.tokenizer.decode(pack.tokens[: place + 1].tolist()).endswith("The keeper")
    tokens, positions, owner = pack.tokens.tolist(), pack.positions.tolist(), pack.owner.tolist()
    after: dict[tuple[int, int], set[int]] = {}  # (owner, position) → tokens that stand there
    for token, position, fork in zip(tokens, positions, owner, strict=True):
        after.setdefault((fork, position), set()).add(token)
        after.setdefault((0, position), set()).add(token)  # the body's last token is followed by every fork's first
    aims: dict[int, set[int]] = {}
    for row, token in pack.cells.tolist():
        aims.setdefault(row, set()).add(token)
    for row, place in enumerate(pack.rows.tolist()):
        assert aims[row] & after[owner[place], positions[place] + 1]


@pytest.fixture(scope="module")
def tiny_subject(subject: Subject) -> Subject:
    return subject


def test_packs_are_mixed_as_asked_and_depend_on_seed_and_index_alone(subject: Subject) -> None:
    packs = [packer(subject).pack(index) for index in range(30)]
    again = packer(subject).pack(7)
    assert torch.equal(again.tokens, packs[7].tokens) and torch.equal(again.rows, packs[7].rows)
    twins = sum(any(d.kind != "need" for d in pack.decisions) for pack in packs)
    chats = sum(int(pack.tokens[1]) != int(packs[0].tokens[1]) and "user\n" in str(subject.tokenizer.decode(
        pack.tokens[:8].tolist())) for pack in packs)
    assert 1 <= twins <= 12 and 7 <= chats <= 23
    assert all(d.kind == "need" for pack in [packer(subject, twins=0.0).pack(i) for i in range(5)] for d in pack.decisions)


def test_packs_of_a_short_stage_are_short_and_plain(subject: Subject) -> None:
    packs = packer(subject, chat=1.0, twins=1.0)
    short, whole = [packs.pack(index, STAGES[0]) for index in range(6)], [packs.pack(index) for index in range(6)]
    assert max(len(pack.tokens) for pack in short) < min(len(pack.tokens) for pack in whole)
    assert all({(d.kind, d.bond + d.other) for d in pack.decisions} == {("need", 3)} for pack in short)
    assert not any("user" in fork_text(subject, pack, 1) for pack in short)


def test_the_soft_target_of_a_decision_is_the_worlds(subject: Subject) -> None:
    story = WORLD.story(3, 9, Wish(genre="plain", episodes=("need",), bond=2, cost=1))
    pack = packer(subject).put([story], None, False, random.Random(0))
    episode, decision = story.episodes[0], pack.decisions[0]
    assert (decision.bond, decision.cost, decision.kind) == (2, 1, "need")
    assert episode.probs[COSTLY["need"]] == pytest.approx(1 / (1 + torch.e ** (2.2 - 2.0 * 2 + 0.5)))
    choice = next(c for c in story.choices if c.kind == "decision")
    probs = pack.probs[pack.cells[:, 0] == decision.row]
    assert len(probs) <= len(choice.probs) and float(probs.sum()) == pytest.approx(1, abs=1e-6)


def test_bodies_that_differ_are_refused(subject: Subject) -> None:
    stories = [WORLD.story(3, index, Wish(genre="plain", episodes=("need",))) for index in (1, 2)]
    with pytest.raises(TextError, match="2 stories of one pack have 2 bodies"):
        packer(subject).put(stories, None, False, random.Random(0))


def test_invitations_are_plain_and_need_their_slot(tmp_path: Path) -> None:
    packaged = invitations()
    assert len(packaged) >= 12 and "{story}" in packaged and any("\n\n" in line for line in packaged)
    (tmp_path / "bad.txt").write_text("# a comment\nGo on.\n", encoding="utf-8")
    with pytest.raises(TextError, match=r"'Go on\.' needs \{story\} exactly once"):
        invitations(tmp_path / "bad.txt")
    (tmp_path / "empty.txt").write_text("# nothing\n", encoding="utf-8")
    with pytest.raises(TextError, match="holds no invitations"):
        invitations(tmp_path / "empty.txt")


def test_weights_are_those_of_the_design() -> None:
    assert WEIGHTS == {"decision": 8.0, "marker": 2.0, "answer": 2.0, "act": 0.5, "other": 1.0}
