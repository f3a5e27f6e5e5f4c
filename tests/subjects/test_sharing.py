"""Sharing what lies below an edit: the same bits, fewer passes, and nothing left behind."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache

from tests import tiny
from undertow.subjects.load import load_subject
from undertow.subjects.sharing import Below
from undertow.subjects.splicing import EditResult, splice
from undertow.subjects.subject import Subject

TOKENS = torch.tensor([[0, 5, 9, 12, 7], [0, 8, 3, 3, 20]])


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(tiny.save_subject(tmp_path_factory.mktemp("m") / "m", request.param)), "cpu")


@pytest.fixture
def ran(subject: Subject) -> Any:
    """How often the attention of every block ran."""
    counts: Counter[int] = Counter()
    hooks = [next(child for name, child in block.named_children() if "attn" in name).register_forward_hook(
        lambda *_args, i=i: counts.update([i])) for i, block in enumerate(subject.blocks)]
    yield counts
    for hook in hooks:
        hook.remove()


def double(x: torch.Tensor, editable: torch.Tensor) -> EditResult:
    return EditResult(x, editable)


def logits(subject: Subject, tokens: torch.Tensor = TOKENS, **how: Any) -> torch.Tensor:
    with torch.inference_mode():
        return subject.hf_model(input_ids=tokens, use_cache=False, **how).logits.clone()


def edited(subject: Subject, site: str) -> torch.Tensor:
    with splice(subject, subject.site(site), double):
        return logits(subject)


@pytest.mark.parametrize(("site", "shared"), [("blocks.1.hook_resid_post", 2), ("blocks.1.hook_resid_pre", 1),
                                              ("blocks.1.hook_mlp_out", 1), ("blocks.2.attn.hook_z", 2)])
def test_an_edited_pass_begins_at_the_site_and_has_the_same_bits(subject: Subject, ran: Counter[int], site: str,
                                                                 shared: int) -> None:
    plain, changed = logits(subject), edited(subject, site)
    assert not torch.equal(plain, changed)
    ran.clear()
    below = Below(subject, subject.site(site))
    with below.shared():
        assert torch.equal(logits(subject), plain)
        for _ in range(3):
            assert torch.equal(edited(subject, site), changed)
    assert [ran[i] for i in range(3)] == [1] * shared + [4] * (3 - shared)
    assert (below.misses, below.hits) == (1, 3)
    with splice(subject, subject.site(site), double), below.shared():  # the other way round, and a second time
        assert torch.equal(logits(subject), changed)
    assert (below.misses, below.hits) == (1, 4)


def test_other_tokens_positions_and_masks_are_other_passes(subject: Subject) -> None:
    ways: list[dict[str, Any]] = [
        {}, {"attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])},
        {"position_ids": torch.arange(2, 7)[None].expand(2, -1)}]
    wanted = [*(logits(subject, **way) for way in ways), logits(subject, TOKENS.flip(0))]
    below = Below(subject, subject.site("blocks.1.hook_resid_post"))
    with below.shared():
        for _ in range(2):
            found = [*(logits(subject, **way) for way in ways), logits(subject, TOKENS.flip(0))]
            assert all(torch.equal(one, two) for one, two in zip(wanted, found, strict=True))
    assert (below.misses, below.hits) == (4, 4)


def test_caches_and_gradients_of_the_subject_itself_are_run_whole(subject: Subject, ran: Counter[int]) -> None:
    below = Below(subject, subject.site("blocks.1.hook_resid_post"))
    embedding = subject.hf_model.get_input_embeddings()
    with below.shared():
        logits(subject)
        ran.clear()
        with torch.enable_grad():
            x = embedding(TOKENS).detach().requires_grad_()
            subject.hf_model(inputs_embeds=x, use_cache=False).logits.sum().backward()
            assert x.grad is not None and bool((x.grad != 0).any())
            weight = next(iter(subject.blocks[0].parameters())).requires_grad_()
            try:
                subject.hf_model(input_ids=TOKENS, use_cache=False).logits.sum().backward()
                assert weight.grad is not None and bool((weight.grad != 0).any())
            finally:
                weight.requires_grad_(False).grad = None
        with torch.inference_mode():
            subject.hf_model(input_ids=TOKENS, past_key_values=DynamicCache(), use_cache=True)
    assert [ran[i] for i in range(3)] == [3, 3, 3]
    assert (below.misses, below.hits) == (1, 0)


@pytest.mark.parametrize("first", [torch.inference_mode, torch.enable_grad])
def test_gradients_by_an_edit_are_those_of_the_whole_pass(subject: Subject, ran: Counter[int], first: Any) -> None:
    site = subject.site("blocks.1.hook_resid_post")
    below, added = Below(subject, site), torch.full((subject.d_model,), 0.1, requires_grad=True)

    def gradient() -> torch.Tensor:
        with torch.enable_grad(), splice(subject, site, lambda x, editable: EditResult(added.expand_as(x), editable)):
            said = subject.hf_model(input_ids=TOKENS, use_cache=False).logits.log_softmax(dim=-1)[..., 3].sum()
        return torch.autograd.grad(said, added)[0]

    whole = gradient()
    with below.shared():
        with first():
            subject.hf_model(input_ids=TOKENS, use_cache=False)
        ran.clear()
        assert torch.equal(gradient(), whole)
        assert torch.equal(gradient(), whole)
    assert [ran[i] for i in range(3)] == [0, 0, 2]
    assert bool((whole != 0).any())


def test_nothing_is_left_behind(subject: Subject, ran: Counter[int]) -> None:
    below, site = Below(subject, subject.site("blocks.1.hook_resid_post")), subject.site("blocks.0.hook_resid_post")
    before = {name: set(vars(module)) for name, module in subject.hf_model.named_modules()}
    with pytest.raises(RuntimeError, match="by the way"), below.shared():
        logits(subject)
        with below.shared():  # one within another is the same
            logits(subject)
        raise RuntimeError("by the way")
    assert {name: set(vars(module)) for name, module in subject.hf_model.named_modules()} == before
    assert not subject.hf_model.base_model._forward_pre_hooks
    ran.clear()
    plain = logits(subject)
    assert [ran[i] for i in range(3)] == [1, 1, 1]
    assert not torch.equal(edited(subject, site.name), plain)


def test_the_oldest_are_forgotten(subject: Subject) -> None:
    size = TOKENS.numel() * subject.d_model * 4
    below = Below(subject, subject.site("blocks.1.hook_resid_post"), most_bytes=2 * size)
    with below.shared():
        for shift in (0, 1, 0, 2, 0, 1):  # 1 is forgotten when 2 comes, since 0 was used after it
            logits(subject, TOKENS.roll(shift, dims=1))
    assert (below.misses, below.hits) == (4, 2)


def test_below_the_first_block_there_is_nothing(subject: Subject) -> None:
    below = Below(subject, subject.site("blocks.0.hook_resid_pre"))
    with below.shared():
        logits(subject)
        assert not any("forward" in vars(module) for module in subject.hf_model.modules() if isinstance(module, nn.Module))
    assert (below.misses, below.hits) == (0, 0)
