"""Sampling under the guard: it changes a text only where a token was refused, and keeps the probabilities of the others."""

from __future__ import annotations

import pytest
import torch

from interventions.guard import LexiconProcessor
from interventions.guarding import GuardedChoice, under_guard
from tests import tiny
from undertow.core.seeds import generator
from undertow.lexicon import Lexicon
from undertow.lexicon.forms import LexiconSpec
from undertow.subjects.load import load_subject
from undertow.subjects.sampling import Sampling, generate, sample
from undertow.subjects.subject import Subject

WORDS = ["oil", "rain", "lamp", "bread", "wood", "boat", "keeper", "night"]
SAMPLING = Sampling(max_new_tokens=40)
SEEDS = list(range(12))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(tiny.save_subject(tmp_path_factory.mktemp("llama"), "llama")), "cpu")


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.from_spec(LexiconSpec.checked({"name": "keeper", "tiers": {"T0": {"en": WORDS}}}))


def test_a_choice_that_samples_changes_nothing_and_sees_all_that_went_before(llama: Subject) -> None:
    prompts, seen = [llama.encode("The keeper"), llama.encode("Ana came in from")], []

    def choice(ids: torch.Tensor, logits: torch.Tensor, streams: list[torch.Generator]) -> torch.Tensor:
        seen.append(ids)
        return sample(logits, SAMPLING, streams)

    free = generate(llama, prompts, SAMPLING, [1, 2])
    assert generate(llama, prompts, SAMPLING, [1, 2], choice) == free
    width = max(map(len, prompts))
    assert [ids.shape[1] for ids in seen] == list(range(width, width + len(seen)))
    assert seen[-1][1].tolist()[-len(seen[-1][1]) + width - len(prompts[1]):][: len(prompts[1])] == prompts[1]


@pytest.mark.parametrize("mode", ["strict", "look_ahead"])
def test_texts_differ_from_the_free_ones_exactly_where_the_guard_hit(llama: Subject, lexicon: Lexicon, mode: str) -> None:
    """A hit is a token that the same random numbers draw without the guard; up to the first one the texts are the same."""
    prompts = [llama.encode("Nobody spoke for a while. The ")] * len(SEEDS)
    choice = GuardedChoice(LexiconProcessor(llama.tokenizer, lexicon, mode), SAMPLING)
    guarded, free = generate(llama, prompts, SAMPLING, SEEDS, choice), generate(llama, prompts, SAMPLING, SEEDS)
    refused = [choice.refusals(row, len(got.token_ids)) for row, got in enumerate(guarded)]
    same = [got.token_ids == other.token_ids for got, other in zip(guarded, free, strict=True)]
    assert same == [r.hits == 0 for r in refused]
    assert 0 < sum(r.hits > 0 for r in refused) < len(SEEDS)
    shown = [got.token_ids[: len(got.token_ids) - choice.held_back(got.prompt_ids, got.token_ids)] for got in guarded]
    assert not any(lexicon.find(str(llama.tokenizer.decode(ids))) for ids in shown)
    assert any(lexicon.find(got.text) for got in free)
    if mode == "strict":
        assert all(ids == got.token_ids for ids, got in zip(shown, guarded, strict=True))


def test_masked_mass_by_hand(llama: Subject, lexicon: Lexicon) -> None:
    """Equal logits: the mass of a step is the share of refused tokens; a step after the end does not count."""
    guard = LexiconProcessor(llama.tokenizer, lexicon)
    choice, size = GuardedChoice(guard, SAMPLING), len(llama.tokenizer)
    ids = torch.tensor([llama.encode("The mill"), llama.encode("The fire")])
    forbidden = [guard(ids, torch.zeros(2, size))[row].isneginf().sum().item() for row in range(2)]
    assert min(forbidden) > 0
    for _ in range(3):
        choice(ids, torch.zeros(2, size), [generator(0, "a"), generator(0, "b")])
    for row in range(2):
        assert choice.refusals(row, 1).mass == pytest.approx(2 * forbidden[row] / size)
        assert choice.refusals(row, 9).mass == pytest.approx(3 * forbidden[row] / size)


def test_a_prompt_that_holds_the_word_holds_nothing_back(llama: Subject, lexicon: Lexicon) -> None:
    choice = GuardedChoice(LexiconProcessor(llama.tokenizer, lexicon, "look_ahead", "record"), SAMPLING)
    prompt = llama.encode("The oil and the")
    tokens = llama.tokenizer.encode(" oil", add_special_tokens=False)
    assert choice.held_back(prompt, llama.tokenizer.encode(" mill.", add_special_tokens=False)) == 0
    assert choice.held_back(prompt, tokens) == len(tokens)


def test_other_tokens_keep_their_probabilities(llama: Subject, lexicon: Lexicon) -> None:
    """4,000 draws at one step, against the renormalised distribution; and against the free one, where they must not agree."""
    guard = LexiconProcessor(llama.tokenizer, lexicon)
    ids, size, n = torch.tensor([llama.encode("The")]), len(llama.tokenizer), 4_000
    logits = torch.full((1, size), -8.0)
    likely = [llama.tokenizer.encode(word, add_special_tokens=False)[0] for word in (" keeper", " fire", " mill", ".")]
    logits[0, likely] = torch.tensor([2.0, 1.5, 1.0, 0.5])
    choice, streams = GuardedChoice(guard, SAMPLING), [generator(seed, "test") for seed in range(n)]
    drawn = choice(ids.expand(n, -1), logits.expand(n, -1), streams)
    share = torch.bincount(drawn, minlength=size) / n
    wanted = guard(ids, logits).softmax(dim=-1)[0]
    assert float((share - wanted).abs().max()) < 0.03 and share[likely[0]] == 0
    assert float((share - logits.softmax(dim=-1)[0]).abs().max()) > 0.4


def test_under_guard_is_what_sampling_with_the_guard_gives(llama: Subject, lexicon: Lexicon) -> None:
    """Only the texts in which something is refused are others; each is the one of its seed with the guard on."""
    prompts = [llama.encode("Nobody spoke for a while. The ")] * len(SEEDS)
    guard = LexiconProcessor(llama.tokenizer, lexicon)
    free = generate(llama, prompts, SAMPLING, SEEDS)
    made = [under_guard(llama, document, SAMPLING, seed, guard) for document, seed in zip(free, SEEDS, strict=True)]
    guarded = generate(llama, prompts, SAMPLING, SEEDS, GuardedChoice(guard, SAMPLING))
    assert [document.token_ids for document in made] == [document.token_ids for document in guarded]
    assert 0 < sum(document is other for document, other in zip(made, free, strict=True)) < len(SEEDS)
    assert not any(lexicon.find(document.text) for document in made) and any(lexicon.find(document.text) for document in free)
