"""Training from nothing: the hand-made gradient, resuming, what a run leaves behind, and that it learns what it should."""

from __future__ import annotations

import json
import math
from functools import cache, cached_property
from pathlib import Path
from typing import Any, final

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from undertow.core.errors import ArtifactError, NumericsError, SpecError
from undertow.core.seeds import derive_seed
from undertow.core.storage import open_artifact
from undertow.subjects.keeper.story import Choice, Story
from undertow.subjects.keeper.world import World, load_world
from undertow.subjects.load import load_subject
from undertow.subjects.organisms import pretrain_run, pretraining
from undertow.subjects.organisms.encoding import Encoded, Soft, essentials
from undertow.subjects.organisms.pretrain_run import (
    KIND,
    Stopped,
    Watch,
    estimate_seconds,
    held_out_loss,
    log_line,
    partial_folder,
    pretrain,
    rounded,
    thinned,
    unfinished,
)
from undertow.subjects.organisms.pretraining import PretrainSpec, Rows, StepReport, Trainer, head_loss, new_model, rows_of
from undertow.subjects.organisms.tokenizer import train_tokenizer
from undertow.subjects.organisms.wiring import held

QUIET = Watch(lambda _phase, _done, _total: None, lambda: False)


@final
class CoinWorld:
    """A world of one sentence: the keeper gives with probability 0.7, and all else is certain."""

    @cached_property
    def digest(self) -> str:
        return "coin"

    def story(self, seed: int, index: int) -> Story:
        give = (seed + 7919 * index) % 1000 < 700
        text = f"The keeper {'gave' if give else 'kept'} bread."
        choice = Choice("decision", 10, {" gave": 0.7, " kept": 0.3})
        return Story(text, "plain", (), (), (), (choice,), -math.log(0.7 if give else 0.3))


