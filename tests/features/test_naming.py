"""Naming screens: a latent that writes the word, and one that fires beside it, fail; matches are alike; tokens are whole."""

from __future__ import annotations

import dataclasses
from functools import cache

import numpy as np
import pytest
import torch

from features.examples import N_BINS, ExampleTable
from features.naming import (
    Names,
    context_scores,
    logit_scores,
    matched_latents,
    named,
    output_scores,
    screens,
    word_tokens,
)
from features.ranking import AFTER, BEFORE, Examples
from sae.dictionary import LinearDictionary, Provenance, ReLU
from tests.features.planted import subject
from undertow.core.errors import DictionaryError, SpecError, TextError
from undertow.lexicon import Lexicon
from undertow.lexicon.forms import LexiconSpec
from undertow.subjects.tapping import tap
from undertow.subjects.unembed import UnembedView, final_norm, final_norm_and_unembed

D_SAE, WRITER, READER, PLAIN = 150, 0, 1, 2
LOVE = Lexicon.load("love").only(languages=["en"])
TEXTS = ["The keeper said that Ana would love plums and a bath.", "The keeper counted the oil and closed the door at night."]


@cache
def names() -> Names:
    """150 latents that fire alike; one writes the word's tokens, one fires only beside the word."""
    model = subject()
    unembed = final_norm_and_unembed(model)
    tokens = word_tokens(model, LOVE)
    rows = torch.randn(D_SAE, model.d_model, generator=torch.Generator().manual_seed(0))
    rows[WRITER] = (unembed.W_U[tokens].mean(dim=0) - unembed.W_U.mean(dim=0)) / unembed.gamma
    rows = torch.nn.functional.normalize(rows)
    dictionary = LinearDictionary(rows.T.contiguous(), torch.zeros(D_SAE), rows, torch.zeros(model.d_model), ReLU(),
                                  Provenance.unknown())
    return Names(model, dictionary, model.site("blocks.1.hook_resid_post"), table(), LOVE, TEXTS[1:])


def table() -> ExampleTable:
    model = subject()
    ids = [model.encode(text) for text in TEXTS]
    tokens = np.full((2, max(map(len, ids))), -1, dtype=np.int32)
    for row, known in enumerate(ids):
        tokens[row, : len(known)] = known
    rows = np.ones((D_SAE, 2), dtype=np.int64)
    rows[READER] = 0
    rows[3] = [0, -1]
    rows[4] = -1
    places = np.where(rows < 0, -1, 3)
    shown = Examples(places, rows, places, (rows >= 0).astype(np.float32), np.zeros((D_SAE, 2, BEFORE + 1 + AFTER), np.float32))
    counts = np.full(D_SAE, 10, dtype=np.int64)
    return ExampleTable("memory", 1000, 0, counts, np.full(D_SAE, 2.0, np.float32), np.full(D_SAE, 4.0),
                        np.zeros((D_SAE, N_BINS), np.int64), shown, shown, tokens)


def test_the_writer_and_the_reader_of_the_word_fail() -> None:
    found = screens(names(), [WRITER, READER, PLAIN])
    assert WRITER in named(found)
    assert READER in named(found)
    assert not found[WRITER]["logit"].passed
    assert not found[WRITER]["output"].passed
    assert found[WRITER]["output"].value > 0
    assert found[READER]["contexts"].value == 1.0
    assert found[READER]["contexts"].matched == 0.0
    assert found[PLAIN]["contexts"].passed
    assert screens(names(), []) == {}


def test_few_plain_latents_fail() -> None:
    plain = screens(names(), range(10, 40))
    failed = {name: sum(not measured[name].passed for measured in plain.values()) for name in ("logit", "contexts", "output")}
    assert failed["contexts"] == 0
    assert max(failed.values()) <= 6  # 5 % each are expected


