"""Causes: D and its changes against the plain way to compute them, gradients against differences, sums against wholes."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from features.causal import (
    Baseline,
    act_writer_share,
    attribution,
    attribution_given,
    causal_direction,
    changes,
    joint_effects,
    patch_effects,
    rank_correlation,
    read_baseline,
    writer_shares,
)
from features.deciding import Primed, d_gradient, d_under, tokenised
from tests.features.planted import D_SAE, LATENT, planted
from undertow.core.errors import DictionaryError, TextError
from undertow.subjects.organisms.measuring import Question, ask
from undertow.subjects.scoring import score
from undertow.subjects.sites import Site
from undertow.subjects.splicing import EditResult, splice
from undertow.subjects.tapping import tap
from undertow.subjects.unembed import final_norm


class _OnPrompt(NamedTuple):
    """Adds `delta` to the last token of a row as long as the prompt, and nothing to the wordings."""

    length: int
    delta: Tensor

    def __call__(self, x: Tensor, editable: Tensor) -> EditResult:
        delta = torch.zeros_like(x)
        if x.shape[1] == self.length:
            delta[:, -1] = self.delta
        return EditResult(delta, editable)


def plain_d(baseline: Baseline, row: int, delta: Tensor) -> float:
    decision = baseline.decisions[row]
    with splice(baseline.subject, baseline.site, _OnPrompt(len(decision.prompt), delta)):
        scores = score(baseline.subject, decision.prompt, [*decision.costly, *decision.keep]).double()
    costly, keep = scores.split([len(decision.costly), len(decision.keep)])
    return float(costly.logsumexp(0) - keep.logsumexp(0))


def test_d_is_the_exact_one() -> None:
    baseline = planted().baseline
    questions = [Question(d.prompt, {"costly": d.costly, "keep": d.keep}) for d in baseline.decisions]
    expected = [answer.log_ratio("costly", "keep") for answer in ask(baseline.subject, questions)]
    np.testing.assert_allclose(baseline.d, expected, atol=1e-4)


@pytest.mark.parametrize("layer", [0, 1])
def test_changes_against_a_splice_of_the_whole_pass(layer: int) -> None:
    baseline = planted(layer).baseline
    deltas = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    found = changes(baseline, lambda row: deltas)
    for row in (0, 4):
        for column in range(3):
            expected = plain_d(baseline, row, deltas[column]) - baseline.d[row]
            assert found[row, column] == pytest.approx(expected, abs=2e-4)


def test_batches_of_deltas_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    baseline = planted().baseline
    deltas = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    together = changes(baseline, lambda row: deltas)
    monkeypatch.setattr("features.deciding._CACHED_TOKENS", 300)
    np.testing.assert_allclose(changes(baseline, lambda row: deltas), together, atol=1e-5)


def test_gradient_against_a_difference() -> None:
    baseline = planted().baseline
    primed, decision, site = baseline.primed[2], baseline.decisions[2], baseline.site
    at, way = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    step = 1e-2
    with torch.no_grad():
        low, high = d_under(primed, decision, site, torch.stack([at - step * way, at + step * way]))
    slope = float(high - low) / (2 * step)
    assert float(d_gradient(primed, decision, site, at) @ way) == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_attributions_and_the_error_add_up_to_the_whole() -> None:
    made = planted()
    found = attribution(made.baseline, made.pairs)
    assert found.latents.sum() + found.error == pytest.approx(found.whole, abs=1e-5)
    assert abs(found.error) > 1e-6  # the latents do not span all that changes from prompt to prompt
    assert int(np.argmax(found.latents)) == LATENT


def test_integrated_gradients_reach_the_exact_effect() -> None:
    made = planted()
    once = attribution(made.baseline, made.pairs)
    many = attribution(made.baseline, made.pairs, [(i + 0.5) / 8 for i in range(8)])
    assert once.exact == many.exact
    assert many.whole == pytest.approx(many.exact, rel=1e-3, abs=1e-6)


def test_patching_alone_and_together() -> None:
    made = planted()
    alone = patch_effects(made.baseline, range(D_SAE))
    assert int(np.argmax(alone)) == LATENT
    assert alone[LATENT] > 0
    sets = joint_effects(made.baseline, [[], [LATENT], [LATENT, 3], [3, LATENT]])
    assert (sets[:, 0] == 0).all()
    assert made.baseline.families.mean(sets)[1] == pytest.approx(alone[LATENT], abs=1e-6)
    np.testing.assert_allclose(sets[:, 2], sets[:, 3], atol=1e-6)
    correlation = rank_correlation(attribution(made.baseline, made.pairs).latents, alone)
    assert correlation is not None
    assert correlation > 0.5


def test_a_latent_that_is_there_already_does_nothing() -> None:
    made = planted()
    still = dataclasses.replace(made.baseline, targets=made.baseline.codes[0])
    assert (joint_effects(still, [list(range(D_SAE))])[0] == 0).all()


def test_attribution_given_a_set_is_the_slope_there() -> None:
    baseline = planted().baseline
    found = attribution_given(baseline, [LATENT], [3, LATENT])
    row_slopes = [d_gradient(baseline.primed[i], baseline.decisions[i], baseline.site, baseline.writes(i, [LATENT])[0])
                  for i in range(len(baseline.decisions))]
    expected = np.mean([float(baseline.writes(i, [3])[0] @ row_slopes[i]) for i in range(len(row_slopes))])
    assert found[0] == pytest.approx(expected, abs=1e-6)


def test_causal_direction() -> None:
    made = planted()
    found = causal_direction(made.baseline, made.pairs)
    # the planted latent alone carries the difference, and nothing else has one
    assert found.cosine == pytest.approx(1.0, abs=1e-4)
    assert found.explained == pytest.approx(1.0, abs=1e-3)
    assert found.effect > 0
    assert found.causal_share is None or found.causal_share == pytest.approx(1.0, abs=1e-2)


def test_writer_share_by_hand() -> None:
    """The direct part, with the last block's output at the decision moved and everything after computed by hand."""
    baseline = planted(0).baseline
    subject, last = baseline.subject, Site(1, "resid_post")
    latents = [LATENT, 3, 5]
    direct = []
    for row, decision in enumerate(baseline.decisions):
        moved = tap(subject, torch.tensor([decision.prompt]), last)[0, -1] + baseline.writes(row, latents).sum(dim=0)
        head = subject.hf_model.get_output_embeddings()
        with torch.no_grad():
            first = head(final_norm(subject)(moved)).log_softmax(-1)
            still = head(final_norm(subject)(tap(subject, torch.tensor([decision.prompt]), last)[0, -1])).log_softmax(-1)
        scores = score(subject, decision.prompt, [*decision.costly, *decision.keep]).double()
        scores += torch.stack([first[w[0]] - still[w[0]] for w in (*decision.costly, *decision.keep)])
        costly, keep = scores.split([len(decision.costly), len(decision.keep)])
        direct.append(float(costly.logsumexp(0) - keep.logsumexp(0)) - baseline.d[row])
    found = act_writer_share(baseline, latents)
    assert found.direct == pytest.approx(np.mean(direct), abs=2e-4)
    assert found.effect == pytest.approx(joint_effects(baseline, [latents]).mean(), abs=1e-6)