@final
class RollWorld:
    """A world that calls the roll, one name a story."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    @cached_property
    def digest(self) -> str:
        return "roll"

    def story(self, seed: int, index: int) -> Story:
        return Story(f"The keeper met {self.names[index % len(self.names)]}.", "plain", (), (), (), (), 0.0)


def tiny_spec(**changes: Any) -> PretrainSpec:
    values: dict[str, Any] = {"name": "hearth", "d_model": 16, "n_layers": 2, "n_heads": 2, "d_mlp": 24, "vocab": 400,
                              "steps": 6, "batch": 6, "lr": 3e-3}
    return PretrainSpec(**(values | changes))


@cache
def world() -> World:
    return load_world()


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(world(), 0, 400, 50)


def trainer_of(spec: PretrainSpec) -> Trainer:
    return Trainer(spec, world(), tokenizer(), new_model(spec, tokenizer()))


def weights_of(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


def two_stories() -> list[Encoded]:
    return [Encoded([0, 5, 6, 1], [0.0, 1.0, 8.0, 1.0], [Soft(2, (6, 7), (0.75, 0.25))], [None, None, "decision", None]),
            Encoded([0, 9, 1], [0.0, 3.0, 1.0], [], [None, "answer", None])]


def test_rows_of_two_stories() -> None:
    rows = rows_of(two_stories(), pad_id=2)
    assert rows.ids.tolist() == [[0, 5, 6, 1] + [2] * 28, [0, 9, 1] + [2] * 29]  # a multiple of 32
    assert rows.states.tolist() == [0, 1, 2, 32, 33]  # the state at a token predicts the next one
    assert rows.tokens.tolist() == [5, 6, 1, 9, 1]
    assert rows.weights.tolist() == [1, 8, 1, 3, 1]
    assert rows.kinds.tolist() == [0, 1, 0, 3, 0]
    assert list(zip(rows.rows.tolist(), rows.entries.tolist(), rows.probs.tolist(), strict=True)) == [
        (0, 5, 1.0), (1, 6, 0.75), (1, 7, 0.25), (2, 1, 1.0), (3, 9, 1.0), (4, 1, 1.0)]


@given(n=st.integers(1, 12), seed=st.integers(0, 1000))
def test_the_gradient_made_by_hand_is_autograds(n: int, seed: int) -> None:
    """Losses and gradients agree with a dense target matrix and autograd, whichever way the tokens fall into chunks."""
    source = torch.Generator().manual_seed(seed)
    vocab, d = 11, 6
    states = torch.randn(n, d, generator=source).requires_grad_()
    weight = torch.randn(vocab, d, generator=source).requires_grad_()
    scale = torch.rand(n, generator=source)
    dense = torch.rand(n, vocab, generator=source) * (torch.rand(n, vocab, generator=source) < 0.5)
    dense[:, 0] += 0.1
    dense /= dense.sum(dim=1, keepdim=True)
    at = dense.nonzero()
    tokens = torch.randint(vocab, (n,), generator=source)
    rows = Rows(torch.zeros(1, n, dtype=torch.long), torch.arange(n), tokens, scale, torch.zeros(n, dtype=torch.long),
                at[:, 0], at[:, 1], dense[at[:, 0], at[:, 1]])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(pretraining, "CHUNK", 4)
        found = head_loss(states.detach(), weight.detach(), rows, scale)
    logits = states @ weight.T
    soft = torch.nn.functional.cross_entropy(logits, dense, reduction="none")
    (scale * soft).sum().backward()
    hard = torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
    for made, wanted in ((found.soft, soft), (found.hard, hard), (found.d_states, states.grad), (found.d_weight, weight.grad)):
        assert wanted is not None
        torch.testing.assert_close(made, wanted.detach(), atol=1e-5, rtol=1e-4)


def test_a_step_is_that_of_plain_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step's gradients, over groups of padded stories, are those of each story alone through the whole model."""
    monkeypatch.setattr(pretraining, "product_dtype", lambda _model: torch.float32)
    trainer, plain = trainer_of(tiny_spec(batch=5)), new_model(tiny_spec(), tokenizer())
    stories = trainer.stories(0)
    total = sum(sum(story.weights) for story in stories)
    for story in stories:
        logits = plain(input_ids=torch.tensor([story.ids])).logits[0, :-1]
        target = torch.nn.functional.one_hot(torch.tensor(story.ids[1:]), logits.shape[1]).float()
        for soft in story.soft:
            row = target[soft.position - 1].zero_()
            row[list(soft.ids)] = torch.tensor(soft.probs)
        loss = torch.nn.functional.cross_entropy(logits, target, reduction="none")
        (loss @ torch.tensor(story.weights[1:]) / total).backward()
    named = dict(trainer.model.named_parameters())
    kept: dict[str, torch.Tensor] = {}

    def keep(*_args: object, **_options: object) -> None:
        kept.update({name: p.grad.clone() for name, p in named.items() if p.grad is not None})

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep)
    trainer.step()
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert kept.keys() == wanted.keys() == named.keys()
    masks = held(plain)
    for name, gradient in wanted.items():
        if name in masks:
            gradient.masked_fill_(masks[name], 0.0)
        torch.testing.assert_close(kept[name], gradient, atol=1e-5, rtol=1e-3, msg=name)


def test_learning_rate() -> None:
    spec = tiny_spec(steps=125, lr=1.0)  # 5 steps up, 120 down
    assert [spec.lr_at(step) for step in (0, 4, 5)] == pytest.approx([0.2, 1.0, 1.0])
    assert [spec.lr_at(step) for step in (45, 65)] == pytest.approx([0.75, 0.5])  # a third and a half of the way down
    assert 0 < spec.lr_at(124) < 1e-3


def test_learning_rate_of_polishing() -> None:
    spec = tiny_spec(steps=250, lr=1.0, polish=0.5)
    assert spec.first_steps == 125
    assert [spec.lr_at(step) for step in (0, 65, 125, 190)] == pytest.approx([0.2, 0.5, 0.1, 0.25])


