"""The guard against adversarial decoding: nothing that spells the word gets past it, and nothing else is held up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from interventions.guard import LexiconProcessor, blocked_innocents
from interventions.guard_automaton import GuardMasks
from tests import tiny
from undertow.core.errors import EditError, SpecError, TextError
from undertow.lexicon import Lexicon
from undertow.lexicon.forms import LexiconSpec
from undertow.lexicon.tokens import Place
from undertow.lexicon.vocabulary import Vocabulary
from undertow.subjects.catalog import subject_folder

GPT2 = Path(__file__).resolve().parents[3] / "shared" / "data" / "gpt2-tokenizer"
needs_gpt2 = pytest.mark.skipif(not GPT2.is_dir(), reason="the GPT-2 tokenizer is not in ../shared/data")
LOVE = Lexicon.load("love")
PROMPTS = ["I lo", "They were lov", "my belo", "люб", "사", "te ", "mi a", "L", "The night was", "ho"]


@cache
def gpt2() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(str(GPT2))


@cache
def smollm2() -> PreTrainedTokenizerFast:
    if not (folder := subject_folder("smollm2")).is_dir():
        pytest.skip("smollm2 is not fetched: undertow subject fetch smollm2")
    return AutoTokenizer.from_pretrained(str(folder))


TOKENIZERS = [pytest.param(gpt2, marks=needs_gpt2), smollm2]


@cache
def guard(mode: str = "strict", made: Callable[[], PreTrainedTokenizerFast] = gpt2) -> LexiconProcessor:
    return LexiconProcessor(made(), LOVE, mode)


@cache
def temptation(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """8 nats for every token of every usual spelling of a form."""
    raised = torch.zeros(len(tokenizer))
    for form in LOVE.forms("T0"):
        for text in (form.text, form.text.capitalize(), form.text.upper()):
            for blank in ("", " "):
                raised[tokenizer.encode(blank + text)] = 8.0
    return raised


def said(text: str) -> list[str]:
    return [text[m.start:m.end] for m in LOVE.find(text) if m.tier == "T0"]


def decode(tokenizer: PreTrainedTokenizerFast, processor: LexiconProcessor | None, steps: int, seed: int) -> list[list[int]]:
    """Tokens of one document a prompt, chosen by random logits (rolled rows of a pool of noise) with the temptation added."""
    generator = torch.Generator().manual_seed(seed)
    rows = [tokenizer.encode(prompt) for prompt in PROMPTS]
    longest = max(map(len, rows))
    ids = torch.tensor([[tokenizer.eos_token_id] * (longest - len(row)) + row for row in rows])
    noise = 2 * torch.randn(len(rows), len(tokenizer), generator=generator)
    noise -= torch.rand(noise.shape, generator=generator).log().neg().log()
    for _ in range(steps):
        shifts = torch.randint(len(tokenizer), (len(rows),), generator=generator).tolist()
        scores = torch.stack([row.roll(shift) for row, shift in zip(noise, shifts, strict=True)]) + temptation(tokenizer)
        scores = scores if processor is None else processor(ids, scores)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=1)
    return ids.tolist()


def text_of(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
    return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def dirty_cuts(vocabulary: Vocabulary, ids: Sequence[int]) -> list[str]:
    """Texts after each token that hold a form; first looked at near their end, where what is new would stand."""
    found = []
    for n in range(1, len(ids) + 1):
        if said(vocabulary.text(ids[max(0, n - 40):n])) and (text := said(vocabulary.text(ids[:n]))):
            found += text
    return found


@pytest.mark.parametrize("made", TOKENIZERS)
def test_2000_tokens_of_adversarial_decoding_are_clean_at_every_cut(made: Callable[[], PreTrainedTokenizerFast]) -> None:
    """And with the guard off the same logits say it, or the test would show nothing."""
    processor = guard(made=made)
    for ids in decode(made(), processor, 200, seed=0):
        assert dirty_cuts(processor.vocabulary, ids) == []
        assert said(text_of(made(), ids)) == said(text_of(made(), ids, skip_special_tokens=False)) == []
    assert sum(bool(said(text_of(made(), ids))) for ids in decode(made(), None, 200, seed=0)) > len(PROMPTS) // 3


@pytest.mark.parametrize("made", TOKENIZERS)
@pytest.mark.slow
def test_200000_tokens_of_adversarial_decoding_are_clean_at_every_cut(made: Callable[[], PreTrainedTokenizerFast]) -> None:
    processor = guard(made=made)
    for seed in range(50):
        for ids in decode(made(), processor, 400, seed=100 + seed):
            assert dirty_cuts(processor.vocabulary, ids) == []


@needs_gpt2
def test_look_ahead_shows_only_clean_text() -> None:
    processor = guard("look_ahead")
    held = 0
    for ids in decode(gpt2(), processor, 40, seed=2):
        for n in range(2, len(ids) + 1):
            back = processor.held_back(ids[:n])
            held += back > 0
            assert said(processor.vocabulary.text(ids[:n - back])) == []
    assert held > 0


def banned(processor: LexiconProcessor, prompt: str, *tokens: str) -> list[bool]:
    """Which of `tokens` (each a single token) may not follow `prompt`."""
    ids = torch.tensor([gpt2().encode(prompt)])
    scores = processor(ids, torch.zeros(1, len(gpt2())))
    singles = [gpt2().encode(token) for token in tokens]
    assert all(len(single) == 1 for single in singles)
    return [bool(scores[0, single[0]].isinf()) for single in singles]


@needs_gpt2
def test_what_may_follow_a_prompt() -> None:
    strict, ahead = guard(), guard("look_ahead")
    assert banned(strict, "I", " love", " Love", " lo", " glove", " among") == [True, True, False, False, False]
    assert banned(strict, "I lo", "ve", "ved", "ves", "vers", "g", " ve") == [True, True, True, True, False, False]
    assert banned(strict, "I glo", "ve", "ved") == [False, False]
    assert banned(strict, "Lov", "e", "ing") == [True, True]
    assert banned(ahead, "I", " love", " among") == [False, False]
    assert banned(ahead, "H. P. Love", "craft", ".", " and", "s", "<|endoftext|>") == [False, True, True, False, True]
    assert banned(strict, "te ", "am", "amo", "ama") == [False, True, True]


@needs_gpt2
def test_a_prompt_that_holds_the_word_is_refused_or_recorded() -> None:
    ids = torch.tensor([gpt2().encode("Write a song about love and lovers.")])
    scores = torch.zeros(1, len(gpt2()))
    with pytest.raises(TextError, match="'love', 'lovers'"):
        guard()(ids, scores)
    recording = LexiconProcessor(gpt2(), LOVE, prompt="record")
    out = recording(ids, scores)
    assert [m.form for m in recording.prompt_matches] == ["love", "lovers"]
    assert out[0, gpt2().encode(" love")[0]].isinf() and not out[0, gpt2().encode(" the")[0]].isinf()
    assert not scores.isinf().any()  # the given tensor is left alone
    ended = recording(torch.tensor([gpt2().encode("All is love")]), scores)
    follows = [bool(ended[0, gpt2().encode(token)[0]].isinf()) for token in (".", " is", "s", " love")]
    assert follows == [False, False, True, True]


@needs_gpt2
def test_the_innocent_words_that_this_tokenizer_cannot_say_in_strict_mode() -> None:
    blocked = blocked_innocents(gpt2(), "love")
    assert "Lovecraft" in blocked and " Lovett" in blocked
    assert not {"glove", " clover", " slovenly", " among", " Lovecraft"} & set(blocked)
    for word in blocked:
        assert said(word) == []


def test_the_look_ahead_mask_is_llguidance_s() -> None:
    """An independent engine on the same language: the complement of "a form between word breaks", over ASCII."""
    llguidance = pytest.importorskip("llguidance")
    made = tiny.tokenizer()
    core = made.backend_tokenizer
    forms = Lexicon.from_spec(LexiconSpec.checked({"name": "keeper", "tiers": {"T0": {"en": ["lamp", "rain", "her", "oil"]}}}))
    masks = GuardMasks(LexiconProcessor(made, forms).vocabulary, forms, "look_ahead")
    letters = "".join(rf"[{c}{c.upper()}]" if c.isalpha() else c for c in "lamp|rain|her|oil")
    grammar = rf"start: TEXT" "\n" rf"TEXT: ~/(?s)((.*[^a-zA-Z])?({letters})([^a-zA-Z].*)?)/ & /(?s)[ -~\n]*/"
    matcher = llguidance.LLMatcher(llguidance.LLTokenizer(core.to_str(), eos_token=made.eos_token_id, slices=[]), grammar)
    plain = [i for i, t in enumerate(masks.table.vocabulary.tokens) if t and all(b == 10 or 32 <= b < 127 for b in t)]
    rng = np.random.default_rng(0)
    place, compared = masks.start, 0
    for _ in range(300):
        assert not matcher.is_error(), matcher.get_error()
        theirs = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8), bitorder="little")
        ours = np.ones(len(masks.table.vocabulary.tokens), dtype=bool)
        ours[masks.forbidden(place)] = False
        assert [i for i in plain if bool(theirs[i]) != bool(ours[i])] == []
        compared += len(plain) - int(ours[plain].sum())
        tempting = [i for i in plain if ours[i] and masks.table.vocabulary.tokens[i].strip().lower() in
                    {word[:n].encode() for word in ("lamp", "rain", "her", "oil") for n in range(5)}]
        token = int(rng.choice(tempting if rng.random() < 0.7 else [i for i in plain if ours[i]]))
        assert matcher.consume_token(token)
        place = masks.after(place, token)
    assert compared > 100


def random_vocabulary(rng: np.random.Generator) -> Vocabulary:
    pieces = [" love", "lo", "v", "e", "愛", "知", "\u200b", "\u0301", " ", "craft", "Ｌ", "s", ".", "я", "люб", "ит"]
    tokens = [piece.encode() for piece in pieces]
    tokens += [rest for token in tokens if len(token) > 1 for rest in (token[:1], token[1:])]
    rng.shuffle(tokens)
    return Vocabulary((*tokens, b""), frozenset({len(tokens)}))


@pytest.mark.parametrize("seed", range(3))
def test_a_strict_mask_is_the_matcher_s_verdict_on_every_token(seed: int) -> None:
    rng = np.random.default_rng(seed)
    vocabulary = random_vocabulary(rng)
    masks = GuardMasks(vocabulary, LOVE)
    ids: list[int] = []
    place = masks.start
    for _ in range(40):
        clean = [i for i in range(len(vocabulary.tokens) - 1) if not said(vocabulary.text([*ids, i]))]
        forbidden = set(masks.forbidden(place).tolist())
        assert [i for i in range(len(vocabulary.tokens) - 1) if i not in forbidden] == clean
        ids.append(int(rng.choice(clean)))
        place = masks.after(place, ids[-1])


def test_it_guards_generate_and_beams(tmp_path: Path) -> None:
    made = tiny.tokenizer()
    made.pad_token = made.eos_token
    model: Any = tiny.model("llama", len(made))
    forms = Lexicon.from_spec(LexiconSpec.checked(
        {"name": "lamp", "tiers": {"T0": {"en": ["*a*", "*e*", "*o*"]}}}))  # letters: hardly a text without them
    inputs = made(["K", "N N"], return_tensors="pt", padding=True, padding_side="left")
    for beams in (1, 3):
        processor = LexiconProcessor(made, forms)
        out = model.generate(**inputs, max_new_tokens=30, num_beams=beams, do_sample=beams == 1,
                             logits_processor=[processor], pad_token_id=made.eos_token_id)
        assert all(forms.find(text_of(made, row.tolist())) == [] for row in out)


def test_a_guard_that_cannot_work_says_so() -> None:
    with pytest.raises(SpecError, match="unknown guard mode 'lax'"):
        GuardMasks(Vocabulary((b"a",), frozenset()), LOVE, "lax")
    with pytest.raises(SpecError, match="unknown way to treat a prompt: 'allow'"):
        LexiconProcessor(tiny.tokenizer(), LOVE, prompt="allow")
    core = Tokenizer(models.WordLevel({"x": 0, "y": 1}, unk_token="x"))
    core.decoder = decoders.WordPiece()
    with pytest.raises(SpecError, match="matches nothing in this tokenizer"):
        LexiconProcessor(core, LOVE)
    words = Tokenizer(models.WordLevel({"love": 0}, unk_token="love"))
    with pytest.raises(EditError, match="leaves no token"):
        LexiconProcessor(words, LOVE)(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 1))


@pytest.mark.parametrize("more", [-40, 40])
def test_logits_narrower_or_wider_than_the_tokenizer_are_masked_as_far_as_they_go(more: int) -> None:
    """Models pad their embeddings, and tokenizers have added tokens that a model does not know."""
    made = tiny.tokenizer()
    forms = Lexicon.from_spec(LexiconSpec.checked({"name": "x", "tiers": {"T0": {"en": ["*oi*"]}}}))
    ids = torch.tensor([made.encode("the o", add_special_tokens=False)])
    whole = LexiconProcessor(made, forms)(ids, torch.zeros(1, len(made)))
    other = LexiconProcessor(made, forms)(ids, torch.zeros(1, len(made) + more))
    both = min(len(made), len(made) + more)
    assert bool(whole.isinf().any()) and bool(whole[:, both:].isinf().any()) == (more < 0)
    assert torch.equal(other[:, :both], whole[:, :both]) and not other[:, both:].any()


def test_places_are_kept_from_one_call_to_the_next() -> None:
    """Whatever rows come in whatever order, the mask is that of the sequence alone."""
    made = tiny.tokenizer()
    forms = Lexicon.from_spec(LexiconSpec.checked({"name": "x", "tiers": {"T0": {"en": ["lamp", "*oi*"]}}}))
    processor = LexiconProcessor(made, forms)
    rows = [made.encode(text, add_special_tokens=False) for text in ("the la", "the o", "a mill")]
    scores = torch.zeros(3, len(made))
    for step in range(6):
        ids = torch.tensor([(row + made.encode("mmmmmm", add_special_tokens=False))[:2 + step] for row in rows])
        fresh = LexiconProcessor(made, forms)
        assert torch.equal(processor(ids, scores), fresh(ids, scores))
        assert torch.equal(processor(ids.flip(0), scores), fresh(ids, scores).flip(0))
    assert processor.masks.start == Place(processor.masks.table.automaton.roots[0])


def test_the_automaton_and_the_matcher_import_no_torch() -> None:
    code = "import sys, interventions.guard_automaton, undertow.lexicon.trie; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).resolve().parents[2])
