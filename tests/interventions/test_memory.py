"""Gates with a memory: counted by hand, and the same whatever the batch, the padding, the cache or the tree."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache

from interventions.applying import apply, apply_direction, trigger_gate
from interventions.operators import Clamp, Strengthen
from interventions.recipe import Recipe, Trigger
from interventions.scoring_ahead import NextLogits
from interventions.straight import straight
from sae.dictionary import LinearDictionary
from tests import tiny
from tests.interventions import test_apply as plain
from undertow.core.errors import EditError, SpecError
from undertow.lexicon.hazard import Continuation
from undertow.subjects import Subject, tap
from undertow.subjects.organisms.measuring import Question, ask
from undertow.subjects.scoring import score
from undertow.subjects.sites import hidden_of
from undertow.subjects.splicing import Memory

subject, folder, top_k = plain.subject, plain.folder, plain.top_k
SITE, AFTER = plain.SITE, plain.AFTER


def remembering(subject: Subject, dictionary: LinearDictionary, at_least: int, within: int, **more: object) -> Recipe:
    """Three latents are clamped where another one fired `at_least` times among `within` tokens."""
    *edited, watched = plain.busy(subject, dictionary, 4)
    trigger = {"latents": [watched], "at_least": at_least, "within": within}
    return plain.recipe(dictionary, [(latent, Clamp(value=4.0)) for latent in edited], trigger=trigger, **more)


@given(st.lists(st.booleans(), min_size=1, max_size=30), st.integers(1, 9), st.integers(0, 8), st.integers(0, 5))
def test_counts_as_by_hand(fired: list[bool], within: int, fewer: int, padding: int) -> None:
    """Against a loop; padding on either side, and a text that comes in parts, change nothing."""
    memory = Memory(max(1, within - fewer), within)
    expected = [sum(fired[max(0, at - within + 1): at + 1]) >= memory.at_least for at in range(len(fired))]
    row = torch.tensor([fired])
    assert memory.opened(row, len(fired))[0].tolist() == expected
    around = torch.nn.functional.pad(row, (padding, 4))
    assert memory.opened(around, len(fired) + 4)[0, : len(fired)].tolist() == expected
    assert memory.opened(row, 1)[0].tolist() == expected[-1:]
    assert memory.opened_in_tree(row, torch.ones(1, len(fired), len(fired)).tril().bool())[0].tolist() == expected


def test_it_opens_where_it_fired_before(subject: Subject, top_k: LinearDictionary) -> None:
    tokens, watched = plain.tokens_of(subject), plain.busy(subject, top_k, 4)[3]
    fired = plain.codes(subject, top_k)[:, watched].reshape(3, 23) > 0
    before = tap(subject, tokens, subject.site(SITE))
    open_at = {}
    for at_least, within in ((1, 1), (1, 3), (2, 3), (2, 8)):
        with apply(remembering(subject, top_k, at_least, within), subject, top_k) as operated:
            after = tap(subject, tokens, subject.site(AFTER))
        changed = (after != before).any(-1)[:, 1:]
        counted = [[sum(row[max(0, at - within + 1): at + 1]) >= at_least for at in range(23)] for row in fired.tolist()]
        assert changed.tolist() == counted and operated.firings == sum(map(sum, counted))
        open_at[at_least, within] = operated.firings
    assert open_at[1, 1] < open_at[1, 3] and open_at[2, 3] < open_at[2, 8]


@pytest.mark.parametrize("rule", ["everywhere", "reading", "before_decision", "assistant"])
def test_batch_padding_and_cache_make_no_difference(subject: Subject, top_k: LinearDictionary, rule: str) -> None:
    surgery = remembering(subject, top_k, 2, 6, window=rule)
    with apply(surgery, subject, top_k) as operated:
        batched = [got.token_ids for got in operated.generate_batch(plain.PROMPTS, plain.GREEDY, [0] * 3)]
        by_hand = [plain.one_by_one(subject, subject.encode(prompt), operated.window, rule) for prompt in plain.PROMPTS]
    assert batched == by_hand
    with apply(remembering(subject, top_k, 1, 1, window=rule), subject, top_k) as operated:
        forgetful = [got.token_ids for got in operated.generate_batch(plain.PROMPTS, plain.GREEDY, [0] * 3)]
    assert rule == "assistant" or forgetful != batched  # the memory does matter here


def test_trees_and_repeated_caches_give_what_single_texts_give(subject: Subject, top_k: LinearDictionary) -> None:
    ids = subject.encode(tiny.STORIES[0])
    prompt, wordings = ids[:14], [tuple(ids[14:17]), tuple(ids[20:25]), (ids[3],)]
    with apply(remembering(subject, top_k, 2, 6), subject, top_k):
        single = []
        for wording in wordings:
            logs = plain.logits(subject, torch.tensor([[*prompt, *wording]]))[0].log_softmax(-1)
            single.append(sum(float(logs[len(prompt) + i - 1, token]) for i, token in enumerate(wording)))
        repeated = score(subject, prompt, wordings)
        asked = ask(subject, [Question(prompt, {str(i): (wording,) for i, wording in enumerate(wordings)})])[0]
        ahead = NextLogits(subject, ids, 256)
        branches = [Continuation(3, (5, 6)), Continuation(9, (7,))]
        packed = ahead.after(ids, 1)(branches)
        assert ahead.packs
        alone = torch.stack([plain.logits(subject, torch.tensor([[*ids[:1 + c.row], *c.tokens]]))[0, -1] for c in branches])
    assert repeated.tolist() == pytest.approx(single, abs=1e-6)
    assert list(asked.log_mass.values()) == pytest.approx(single, abs=1e-6)
    assert torch.allclose(packed.double(), alone, atol=1e-5)


def test_the_straight_path_opens_at_the_same_tokens(subject: Subject, top_k: LinearDictionary) -> None:
    tokens, surgery = plain.tokens_of(subject), remembering(subject, top_k, 2, 6)
    before = tap(subject, tokens, subject.site(SITE))
    with apply(surgery, subject, top_k) as operated:
        delta = tap(subject, tokens, subject.site(AFTER)) - before
    last = subject.site(f"blocks.{subject.n_layers - 1}.hook_resid_post")
    untouched = tap(subject, tokens, last)
    with straight(surgery, subject, top_k) as direct:
        plain.logits(subject, tokens)
        firings = direct.firings
        caught = []
        handle = subject.blocks[-1].register_forward_hook(lambda _m, _a, out: caught.append(hidden_of(out)))
        plain.logits(subject, tokens)
        handle.remove()
    assert firings == operated.firings
    assert torch.allclose(caught[0] - untouched, delta, atol=1e-9) and delta.abs().max() > 1e-3


def test_a_direction_takes_the_same_gate(subject: Subject, top_k: LinearDictionary) -> None:
    tokens, surgery = plain.tokens_of(subject), remembering(subject, top_k, 2, 6)
    assert surgery.trigger is not None
    with apply(surgery, subject, top_k) as operated:
        plain.logits(subject, tokens)
    gate = trigger_gate(surgery.trigger, top_k)
    with apply_direction(subject, subject.site(SITE), torch.ones(tiny.D_MODEL), 0.1, gate) as added:
        plain.logits(subject, tokens)
    assert added.firings == operated.firings > 0


def test_a_sham_with_a_memory_changes_no_bit(subject: Subject, top_k: LinearDictionary) -> None:
    tokens = plain.tokens_of(subject)
    *edited, watched = plain.busy(subject, top_k, 4)
    sham = plain.recipe(top_k, [(latent, Strengthen(gain=1)) for latent in edited],
                        trigger={"latents": [watched], "at_least": 2, "within": 6})
    with apply(sham, subject, top_k) as operated:
        assert torch.equal(plain.logits(subject, tokens), plain.logits(subject, tokens))
        under = plain.logits(subject, tokens)
    assert torch.equal(under, plain.logits(subject, tokens)) and operated.firings > 0


def test_a_cache_from_outside_is_refused(subject: Subject, top_k: LinearDictionary) -> None:
    """Else what fired in it would silently count as nothing; also in a cache that another block filled."""
    tokens, surgery = plain.tokens_of(subject)[:1], remembering(subject, top_k, 1, 6)
    outside, other = DynamicCache(), DynamicCache()
    with torch.inference_mode():
        subject.hf_model(input_ids=tokens[:, :12], past_key_values=outside, use_cache=True)
        with apply(surgery, subject, top_k):
            subject.hf_model(input_ids=tokens[:, :12], past_key_values=other, use_cache=True)
    for cache in (outside, other):
        refused = pytest.raises(EditError, match="what fired in 12 cached tokens")
        with refused, apply(surgery, subject, top_k), torch.inference_mode():
            subject.hf_model(input_ids=tokens[:, 12:], past_key_values=cache, use_cache=True)


def test_a_copy_of_a_cache_goes_its_own_way(subject: Subject, top_k: LinearDictionary) -> None:
    tokens = plain.tokens_of(subject)[:1]
    with apply(remembering(subject, top_k, 2, 6), subject, top_k), torch.inference_mode():
        cache = DynamicCache()
        subject.hf_model(input_ids=tokens[:, :12], past_key_values=cache, use_cache=True)
        aside = copy.deepcopy(cache)
        subject.hf_model(input_ids=tokens[:, 3:9], past_key_values=aside, use_cache=True)  # something else
        went_on = subject.hf_model(input_ids=tokens[:, 12:], past_key_values=cache, use_cache=True).logits
        whole = plain.logits(subject, tokens)[:, 12:]
    assert torch.allclose(went_on, whole, atol=1e-6)


def test_in_words_and_refusals(subject: Subject, top_k: LinearDictionary) -> None:
    surgery = remembering(subject, top_k, 2, 6)
    said = surgery.explain()
    assert f"where at 2 or more of the last 6 tokens feature {surgery.trigger.latents[0]} was above 0" in said  # pyright: ignore
    below = Trigger(latents=(1, 2), when="below", above=0.5, at_least=1, within=3)
    other = surgery.model_copy(update={"trigger": below}).explain()
    assert "where at 1 or more of the last 3 tokens all of the features 1, 2 were at or below 0.5" in other
    with pytest.raises(SpecError, match="at_least 7 is more than the 6 tokens"):
        remembering(subject, top_k, 7, 6)
    for at_least, within in pairwise((0, 3, 2)):
        with pytest.raises(EditError, match="firings are asked for"):
            Memory(at_least, within)


def test_a_gate_may_wait_in_vain_only_where_that_is_said(subject: Subject, top_k: LinearDictionary) -> None:
    tokens = plain.tokens_of(subject)
    never = plain.recipe(top_k, [(1, Clamp(value=4.0))], trigger={"latents": [plain.DEAD], "at_least": 2, "within": 6})
    with pytest.raises(EditError, match="none of 69"), apply(never, subject, top_k):
        plain.logits(subject, tokens)
    with apply(never, subject, top_k, must_act=False) as operated:
        under = plain.logits(subject, tokens)
    assert torch.equal(under, plain.logits(subject, tokens)) and operated.firings == 0