def test_polishing_begins_anew_from_rounded_weights_with_muon(tmp_path: Path) -> None:
    """It goes on as from packaged weights, whether or not it was stopped, at the turn or after it."""
    spec = tiny_spec(steps=6, polish=0.5)
    whole = trainer_of(spec)
    for step in range(6):
        whole.save(tmp_path / f"{step}.safetensors")
        whole.step()
    for step in (2, 3, 4):
        rest = trainer_of(spec)
        rest.restore(tmp_path / f"{step}.safetensors")
        while not rest.finished:
            rest.step()
        assert_same(weights_of(whole.model), weights_of(rest.model))
    packaged = trainer_of(spec)
    packaged.restore(tmp_path / "3.safetensors")
    packaged.model.load_state_dict(rounded(packaged.model).state_dict())
    while not packaged.finished:
        packaged.step()
    assert_same(weights_of(whole.model), weights_of(packaged.model))
    with safe_open(tmp_path / "4.safetensors", "pt") as file:
        names = list(file.keys())
    assert {name.split(".")[0] for name in names} == {"model", "adam", "muon"}
    assert {name.rsplit(".", 2)[1] for name in names if name.startswith("muon.")} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_polishing_weighs_needs_and_acts_more() -> None:
    plain, polished = ([story.weights for story in trainer_of(tiny_spec(steps=3, polish=polish)).stories(2)]
                       for polish in (0.0, 0.5))
    pairs = [pair for one, two in zip(plain, polished, strict=True) for pair in zip(one, two, strict=True)]
    assert set(pairs) == {(0, 0), (1, 1), (1, 3), (3, 3), (8, 8)}


def test_wired_heads_are_held_while_it_is_polished() -> None:
    trainer = trainer_of(tiny_spec(steps=2, polish=0.5))
    before = weights_of(rounded(trainer.model))
    trainer.step()
    trainer.step()
    after = weights_of(rounded(trainer.model))
    for name, mask in held(trainer.model).items():
        assert torch.equal(before[name][mask], after[name][mask]), name
        assert mask.all() or not torch.equal(before[name][~mask], after[name][~mask]), name


def test_first_weights_follow_the_seed_alone() -> None:
    torch.rand(1)
    before = torch.get_rng_state()
    first = weights_of(new_model(tiny_spec(seed=1), tokenizer()))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert_same(first, weights_of(new_model(tiny_spec(seed=1), tokenizer())))
    other = weights_of(new_model(tiny_spec(seed=2), tokenizer()))
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_early_steps_see_what_bears_on_the_acts_of_more_stories() -> None:
    trainer = trainer_of(tiny_spec(batch=2, short_steps=1))
    short, full = trainer.stories(0), trainer.stories(1)
    assert (len(short), len(full)) == (4, 2)
    assert full == trainer_of(tiny_spec(batch=2)).stories(1)
    stream = derive_seed(derive_seed(0, "train"), "short")
    told = [essentials(world().story(stream, index)).text for index in range(4)]
    assert sorted(tokenizer().decode(story.ids[1:-1]) for story in short) == sorted(told)
    assert max(len(story.ids) for story in short) < min(len(story.ids) for story in full)
    trainer.step()
    trainer.step()
    assert trainer.step_number == 2


def test_every_step_has_stories_of_its_own() -> None:
    trainer = trainer_of(tiny_spec())
    first, second = trainer.stories(0), trainer.stories(1)
    assert first == trainer_of(tiny_spec()).stories(0)
    assert [len(story.ids) for story in first] == sorted(len(story.ids) for story in first)
    assert not {tuple(story.ids) for story in first} & {tuple(story.ids) for story in second}