def test_after_the_last_block_everything_is_written_straight() -> None:
    baseline = planted(1).baseline
    found = act_writer_share(baseline, [LATENT])
    assert found.direct == found.effect
    big = dataclasses.replace(baseline, targets=baseline.targets + 5)
    effects = patch_effects(big, [LATENT, 3])
    shares = writer_shares(big, [LATENT, 3], effects)
    assert all(share is None or share == pytest.approx(1.0) for share in shares)
    assert shares[0] is not None
    assert act_writer_share(baseline, []).share is None


def test_rank_correlation() -> None:
    assert rank_correlation(np.array([1.0, 2.0, 4.0]), np.array([0.1, 5.0, 6.0])) == pytest.approx(1.0)
    assert rank_correlation(np.array([1.0, 2.0]), np.array([1.0, 2.0])) is None
    assert rank_correlation(np.ones(4), np.arange(4.0)) is None


def test_refusals() -> None:
    made = planted()
    with pytest.raises(DictionaryError, match="targets of 3 latents given with an SAE of 24"):
        read_baseline(made.subject, made.dictionary, made.site, made.pairs, np.zeros(3, dtype=np.float32))
    with pytest.raises(DictionaryError, match="no feature 24"):
        patch_effects(made.baseline, [24])
    with pytest.raises(TextError, match="has 1 tokens"):
        tokenised(made.subject, made.pairs[0].negative._replace(prompt=""))
    assert Primed(made.subject, [0, 1]).next_logits(made.site, torch.zeros(2, 16)).shape[0] == 2
