"""The audit on real tiny models: a sham changes nothing, an arm that says the word is seen, figures agree with plain ones."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BloomConfig, BloomForCausalLM

from interventions.audit import (
    AuditSpec,
    audit,
    count_words,
    kl_after,
    kl_on,
    logits_after,
    ratio_of_sums,
    spellings,
    unhooked,
)
from interventions.scoring_ahead import NextLogits
from tests import tiny
from undertow.core.errors import EditError, NumericsError, SpecError
from undertow.lexicon.forms import Lexicon, LexiconSpec
from undertow.lexicon.hazard import Continuation, hazard_exact
from undertow.lexicon.trie import TokenTrie
from undertow.lexicon.vocabulary import read_vocabulary
from undertow.subjects import EditResult, Generated, Subject, load_subject, splice

SPEC = AuditSpec(tolerance=1e-3)
Change = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module", params=tiny.ARCHITECTURES)
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(tiny.save_subject(tmp_path_factory.mktemp(request.param), request.param)), "cpu", "float64")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(tiny.save_subject(tmp_path_factory.mktemp("llama"), "llama")), "cpu")


@pytest.fixture(scope="module")
def lexicon() -> Lexicon:
    return Lexicon.from_spec(LexiconSpec(name="oil", tiers={"T0": {"en": ["oil", "lamp*"]}}))


@pytest.fixture(scope="module")
def trie(llama: Subject, lexicon: Lexicon) -> TokenTrie:
    return spellings(llama, lexicon, canonical=True)


@pytest.fixture(scope="module")
def rows(llama: Subject) -> list[list[int]]:
    """Twelve rows of 7 to 10 tokens."""
    return [llama.encode(tiny.STORIES[i])[:7 + i % 4] for i in range(12)]


@contextlib.contextmanager
def spliced(subject: Subject, change: Change, where: Callable[[torch.Tensor], torch.Tensor] = torch.ones_like,
            ) -> Iterator[SimpleNamespace]:
    """An arm: `change` added after the last block wherever `where` (of what is editable) says."""
    def edit(x: torch.Tensor, editable: torch.Tensor) -> EditResult:
        return EditResult(change(x), where(editable))

    with splice(subject, subject.site(f"blocks.{tiny.N_LAYERS - 1}.hook_resid_post"), edit):
        yield SimpleNamespace(subject=subject)


def push(towards: torch.Tensor, amount: float) -> Change:
    return lambda x: (amount * towards / towards.norm()).to(x.dtype).expand_as(x)


def word_direction(subject: Subject) -> torch.Tensor:
    """What writes " oil": its unembedding, less the mean one."""
    [token] = subject.tokenizer.encode(" oil", add_special_tokens=False)
    table = subject.hf_model.get_output_embeddings().weight.detach()
    return table[token] - table.mean(0)


def test_a_sham_changes_nothing_at_all(llama: Subject, trie: TokenTrie, rows: list[list[int]]) -> None:
    found = audit(llama, spliced(llama, torch.zeros_like), rows, trie, SPEC)
    assert found.change == 0.0 and found.exact and found.slack <= SPEC.tolerance + 1e-9
    assert found.hazard_ratio(0)[:3] == (1.0, 1.0, 1.0)
    assert found.kl.shape == (sum(len(ids) - 1 for ids in rows),) and found.row.tolist() == sorted(found.row)


def test_figures_agree_with_one_row_at_a_time(llama: Subject, trie: TokenTrie, rows: list[list[int]]) -> None:
    """KL and hazard by plain calls of the model on each row, and by continuations of one token sequence each."""
    rows, change = rows[:8], push(word_direction(llama), 1.0)
    found = audit(llama, spliced(llama, change), rows, trie, SPEC)
    kl, hazards = [], []
    for ids in rows:
        plain = llama.hf_model(input_ids=torch.tensor([ids])).logits[0, 1:].detach().double()
        with spliced(llama, change):
            moved = llama.hf_model(input_ids=torch.tensor([ids])).logits[0, 1:].detach()

            def after(continuations: list[Continuation], ids: list[int] = ids) -> torch.Tensor:
                texts = [torch.tensor([[*ids[:c.row + 2], *c.tokens]]) for c in continuations]
                return torch.stack([llama.hf_model(input_ids=text).logits[0, -1].detach() for text in texts])

            hazards.append(hazard_exact(moved, trie.contexts(ids)[1:], trie, after, 1e-3))
        p, q = plain.softmax(-1), moved.double().softmax(-1)
        kl.append((p * (p / q).log()).sum(-1))
    assert np.allclose(found.kl, torch.cat(kl).numpy(), atol=1e-5)
    truth = torch.cat([hazard.value for hazard in hazards]).numpy()
    assert np.abs(found.hazard - truth).max() < 2e-3 and np.corrcoef(found.hazard, truth)[0, 1] > 0.999


def test_batches_do_not_matter(llama: Subject, trie: TokenTrie, rows: list[list[int]]) -> None:
    change = push(word_direction(llama), 1.0)
    many, single = (audit(llama, spliced(llama, change), rows, trie, AuditSpec(tolerance=None, batch_tokens=size))
                    for size in (1_024, 1))
    assert np.allclose(many.kl, single.kl, atol=1e-5) and np.allclose(many.hazard, single.hazard, atol=1e-5)
    assert not many.exact


def test_the_word_is_seen_and_a_random_push_is_not(llama: Subject, trie: TokenTrie, rows: list[list[int]]) -> None:
    word = audit(llama, spliced(llama, push(word_direction(llama), 8.0)), rows, trie, SPEC)
    other = torch.randn(tiny.D_MODEL, generator=torch.Generator().manual_seed(0))
    random = audit(llama, spliced(llama, push(other, 8.0)), rows, trie, SPEC, base_hazard=word.hazard_base)
    assert word.hazard_ratio(0).low > 3 > random.hazard_ratio(0).high
    assert random.hazard_base is not word.hazard_base and np.array_equal(random.hazard_base, word.hazard_base)
    assert random.kl.mean() > 0.001


def test_the_bound_is_above_the_exact_hazard(llama: Subject, trie: TokenTrie, rows: list[list[int]]) -> None:
    arm = push(word_direction(llama), 2.0)
    exact, bound = (audit(llama, spliced(llama, arm), rows, trie, AuditSpec(tolerance=t)) for t in (1e-3, None))
    assert (bound.hazard >= exact.hazard - 1e-6).all() and bound.hazard.mean() > exact.hazard.mean()


def test_figures_have_the_names_of_summaries(llama: Subject, trie: TokenTrie, rows: list[list[int]]) -> None:
    found = audit(llama, spliced(llama, push(word_direction(llama), 1.0)), rows, trie, AuditSpec(tolerance=None))
    figures = found.figures(seed=1)
    assert {"kl_mean", "kl_median", "kl_p99", "hazard_mean", "hazard_max", "hazard_ratio", "hazard_ratio_upper"} <= set(figures)
    assert figures["hazard_ratio"] == pytest.approx(found.hazard.sum() / found.hazard_base.sum())
    assert figures["hazard_ratio_lower"] < figures["hazard_ratio"] < figures["hazard_ratio_upper"]
    assert figures == found.figures(seed=1) and figures["kl_p99"] == pytest.approx(np.quantile(found.kl, 0.99))
    with pytest.raises(SpecError, match="3 cluster labels for 12 rows"):
        found.figures(1, clusters=[0, 1, 2])


def test_logits_ahead_are_those_of_single_rows(each: Subject) -> None:
    ids = each.encode(tiny.STORIES[0])[:12]
    asked = [Continuation(0, (7,)), Continuation(3, (8, 9, 7)), Continuation(3, (8, 2)), Continuation(10, (5,))]
    for arm in (contextlib.nullcontext(), spliced(each, lambda x: x.cos())):
        with arm:
            ahead = NextLogits(each, ids, 5)
            found = ahead.after(ids, 2)(asked)
            rows = [torch.tensor([[*ids[:c.row + 2], *c.tokens]]) for c in asked]
            plain = torch.stack([each.hf_model(input_ids=row).logits[0, -1].detach().float() for row in rows])
        assert ahead.packs and torch.allclose(found, plain, atol=1e-6)


def test_a_model_without_position_ids_is_asked_row_by_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokens = tiny.tokenizer()
    BloomForCausalLM(BloomConfig(vocab_size=len(tokens), hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path)
    tokens.save_pretrained(tmp_path)
    bloom = load_subject(str(tmp_path), "cpu")
    ids, asked = bloom.encode(tiny.STORIES[0])[:9], [Continuation(0, (7, 3)), Continuation(7, (8,))]
    ahead = NextLogits(bloom, ids, 64)
    plain = [bloom.hf_model(input_ids=torch.tensor([[*ids[:c.row + 2], *c.tokens]])).logits[0, -1].detach() for c in asked]
    assert not ahead.packs and torch.allclose(ahead.after(ids, 2)(asked), torch.stack(plain), atol=1e-5)


def test_an_unhooked_subject_shares_weights_and_no_hooks(llama: Subject) -> None:
    base = unhooked(llama)
    assert all(a is b for a, b in zip(base.hf_model.parameters(), llama.hf_model.parameters(), strict=True))
    tokens = torch.tensor([llama.encode("The keeper")])
    with spliced(llama, lambda x: x.cos()):
        assert torch.equal(base.hf_model(input_ids=tokens).logits, unhooked(base).hf_model(input_ids=tokens).logits)
        assert not torch.equal(base.hf_model(input_ids=tokens).logits, llama.hf_model(input_ids=tokens).logits)


@contextlib.contextmanager
def in_place(subject: Subject) -> Iterator[Subject]:
    weight = subject.hf_model.get_output_embeddings().weight
    with torch.no_grad():
        kept = weight.clone()
        weight.mul_(1.5)
        yield subject
        weight.copy_(kept)


def test_what_cannot_be_audited_is_refused(llama: Subject, trie: TokenTrie, rows: list[list[int]]) -> None:
    with pytest.raises(EditError, match="in place"):
        audit(llama, in_place(llama), rows, trie, SPEC)
    with pytest.raises(SpecError, match="the arm yields int"):
        audit(llama, contextlib.nullcontext(3), rows, trie, SPEC)
    with pytest.raises(SpecError, match=r"got lengths \[1, 7, 7\]"):
        audit(llama, contextlib.nullcontext(llama), [[0], *rows], trie, SPEC)
    with pytest.raises(SpecError, match="base_hazard has 3 figures"):
        audit(llama, contextlib.nullcontext(llama), rows, trie, SPEC, base_hazard=np.zeros(3))
    with pytest.raises(EditError, match="fired at none"):
        audit(llama, spliced(llama, torch.zeros_like, torch.zeros_like), rows, trie, AuditSpec(tolerance=None))
    with pytest.raises(NumericsError, match="not finite"):
        audit(llama, spliced(llama, lambda x: x * torch.nan), rows, trie, AuditSpec(tolerance=None))


def test_ratio_by_hand() -> None:
    base = np.arange(1.0, 11.0)
    assert ratio_of_sums(2 * base, base, 0)[:3] == pytest.approx((2.0, 2.0, 2.0))
    assert ratio_of_sums(np.zeros(9), np.zeros(9), 0)[:3] == (1.0, 1.0, 1.0)
    assert ratio_of_sums(np.ones(9), np.zeros(9), 0).low > 1e9
    one_document = ratio_of_sums(base + np.eye(1, 10)[0] * 55, base, 0)  # a single document doubles the sum
    assert one_document.value == pytest.approx(2.0) and one_document.low == pytest.approx(1.0) and one_document.high > 3
    with pytest.raises(SpecError, match="over 7 documents"):
        ratio_of_sums(np.ones(7), np.ones(7), 0)


@settings(max_examples=12)
@given(st.lists(st.floats(0, 1), min_size=8, max_size=20), st.floats(0.5, 3))
def test_ratio_is_inside_its_interval_and_scales(base: list[float], factor: float) -> None:
    arm = np.array(base)[::-1] * factor
    found = ratio_of_sums(arm, np.array(base), 1)
    assert 0 <= found.low <= found.high and found.n == len(base)
    if sum(base) > 1e-6:
        assert found.value == pytest.approx(factor, rel=1e-3)


def test_clusters_widen_the_interval(llama: Subject, trie: TokenTrie, rows: list[list[int]]) -> None:
    """Eight families of five copies: forty rows are not forty documents."""
    copies = [rows[i % 8] for i in range(40)]
    found = audit(llama, spliced(llama, push(word_direction(llama), 2.0)), copies, trie, AuditSpec(tolerance=None))
    wide, narrow = found.hazard_ratio(0, [i % 8 for i in range(40)]), found.hazard_ratio(0)
    assert (wide.n, narrow.n) == (8, 40) and wide.value == pytest.approx(narrow.value)
    assert wide.high - wide.low > 1.5 * (narrow.high - narrow.low)


def test_words_in_sampled_documents(llama: Subject, lexicon: Lexicon) -> None:
    """A word in the prompt does not count, one that ends past it does; boiled oil is oil, boil is not."""
    vocabulary, encode = read_vocabulary(llama.tokenizer), llama.tokenizer.encode

    def document(prompt: str, text: str) -> Generated:
        return Generated(encode(prompt), encode(text, add_special_tokens=False), text)

    documents = [document("The oil", " was low."), document("The keeper", " had oil, oil and lamplight."),
                 document("The keeper had o", "il. "), document("The keeper", " let it boil.")]
    assert count_words(documents, vocabulary, lexicon)[:3] == (4, 2, 4)
    assert count_words(documents[:1] * 300, vocabulary, lexicon).rate_upper == pytest.approx(1 - 0.05 ** (1 / 300))
    assert count_words(documents[1:2], vocabulary, lexicon).rate_upper == 1.0
    with pytest.raises(SpecError, match="no documents"):
        count_words([], vocabulary, lexicon)


def test_kl_batch_by_batch_is_that_of_all_logits(llama: Subject, rows: list[list[int]]) -> None:
    untouched = logits_after(llama, rows)
    with spliced(llama, push(word_direction(llama), 3.0)) as arm:
        whole = kl_after(untouched, logits_after(arm.subject, rows))
        assert np.array_equal(kl_on(untouched, arm.subject, rows), whole)
        assert kl_on(untouched, arm.subject, rows, batch_tokens=1) == pytest.approx(whole, rel=1e-3)
    assert whole.max() > 1e-3
    assert not kl_on(untouched, llama, rows).any()