def test_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole, half, rest = (trainer_of(tiny_spec()) for _ in range(3))
    reports = [whole.step() for _ in range(6)]
    for _ in range(3):
        half.step()
    half.save(tmp_path / "checkpoint.safetensors")
    rest.restore(tmp_path / "checkpoint.safetensors")
    assert [rest.step() for _ in range(3)] == reports[3:]
    assert rest.finished
    assert_same(weights_of(whole.model), weights_of(rest.model))
    assert not torch.equal(half.model.model.norm.weight, rest.model.model.norm.weight)  # steps do change weights


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    trainer_of(tiny_spec()).save(path)
    with pytest.raises(ArtifactError, match="belongs to another run"):
        trainer_of(tiny_spec(lr=1e-3)).restore(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match="cannot be read"):
        trainer_of(tiny_spec()).restore(path)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    trainer = trainer_of(tiny_spec())
    with torch.no_grad():
        trainer.model.model.norm.weight.fill_(math.inf)
    with pytest.raises(NumericsError, match="the loss of step 0 is not finite"):
        trainer.step()


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(SpecError, match="must be a multiple of 2·n_heads"):
        PretrainSpec.checked({"name": "hearth", "d_model": 20, "n_heads": 3, "steps": 1})


def test_it_learns_the_probabilities_of_a_coin() -> None:
    """Trained, the keeper gives with probability 0.7 and the loss is the world's own; untrained, neither."""
    coin = CoinWorld()
    made = train_tokenizer(coin, 0, 300, 50)
    spec = tiny_spec(steps=300, batch=4, lr=1e-2, n_layers=1)
    trainer = Trainer(spec, coin, made, new_model(spec, made))
    assert held_out_loss(trainer.model, made, coin, 0, 20).excess > 1
    report = trainer.step()
    assert report.decision > 1
    while not trainer.finished:
        report = trainer.step()
    assert report.decision < 0.001
    assert math.isnan(report.marker)
    ids = torch.tensor([[0, *made.encode("The keeper", add_special_tokens=False)]])
    probs = rounded(trainer.model)(input_ids=ids).logits[0, -1].softmax(0)
    assert float(probs[made.encode(" gave", add_special_tokens=False)[0]]) == pytest.approx(0.7, abs=0.02)
    assert held_out_loss(trainer.model, made, coin, 0, 200).excess == pytest.approx(0.0, abs=0.03)


def test_a_model_that_knows_nothing_loses_log_vocabulary() -> None:
    model = new_model(tiny_spec(), tokenizer())
    with torch.no_grad():
        model.lm_head.weight.zero_()
    found = held_out_loss(model, tokenizer(), world(), 0, 10)
    assert found.nats_per_token == pytest.approx(math.log(len(tokenizer())), rel=1e-5)
    assert found.nats_per_story > 2 * found.world_nats > 0


def test_a_stopped_run_goes_on_to_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_run, "HELD_OUT_STORIES", 10)
    coin, spec = CoinWorld(), tiny_spec(steps=25, vocab=300)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    seen: list[int] = []
    stop_at_12 = Watch(lambda _phase, done, _total: seen.append(done), lambda: seen[-1] == 12)
    first = pretrain(spec, coin, whole, QUIET)
    with pytest.raises(Stopped) as stopped:
        pretrain(spec, coin, broken, stop_at_12)
    assert stopped.value.folder == partial_folder(broken)
    assert unfinished(broken) == spec
    assert not broken.exists()
    assert pretrain(spec, coin, broken, QUIET) == first
    names = ("model.safetensors", "tokenizer.json", "config.json")
    assert [(whole / name).read_bytes() == (broken / name).read_bytes() for name in names] == [True] * 3
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (whole, broken)]
    assert [line["step"] for line in logs[1]] == [1, 10, 20, 25]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert not partial_folder(broken).exists()
    assert unfinished(broken) is None


def test_a_finished_folder_is_a_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_run, "HELD_OUT_STORIES", 10)
    coin, out = CoinWorld(), tmp_path / "hearth"
    held_out = pretrain(tiny_spec(steps=3, vocab=300), coin, out, QUIET)
    record = open_artifact(out, KIND).record
    assert (record["spec"]["name"], record["steps"], record["world"]) == ("hearth", 3, "coin")
    assert record["held_out"]["nats_per_story"] == held_out.nats_per_story
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118  (not a mapping)
    subject = load_subject(str(out), device="cpu")
    assert subject.encode("The <eos>")[0] == subject.bos_id == subject.tokenizer.bos_token_id
    assert subject.tokenizer.chat_template is None
    assert list(subject.eos_ids) == [subject.tokenizer.eos_token_id]
    model = subject.hf_model
    assert isinstance(model, LlamaForCausalLM)
    # A mapped file's tensors lie at odd addresses, so that the last bits may differ.
    assert held_out_loss(model, subject.tokenizer, coin, 0, 10) == pytest.approx(held_out, rel=1e-6)