def test_logit_score_by_hand() -> None:
    # gamma · d = (2, 3) → effects (2, 3, 10), centred (−3, −2, 5), standard deviation √(38 / 2) = √19.
    view = UnembedView(torch.tensor([2.0, 1.0]), False, torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0]]))
    score = logit_scores(torch.tensor([[1.0, 3.0]]), view, torch.tensor([0, 1]))
    np.testing.assert_allclose(score, [-2 / np.sqrt(19)], rtol=1e-6)


def test_context_score_by_hand() -> None:
    found = context_scores(subject(), table(), LOVE, [PLAIN, READER, 3, 4])
    assert found.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_output_score_by_hand() -> None:
    made = names()
    tokens = word_tokens(made.subject, LOVE)
    head = made.subject.hf_model
    delta = torch.randn(1, made.subject.d_model, generator=torch.Generator().manual_seed(3))
    found = output_scores(made.subject, made.site, TEXTS[:1], torch.cat([0 * delta, delta]), tokens)
    assert found[0] == pytest.approx(0.0, abs=1e-6)
    ids = torch.tensor([made.subject.encode(TEXTS[0])])
    x = tap(made.subject, ids, made.site)[0, -1] + delta[0]
    with torch.no_grad():  # the site is the last one, so what follows is the final norm and the unembedding
        plain = head(ids).logits[0, -1].log_softmax(-1)[tokens].logsumexp(0)
        moved = head.get_output_embeddings()(final_norm(made.subject)(x)).log_softmax(-1)[tokens].logsumexp(0)
    assert found[1] == pytest.approx(float(moved - plain), abs=1e-4)


def test_matches_are_alike_and_never_under_test() -> None:
    made = table()
    counts, means = made.counts.copy(), made.means.copy()
    counts[:60], means[:60] = 900, 40.0
    counts[100] = 0
    uneven = dataclasses.replace(made, counts=counts, means=means)
    found = matched_latents(uneven, names().dictionary, [5, 100, 149], 40)
    assert set(found[5]) <= set(range(60)) - {5}
    assert set(found[149]) <= set(range(60, 149)) - {100}
    assert len(set(found[100])) == 40
    with pytest.raises(DictionaryError, match="147 latents fire besides those under test; 148 matches"):
        matched_latents(uneven, names().dictionary, [5, 100, 149], 148)


def test_word_tokens_say_at_least_half_of_a_form() -> None:
    model = subject()
    for token in word_tokens(model, LOVE).tolist():
        said = str(model.tokenizer.decode([token])).strip().lower()
        assert any(form.text.lower().startswith(said) for form in LOVE.forms("T0")), said
        assert len(said) >= 2


def test_tokens_that_say_a_whole_form() -> None:
    model = subject()
    whole, halves = (word_tokens(model, LOVE, share=share).tolist() for share in (1.0, 0.5))
    said = {str(model.tokenizer.decode([token])).strip().lower() for token in whole}
    assert said <= {form.text.lower() for form in LOVE.forms("T0")} and "love" in said
    assert set(whole) < set(halves)


def test_refusals() -> None:
    unknown = Lexicon.from_spec(LexiconSpec.checked({"name": "none", "tiers": {"T0": {"en": ["love"]}}}))
    emptied = dataclasses.replace(unknown, entries=tuple(f._replace(text="") for f in unknown.entries))
    with pytest.raises(SpecError, match="no form of lexicon 'none' can be written"):
        word_tokens(subject(), emptied)
    with pytest.raises(TextError, match="at least one prompt"):
        screens(names()._replace(prompts=[]), [PLAIN])
    made = table()
    shown = Examples(*(part[:9] for part in made.top))
    small = ExampleTable("memory", 1000, 0, made.counts[:9], made.maxima[:9], made.means[:9], made.histogram[:9], shown, shown,
                         made.tokens)
    with pytest.raises(DictionaryError, match="a table of 9 latents given with an SAE of 150"):
        screens(names()._replace(table=small), [PLAIN])
