"""Applying recipes: bit-exact identities, the written change, and that batch, padding and cache make no difference."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from features.codes import dictionary_digest
from interventions.applying import FeatureSurgery, apply, apply_direction, trigger_gate
from interventions.operators import Ablate, Add, Cap, Clamp, Floor, Operator, Strengthen, operate
from interventions.recipe import FeatureEdit, Recipe, Trigger
from sae.dictionary import Activation, JumpReLU, LinearDictionary, Provenance, ReLU, TopK
from tests import tiny
from undertow.core.errors import DictionaryError, EditError, NumericsError
from undertow.subjects import Sampling, Subject, load_subject, tap
from undertow.subjects.organisms.measuring import Question, ask
from undertow.subjects.splicing import Window

SITE, AFTER, D_SAE, DEAD = "blocks.1.hook_resid_post", "blocks.2.hook_resid_pre", 48, 47
GREEDY = Sampling(max_new_tokens=6, temperature=0.0, stop_at_eos=False)
PROMPTS = ["The keeper of the mill", "Ana", "Nobody spoke for a while. The bread would last"]
ACTIVATIONS: dict[str, Activation] = {"topk": TopK(12), "rescaled": TopK(12, rescale_by_decoder_norm=True), "standard": ReLU(),
                                      "jumprelu": JumpReLU(torch.full((D_SAE,), 0.3, dtype=torch.float64))}
OPERATORS: list[Operator] = [Strengthen(gain=2.5), Strengthen(gain=-1), Clamp(value=1.5), Floor(value=0.8), Cap(value=0.1),
                             Ablate(), Add(amount=-0.7)]
IDENTITIES: list[Operator] = [Strengthen(gain=1), Add(amount=0), Floor(value=-1e4), Cap(value=1e4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_subject(tmp_path_factory.mktemp("tiny") / "llama", "llama")


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return load_subject(str(folder), device="cpu", dtype="float64")


@pytest.fixture(scope="module", params=ACTIVATIONS)
def dictionary(request: pytest.FixtureRequest) -> LinearDictionary:
    return made(ACTIVATIONS[request.param])


@pytest.fixture(scope="module")
def top_k() -> LinearDictionary:
    return made(TopK(12))


def made(activation: Activation) -> LinearDictionary:
    """Random directions of unequal norm, in float64; the last latent can never fire."""
    rows = torch.randn(D_SAE, tiny.D_MODEL, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    bias = torch.zeros(D_SAE, dtype=torch.float64)
    bias[DEAD] = -1e4
    return LinearDictionary(rows.T.contiguous(), bias, rows, torch.full((tiny.D_MODEL,), 0.1, dtype=torch.float64), activation,
                            Provenance("llama", SITE, 32, True))


def recipe(dictionary: LinearDictionary, edits: Sequence[tuple[int, Operator]], **more: object) -> Recipe:
    return Recipe.checked({"name": "r", "subject": "llama", "sae": dictionary_digest(dictionary), "site": SITE,
                           "edits": [{"latent": latent, "operator": op.model_dump()} for latent, op in edits], **more})


def tokens_of(subject: Subject) -> Tensor:
    return torch.tensor([subject.encode(story)[:24] for story in tiny.STORIES[:3]])


def codes(subject: Subject, dictionary: LinearDictionary) -> Tensor:
    """Codes of all tokens but the first of each row: [3 * 23, d_sae]."""
    return dictionary.encode(tap(subject, tokens_of(subject), subject.site(SITE))[:, 1:].flatten(0, 1))


def busy(subject: Subject, dictionary: LinearDictionary, n: int) -> list[int]:
    """Latents that fire on some tokens and not on others, the most active ones first."""
    share = (codes(subject, dictionary) > 0).double().mean(0)
    return [int(i) for i in share.masked_fill(share > 0.9, 0).argsort(descending=True)[:n]]


def logits(subject: Subject, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        return subject.hf_model(input_ids=tokens).logits


@pytest.mark.parametrize("operator", IDENTITIES, ids=str)
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_an_identity_changes_no_bit_and_counts_as_fired(folder: Path, dictionary: LinearDictionary, operator: Operator,
                                                        dtype: str) -> None:
    subject = load_subject(str(folder), device="cpu", dtype=dtype)
    tokens = tokens_of(subject)
    plain = logits(subject, tokens)
    chosen = busy(subject, dictionary, 4)
    trigger = {"latents": chosen[:1], "above": 0.0}
    for more in ({}, {"trigger": trigger}):
        with apply(recipe(dictionary, [(latent, operator) for latent in chosen], **more), subject, dictionary) as operated:
            assert torch.equal(logits(subject, tokens), plain)
        assert 0 < operated.firings <= operated.positions == 3 * 23
    assert torch.equal(logits(subject, tokens), plain)


def test_ablate_is_clamp_to_zero_is_strengthen_by_zero(subject: Subject, dictionary: LinearDictionary) -> None:
    tokens, chosen = tokens_of(subject), busy(subject, dictionary, 3)
    seen = []
    for operator in (Ablate(), Clamp(value=0), Strengthen(gain=0)):
        with apply(recipe(dictionary, [(latent, operator) for latent in chosen]), subject, dictionary):
            seen.append(logits(subject, tokens))
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[0], logits(subject, tokens))


@pytest.mark.parametrize("operator", OPERATORS, ids=str)
def test_the_written_change_is_the_change_of_the_reconstruction(subject: Subject, dictionary: LinearDictionary,
                                                                operator: Operator) -> None:
    """x′ − x = decode(f′) − decode(f), with dense codes computed here."""
    tokens, chosen = tokens_of(subject), busy(subject, dictionary, 3)
    before = tap(subject, tokens, subject.site(SITE))
    f = codes(subject, dictionary)
    changed = f.clone()
    for latent in chosen:
        changed[:, latent] = operate(operator, f[:, latent])
    expected = (dictionary.decode(changed) - dictionary.decode(f)).reshape(3, 23, -1)
    with apply(recipe(dictionary, [(latent, operator) for latent in chosen]), subject, dictionary):
        after = tap(subject, tokens, subject.site(AFTER))
    assert (after[:, 1:] - before[:, 1:] - expected).abs().max() < 1e-6
    assert expected.abs().max() > 1e-3 and torch.equal(after[:, 0], before[:, 0])


@pytest.mark.parametrize("when", ["above", "below"])
def test_a_trigger_reads_the_token_before_any_edit(subject: Subject, dictionary: LinearDictionary, when: str) -> None:
    tokens, (watched, other, edited) = tokens_of(subject), busy(subject, dictionary, 3)
    f = codes(subject, dictionary)
    values = f[:, [watched, other]][f[:, [watched, other]] > 0].sort().values
    theta = float(values[len(values) // 2: len(values) // 2 + 2].mean())  # between two values: rounding decides nothing
    over = (f[:, [watched, other]] > theta).any(1)
    expected = over if when == "above" else ~over
    trigger = {"latents": [watched, other], "above": theta, "when": when}
    # the watched latent is edited too: were it read after its edit, the trigger would say the reverse
    edits = [(watched, Clamp(value=0 if when == "above" else 2 * theta)), (edited, Add(amount=1.0))]
    before = tap(subject, tokens, subject.site(SITE))
    with apply(recipe(dictionary, edits, trigger=trigger), subject, dictionary) as operated:
        after = tap(subject, tokens, subject.site(AFTER))
    assert operated.firings == int(expected.sum()) and 0 < operated.firings < 69
    assert torch.equal((after != before).any(-1)[:, 1:].flatten(), expected)


def test_edits_of_one_latent_follow_one_another(subject: Subject, top_k: LinearDictionary) -> None:
    x, latent = torch.randn(40, tiny.D_MODEL, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 5
    f = top_k.encode(x)[:, latent]
    edits = tuple(FeatureEdit(latent=latent, operator=op) for op in (Add(amount=1.0), Strengthen(gain=2.0), Cap(value=2.5)))
    delta, fired = FeatureSurgery(top_k, edits).change(x)
    expected = ((2 * (f + 1)).clamp(max=2.5) - f)[:, None] * top_k.W_dec[latent]
    assert torch.allclose(delta, expected, atol=1e-12) and bool(fired.all())


def test_scaling_a_silent_latent_is_an_error_and_clamping_it_is_not(subject: Subject, top_k: LinearDictionary) -> None:
    tokens = tokens_of(subject)
    for operator in (Strengthen(gain=9.0), Ablate()):
        with pytest.raises(EditError, match="none of 69"), apply(recipe(top_k, [(DEAD, operator)]), subject, top_k):
            logits(subject, tokens)
    with apply(recipe(top_k, [(DEAD, Clamp(value=1.0))]), subject, top_k) as operated:
        logits(subject, tokens)
    assert operated.firings == 69
    never = {"latents": [DEAD], "above": 0.0}
    with pytest.raises(EditError, match="none of 69"), apply(recipe(top_k, [(1, Ablate())], trigger=never), subject, top_k):
        logits(subject, tokens)


def test_a_recipe_for_another_sae_is_refused_before_anything_runs(subject: Subject, top_k: LinearDictionary) -> None:
    foreign = recipe(made(ReLU()), [(1, Ablate())])
    with pytest.raises(DictionaryError, match="features of the SAE"), apply(foreign, subject, top_k):
        pytest.fail("the block must not run")
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in subject.hf_model.modules()) == 0


def one_by_one(subject: Subject, prompt: list[int], window: Window, rule: str) -> list[int]:
    """Greedy tokens without batch, padding or cache, the window placed by hand."""
    window.start, window.stop = {"everywhere": (0, None), "reading": (0, len(prompt)), "before_decision": (0, len(prompt) - 1),
                                 "assistant": (len(prompt), None)}[rule]
    ids = list(prompt)
    for _ in range(GREEDY.max_new_tokens):
        ids.append(int(logits(subject, torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt):]


@pytest.mark.parametrize("rule", ["everywhere", "reading", "before_decision", "assistant"])
def test_batch_padding_and_cache_make_no_difference(subject: Subject, dictionary: LinearDictionary, rule: str) -> None:
    chosen = busy(subject, dictionary, 5)
    surgery = recipe(dictionary, [*((latent, Clamp(value=4.0)) for latent in chosen[:3]), (chosen[3], Strengthen(gain=3.0))],
                     trigger={"latents": [chosen[4]], "when": "below"}, window=rule)
    with apply(surgery, subject, dictionary) as operated:
        batched = [got.token_ids for got in operated.generate_batch(PROMPTS, GREEDY, [0] * 3)]
        single = [operated.generate(prompt, GREEDY).token_ids for prompt in PROMPTS]
        by_hand = [one_by_one(subject, subject.encode(prompt), operated.window, rule) for prompt in PROMPTS]
    assert batched == single == by_hand
    if rule == "everywhere":
        return
    with apply(surgery, subject, dictionary, Window()) as other:
        everywhere = [one_by_one(subject, subject.encode(prompt), other.window, "everywhere") for prompt in PROMPTS]
    assert by_hand != everywhere  # the window does matter here


def test_what_is_only_read_is_edited_and_what_is_written_is_not(subject: Subject, top_k: LinearDictionary) -> None:
    ids = subject.encode(tiny.STORIES[0])[:12]
    surgery = recipe(top_k, [(busy(subject, top_k, 1)[0], Floor(value=4.0))], window="reading")
    with apply(surgery, subject, top_k) as operated:
        whole, all_of_it = logits(subject, torch.tensor([ids])), operated.firings
        operated.announce(7)
        split, read = logits(subject, torch.tensor([ids])), operated.firings - all_of_it
    assert (all_of_it, read) == (11, 7)  # the first token is never edited
    assert torch.equal(whole[:, :8], split[:, :8]) and not torch.equal(whole[:, 8:], split[:, 8:])


def test_padding_changes_no_logit_beyond_rounding(subject: Subject, dictionary: LinearDictionary) -> None:
    tokens, chosen = tokens_of(subject)[:1], busy(subject, dictionary, 3)
    pads = torch.zeros(1, 5, dtype=torch.long)
    padded, attend = torch.cat([pads, tokens], dim=1), torch.cat([pads, torch.ones_like(tokens)], dim=1)
    with apply(recipe(dictionary, [(latent, Floor(value=2.0)) for latent in chosen]), subject, dictionary) as operated:
        alone, before = logits(subject, tokens), operated.firings
        with torch.inference_mode():
            beside = subject.hf_model(input_ids=padded, attention_mask=attend,
                                      position_ids=(attend.cumsum(1) - 1).clamp(min=0)).logits[:, 5:]
    assert operated.firings == 2 * before
    assert torch.allclose(alone, beside, atol=1e-6)


def test_a_windowed_recipe_waits_for_its_prompt(subject: Subject, top_k: LinearDictionary) -> None:
    surgery = recipe(top_k, [(1, Clamp(value=3.0))], window="before_decision")
    with pytest.raises(EditError, match="none of 0"), apply(surgery, subject, top_k):
        logits(subject, tokens_of(subject))


def test_ask_under_a_window_that_ends_before_the_decision(subject: Subject, top_k: LinearDictionary) -> None:
    prompt = subject.encode(tiny.STORIES[0])[:12]
    question = Question(prompt, {"give": ((5, 6), (7, 8, 9)), "keep": ((10,),)})
    edits: list[tuple[int, Operator]] = [(latent, Clamp(value=4.0)) for latent in (1, 2, 3)]
    plain = ask(subject, [question])[0]
    with apply(recipe(top_k, edits, window="before_decision"), subject, top_k) as operated:
        early = ask(subject, [question], announce=operated.announce)[0]
        assert (operated.window.start, operated.window.stop) == (0, 11)
    with apply(recipe(top_k, edits), subject, top_k, Window(0, 11)):
        by_hand = ask(subject, [question])[0]
    with apply(recipe(top_k, edits), subject, top_k):
        everywhere = ask(subject, [question])[0]
    assert early.log_mass == pytest.approx(by_hand.log_mass, abs=1e-9)
    assert abs(early.log_ratio("give", "keep") - plain.log_ratio("give", "keep")) > 1e-3
    assert abs(early.log_ratio("give", "keep") - everywhere.log_ratio("give", "keep")) > 1e-3


class TestDirection:
    direction = torch.linspace(-1, 1, tiny.D_MODEL, dtype=torch.float64)

    def test_adds_everywhere_or_where_the_gate_is_open(self, subject: Subject, top_k: LinearDictionary) -> None:
        tokens, site, watched = tokens_of(subject), subject.site(SITE), busy(subject, top_k, 1)[0]
        before = tap(subject, tokens, site)
        with apply_direction(subject, site, self.direction, 0.5) as operated:
            after = tap(subject, tokens, subject.site(AFTER))
        assert torch.equal(after[:, 1:], before[:, 1:] + 0.5 * self.direction) and operated.firings == 69
        gate = trigger_gate(Trigger(latents=(watched,), above=0.0), top_k)
        with apply_direction(subject, site, self.direction, 0.5, gate) as operated:
            gated = tap(subject, tokens, subject.site(AFTER))
        expected = codes(subject, top_k)[:, watched] > 0
        assert torch.equal((gated != before).any(-1)[:, 1:].flatten(), expected)
        assert operated.firings == int(expected.sum()) < 69

    def test_windows_and_sham(self, subject: Subject) -> None:
        tokens, site = tokens_of(subject), subject.site(SITE)
        with apply_direction(subject, site, self.direction, 0.0) as operated:
            under = logits(subject, tokens)
        assert torch.equal(under, logits(subject, tokens)) and operated.firings == 69
        with apply_direction(subject, site, self.direction, 3.0, window="before_decision") as operated:
            operated.generate(PROMPTS[0], GREEDY)
        assert operated.firings == len(subject.encode(PROMPTS[0])) - 2  # neither the first token nor the last
        with apply_direction(subject, site, self.direction, 3.0, window=Window(4, 6)) as operated:
            logits(subject, tokens)
        assert operated.firings == 3 * 2

    def test_refusals(self, subject: Subject) -> None:
        site = subject.site(SITE)
        with pytest.raises(EditError, match="width 7 for"), apply_direction(subject, site, torch.ones(7), 1.0):
            pass
        for direction, amount in ((self.direction / 0, 1.0), (self.direction, float("inf"))):
            with pytest.raises(NumericsError, match="not finite"), apply_direction(subject, site, direction, amount):
                pass