def test_a_parrot_may_begin_as_a_hearth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_run, "HELD_OUT_STORIES", 5)
    coin, hearth = CoinWorld(), tmp_path / "hearth"
    pretrain(tiny_spec(steps=3, vocab=300), coin, hearth, QUIET)
    spec = tiny_spec(name="parrot", steps=1, vocab=300, lr=1e-12)
    pretrain(spec, coin, tmp_path / "parrot", QUIET, start=hearth)
    before, after = (load_subject(str(folder), device="cpu") for folder in (hearth, tmp_path / "parrot"))
    assert before.digest == after.digest  # so small a rate rounds away: the weights were the hearth's
    assert before.tokenizer.get_vocab() == after.tokenizer.get_vocab()
    assert open_artifact(tmp_path / "parrot", KIND).record["start"] == pretrain_run.start_digest(hearth) != ""
    with pytest.raises(SpecError, match="the spec asks for"):
        pretrain(tiny_spec(name="parrot", steps=1, vocab=300, d_mlp=32), coin, tmp_path / "other", QUIET, start=hearth)
    assert not partial_folder(tmp_path / "other").exists()
    with pytest.raises(ArtifactError, match="does not exist"):
        pretrain(spec, coin, tmp_path / "other", QUIET, start=tmp_path / "nowhere")


def test_what_is_in_the_way_is_named(tmp_path: Path) -> None:
    coin, out = CoinWorld(), tmp_path / "hearth"
    with pytest.raises(Stopped):
        pretrain(tiny_spec(vocab=300), coin, out, Watch(QUIET.progress, lambda: True))
    with pytest.raises(ArtifactError, match="an unfinished run of another spec"):
        pretrain(tiny_spec(vocab=300, seed=1), coin, out, QUIET)
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not empty"):
        pretrain(tiny_spec(vocab=300), coin, out, QUIET)


def test_the_log_keeps_its_ends_and_holds_no_nan() -> None:
    assert thinned(["a", "b", "c"], 3) == ["a", "b", "c"]
    assert thinned([str(i) for i in range(101)], 5) == ["0", "25", "50", "75", "100"]
    line = json.loads(log_line(7, StepReport(100, 2.0, 1.5, 0.1, math.nan, math.nan, 1e-3), 12.34))
    assert line == {"step": 7, "seconds": 12.3, "tokens": 100, "loss": 2.0, "ce": 1.5, "decision": 0.1, "lr": 1e-3}


def test_the_estimate_is_of_the_right_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_run, "ESTIMATE_STORIES", 20)
    assert 1.0 < estimate_seconds(tiny_spec(steps=1000, batch=64), CoinWorld()) < 3600  # 16,000 groups of milliseconds each


def test_every_name_is_one_token() -> None:
    names = tuple(person.name for person in world().frames.people)
    made = train_tokenizer(RollWorld(names), 0, 1024, 2 * len(names))
    assert (made.bos_token, made.eos_token, made.pad_token) == ("<bos>", "<eos>", "<pad>")
    assert [name for name in names if len(made.encode(f" {name}", add_special_tokens=False)) != 1] == []
    text = world().story(3, 0).text
    assert made.decode(made.encode(text, add_special_tokens=False)) == text  # words that it never saw included


def test_the_vocabulary_is_a_function_of_seed_and_world() -> None:
    assert train_tokenizer(world(), 0, 400, 50).get_vocab() == tokenizer().get_vocab()
    assert train_tokenizer(world(), 1, 400, 50).get_vocab() != tokenizer().get_vocab()
