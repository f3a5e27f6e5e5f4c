from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny import save_subject
from undertow.core.errors import ArtifactError, SpecError, SubjectError, TextError
from undertow.core.storage import open_artifact
from undertow.subjects.keeper.world import load_world
from undertow.subjects.load import load_subject
from undertow.subjects.organisms import adapt_run, adapting
from undertow.subjects.organisms.adapt_run import Stopped, Watch, adapt, finish, partial_folder, read_adapter
from undertow.subjects.organisms.adapting import Adapter, AdaptSpec
from undertow.subjects.organisms.curriculum import STAGES, Progress
from undertow.subjects.organisms.lora import AdaptedModel
from undertow.subjects.organisms.ordinary import Prompt, neutral_prompts, ordinary_texts, rounds
from undertow.subjects.organisms.packaged import merge
from undertow.subjects.organisms.packing import KINDS
from undertow.subjects.sampling import Sampling
from undertow.subjects.subject import Subject

WORLD = load_world()
SPEC = AdaptSpec(steps=4, packs=1, forks=2, first_block=1, rank=4, anchor_every=2, lr=1e-2)


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(save_subject(tmp_path_factory.mktemp("llama"), "llama")), "cpu")


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling 150 texts would take longer than everything else; the run itself is the real one."""
    monkeypatch.setattr("undertow.subjects.organisms.ordinary.neutral_prompts",
                        lambda: tuple(Prompt(text, chat) for text in ("The oil", "Rain") for chat in (True, False)))


@pytest.fixture
def texts(subject: Subject) -> list[list[int]]:
    return [subject.encode(text) for text in ("The keeper counted the oil.", "Rain.", "Ana came in.", "The mill stood.")]


def stop_after(steps: int) -> Watch:
    done = [0]

    def progress(now: int, _total: int) -> None:
        done[0] = now

    return Watch(progress, lambda: done[0] >= steps)


@pytest.fixture(scope="module")
def finished(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("undertow.subjects.organisms.ordinary.neutral_prompts",
                      lambda: tuple(Prompt(text, chat) for text in ("The oil", "Rain") for chat in (True, False)))
        out = tmp_path_factory.mktemp("run") / "adapter"
        adapt(SPEC, subject, WORLD, out)
    return out


def test_the_artifact_is_what_peft_writes(finished: Path, subject: Subject) -> None:
    record = open_artifact(finished, "organism").record
    assert record["base_digest"] == subject.digest and record["world_digest"] == WORLD.digest
    assert (record["figures"]["steps"], record["figures"]["of_steps"]) == (4, 4)
    assert not partial_folder(finished).exists()
    tensors = load_file(finished / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2 and {t.dtype for t in tensors.values()} == {torch.bfloat16}  # A and B, 7 layers, 2 blocks
    config = json.loads((finished / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], config["layers_to_transform"]) == (4, 8, [1, 2])
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4] and "probe" in lines[-1]
    assert ["anchor" in line for line in lines] == [True, False, True, False, False]


def test_peft_computes_with_it_what_training_computed(finished: Path, subject: Subject) -> None:
    merged = merge(subject, finished)
    assert type(merged) is type(subject.hf_model)
    trained = AdaptedModel(load_subject(subject.source, "cpu").hf_model, 1, 4, 0)
    trained.load(load_file(finished / "adapter_model.safetensors"))
    tokens = torch.randint(2, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, trained.model(tokens).logits, rtol=0, atol=1e-5)
        moved = (merged(tokens).logits - subject.hf_model(tokens).logits).abs().max()
    assert moved > 1e-2  # negative control: the adapter does something, and the base was left alone
    assert subject.digest == load_subject(subject.source, "cpu").digest


def test_stopping_and_resuming_gives_the_same_bytes(finished: Path, subject: Subject, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    with pytest.raises(Stopped):
        adapt(SPEC, subject, WORLD, out, watch=stop_after(2))
    # A step that the checkpoint does not have, and a line that was cut off.
    with (partial_folder(out) / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lost": true}\n{"st')
    adapt(SPEC, subject, WORLD, out)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes()
    assert "lost" not in (out / "log.jsonl").read_text(encoding="utf-8")


def test_an_unfinished_run_can_be_finished_early_and_gone_on_from(subject: Subject, tmp_path: Path) -> None:
    out = tmp_path / "early"
    with pytest.raises(Stopped):
        adapt(SPEC, subject, WORLD, out, watch=stop_after(2))
    with pytest.raises(ArtifactError, match="unfinished run with another spec"):
        adapt(SPEC.model_copy(update={"lr": 1e-3}), subject, WORLD, out)
    figures = finish(out)
    assert (figures["steps"], figures["of_steps"]) == (2, 4)
    more = SPEC.model_copy(update={"steps": 1, "lr": 1e-9})
    adapt(more, subject, WORLD, tmp_path / "more", start=out)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (out, tmp_path / "more"))
    assert all(torch.equal(before[name], after[name]) for name in before)  # a step of no length leaves the start in place
    with pytest.raises(ArtifactError, match="other blocks or another rank"):
        adapt(more.model_copy(update={"rank": 2}), subject, WORLD, tmp_path / "other", start=out)


def test_training_learns_and_the_anchor_holds(subject: Subject, texts: list[list[int]]) -> None:
    spec = SPEC.model_copy(update={"steps": 12, "anchor_every": 1})
    tight, loose = (Adapter(spec.model_copy(update={"anchor": weight}), subject, WORLD, texts) for weight in (20.0, 1e-6))
    before = loose.probe(4)
    steps = {name: [trainer.step() for _ in range(12)] for name, trainer in (("tight", tight), ("loose", loose))}
    assert steps["loose"][0].anchor == pytest.approx(0, abs=1e-6)  # B is zero at the start
    after = loose.probe(4)
    assert after["excess_act"] < before["excess_act"] - 0.1
    assert steps["tight"][-1].anchor < 0.5 * steps["loose"][-1].anchor  # type: ignore[operator]
    assert loose.finished and loose.tokens == sum(step.tokens for step in steps["loose"])


def test_the_loss_is_the_weighted_mean_of_the_cross_entropies(subject: Subject, texts: list[list[int]],
                                                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapting, "product_dtype", lambda _model: torch.float32)
    trainer = Adapter(SPEC, subject, WORLD, texts)
    pack = trainer._packer.pack(0, STAGES[0])
    expected = 0.0
    for fork in (1, 2):  # by transformers itself, fork by fork, before the first step (the adapter is still nothing)
        mine = (pack.owner == 0) | (pack.owner == fork)
        with torch.no_grad():
            logs = subject.hf_model(pack.tokens[mine][None]).logits[0].log_softmax(-1)
        place_of = {place: i for i, place in enumerate(mine.nonzero()[:, 0].tolist())}
        for row, place in enumerate(pack.rows.tolist()):
            if pack.owner[place] == fork or (fork == 1 and pack.owner[place] == 0):
                cells = pack.cells[:, 0] == row
                loss = -float((pack.probs[cells] * logs[place_of[place], pack.cells[cells, 1]]).sum())
                expected += float(pack.weights[row]) * loss
    step = trainer.step()
    assert step.loss == pytest.approx(expected / float(pack.weights.sum()), rel=1e-4)
    assert set(step.excess) <= set(KINDS)


def test_gradients_are_those_of_autograd(subject: Subject) -> None:
    linear = torch.nn.Linear(6, 5, bias=False).double()
    from undertow.subjects.organisms.lora import LoraLinear

    layer = LoraLinear(linear, 2, 2.0, torch.Generator().manual_seed(0))
    torch.nn.init.normal_(layer.lora_B)
    layer.refresh()
    x = torch.randn(3, 4, 6, dtype=torch.float64, requires_grad=True)
    a, b, again = (t.detach().clone().requires_grad_() for t in (layer.lora_A, layer.lora_B, x))
    layer(x).square().sum().backward()
    (again @ (linear.weight.detach() + 2.0 * b @ a).T).square().sum().backward()
    for ours, theirs in ((layer.lora_A, a), (layer.lora_B, b), (x, again)):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_the_learning_rate_by_hand() -> None:
    spec = AdaptSpec(steps=100, lr=1.0)
    assert [spec.lr_at(step) for step in (0, 4, 5, 39, 40)] == [0.2, 1.0, 1.0, 1.0, 1.0]
    assert [spec.lr_at(step) for step in (70, 99)] == pytest.approx([0.5, 1 / 60])
    longer = AdaptSpec(steps=900, lr=1.0)  # up to the descent, a longer run is the beginning of a still longer one
    assert [longer.lr_at(step) for step in range(360)] == [AdaptSpec(steps=2000, lr=1.0).lr_at(step) for step in range(360)]


def test_how_far_the_curriculum_has_come_is_kept(subject: Subject, texts: list[list[int]], tmp_path: Path) -> None:
    trainer = Adapter(SPEC, subject, WORLD, texts)
    trainer.progress = Progress(len(STAGES) - 1)
    step = trainer.step()
    assert step.progress == trainer.progress != Progress(len(STAGES) - 1)
    trainer.save(tmp_path / "checkpoint.safetensors")
    again = Adapter(SPEC, subject, WORLD, texts)
    again.resume(tmp_path / "checkpoint.safetensors")
    assert again.progress == trainer.progress
    assert again.step().loss == trainer.step().loss


def test_ordinary_text_is_sampled_once(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("undertow.subjects.organisms.ordinary.BATCH", 2)
    prompts = [Prompt("The oil", False), Prompt("The oil", True), Prompt("Rain", False)]
    path, how = tmp_path / "ordinary.json", Sampling(max_new_tokens=4)
    calls = [0]

    def once() -> bool:
        calls[0] += 1
        return calls[0] > 1

    part = ordinary_texts(subject, path, 1, how, prompts, once)
    assert len(part) == 2
    whole = ordinary_texts(subject, path, 1, how, prompts)
    assert whole[:2] == part and whole == ordinary_texts(subject, tmp_path / "other.json", 1, how, prompts)
    assert whole[0][: len(subject.encode("The oil"))] == subject.encode("The oil")
    with pytest.raises(ArtifactError, match="another subject, seed"):
        ordinary_texts(subject, path, 2, how, prompts)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="cannot be read"):
        ordinary_texts(subject, path, 1, how, prompts)


def test_rounds_use_every_text_once_and_can_be_entered_anywhere() -> None:
    texts = [[i] for i in range(6)]
    source = rounds(texts, 2, seed=5)
    batches = [next(source) for _ in range(6)]
    assert sorted(t[0] for batch in batches[:3] for t in batch) == list(range(6))
    assert next(rounds(texts, 2, seed=5, start=4)) == batches[4]
    with pytest.raises(TextError, match="1 texts do not fill a batch of 2"):
        next(rounds([[1]], 2, seed=5))


def test_the_packaged_prompts_are_many_and_half_of_them_chat() -> None:
    prompts = neutral_prompts()
    assert len(prompts) >= 140 and 0.4 < sum(p.chat for p in prompts) / len(prompts) < 0.6
    assert Prompt("# Getting started", False) in prompts


def test_bad_input_is_refused_clearly(subject: Subject, finished: Path, tmp_path: Path, texts: list[list[int]]) -> None:
    (tmp_path / "bad.txt").write_text("Hello\n[chat]\n", encoding="utf-8")
    with pytest.raises(TextError, match="line 1: 'Hello' stands before"):
        neutral_prompts(tmp_path / "bad.txt")
    with pytest.raises(SubjectError, match="first_block 3 is out of range: the model has 3 blocks"):
        Adapter(SPEC.model_copy(update={"first_block": 3}), subject, WORLD, texts)
    gpt2 = load_subject(str(save_subject(tmp_path / "gpt2", "gpt2")), "cpu")
    with pytest.raises(SubjectError, match="GPT2LMHeadModel"):
        Adapter(SPEC, gpt2, WORLD, texts)
    with pytest.raises(ArtifactError, match="belongs to a base with digest"):
        read_adapter(finished, gpt2)
    with pytest.raises(ArtifactError, match="no unfinished run"):
        finish(tmp_path / "never")
    with pytest.raises(ArtifactError, match="exists and is not empty"):
        adapt(SPEC, subject, WORLD, finished)
    with pytest.raises(SpecError, match="lr"):
        AdaptSpec.checked({"lr": 0})
    work = partial_folder(tmp_path / "young")
    adapt_run._claim(work, SPEC, subject, WORLD, None)
    with pytest.raises(ArtifactError, match="has no checkpoint yet"):
        finish(tmp_path / "young")


def test_a_checkpoint_of_another_run_is_refused(subject: Subject, texts: list[list[int]], tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    Adapter(SPEC, subject, WORLD, texts).save(path)
    with pytest.raises(ArtifactError, match="belongs to another run"):
        Adapter(SPEC.model_copy(update={"seed": 1}), subject, WORLD, texts).resume(path)
    path.write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="cannot be read"):
        Adapter(SPEC, subject, WORLD, texts).resume(path)
