"""Carried attribution: equal to what a small floor does to D, blind to the decision site, zero where nothing is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from features.carried import Levels, attribution_of, decision_slopes, levels, lexical_direction
from features.concepts import Situation
from features.deciding import tokenised
from sae.dictionary import LinearDictionary, Provenance, ReLU
from tests import tiny_keeper
from undertow.core.errors import TextError
from undertow.subjects import Subject, load_subject, splice, tap
from undertow.subjects.splicing import EditResult, Window

D_SAE = 12
SITUATIONS = [Situation(f"At the {place} it was {word} all night. The keeper",
                        {"give": (" gave Ana the oil.",), "keep": (" kept the oil.", " locked it away.")}, "give", "keep")
              for place, word in (("mill", "warm"), ("inn", "cold"), ("ferry", "warm"))]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(tiny_keeper.save_random(tmp_path_factory.mktemp("tiny") / "llama")), "cpu", "float64")


@pytest.fixture(scope="module", params=["blocks.0.hook_resid_post", "blocks.1.hook_resid_pre", "blocks.0.hook_resid_pre",
                                        "blocks.0.hook_mlp_out"])
def site_name(request: pytest.FixtureRequest) -> str:
    return request.param


def dictionary(subject: Subject, site: str) -> LinearDictionary:
    rows = torch.randn(D_SAE, subject.d_model, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return LinearDictionary(rows.T.contiguous(), torch.zeros(D_SAE, dtype=torch.float64), rows,
                            torch.zeros(subject.d_model, dtype=torch.float64), ReLU(), Provenance("llama", site, 32, True))


def first_token_d(subject: Subject, situation: Situation) -> float:
    decision = tokenised(subject, situation)
    with torch.inference_mode():
        logits = subject.hf_model(input_ids=torch.tensor([decision.prompt])).logits[0, -1]
    sides = [sorted({wording[0] for wording in act}) for act in (decision.costly, decision.keep)]
    return float(logits[sides[0]].logsumexp(0) - logits[sides[1]].logsumexp(0))


def test_equals_the_slope_of_a_floor_before_the_decision(subject: Subject, site_name: str) -> None:
    site, step = subject.site(site_name), 1e-3
    sae = dictionary(subject, site_name)
    known = Levels(np.ones(D_SAE), np.full(D_SAE, 0.8))
    found = attribution_of(sae, decision_slopes(subject, site, SITUATIONS), known)
    directions = sae.directions(torch.arange(D_SAE))
    for latent in (0, 5, 11):
        slopes = []
        for situation in SITUATIONS:
            ids = subject.encode(situation.prompt)
            room = (0.8 - sae.encode(tap(subject, torch.tensor([ids]), site)[0])[:, latent]).clamp(min=0)

            after = []
            for by in (step, -step):  # RMSNorm computes in float32, so smaller steps see rounding

                def edit(x: torch.Tensor, editable: torch.Tensor, by: float = by, room: torch.Tensor = room,
                         latent: int = latent) -> EditResult:
                    return EditResult((by * room[:, None] * directions[latent])[None], editable)

                with splice(subject, site, edit, window=Window(0, len(ids) - 1)):
                    after.append(first_token_d(subject, situation))
            slopes.append((after[0] - after[1]) / (2 * step))
        assert found[latent] == pytest.approx(np.mean(slopes), rel=5e-3, abs=1e-4)
    assert np.abs(found).max() > 1e-3


def test_a_latent_above_its_level_has_no_room(subject: Subject) -> None:
    site = subject.site("blocks.0.hook_resid_post")
    sae = dictionary(subject, site.name)
    assert not attribution_of(sae, decision_slopes(subject, site, SITUATIONS), Levels(np.ones(D_SAE), np.zeros(D_SAE))).any()


def test_hooks_are_gone_and_weights_have_no_gradient(subject: Subject) -> None:
    site = subject.site("blocks.0.hook_resid_post")
    before = first_token_d(subject, SITUATIONS[0])
    decision_slopes(subject, site, SITUATIONS)
    assert first_token_d(subject, SITUATIONS[0]) == before
    assert all(not block._forward_hooks and not block._forward_pre_hooks for block in subject.blocks)
    assert all(parameter.grad is None for parameter in subject.hf_model.parameters())


def test_levels_are_those_of_a_plain_count(subject: Subject) -> None:
    site = subject.site("blocks.0.hook_resid_post")
    sae = dictionary(subject, site.name)
    rows = [subject.encode(situation.prompt) for situation in SITUATIONS]
    codes = torch.cat([sae.encode(tap(subject, torch.tensor([row]), site)[0, 1:]) for row in rows]).numpy()
    found = levels(subject, sae, site, rows)
    for latent in range(D_SAE):
        fired = np.sort(codes[codes[:, latent] > 0, latent])
        assert found.rate[latent] == pytest.approx(len(fired) / len(codes))
        expected = fired[int(0.9 * (len(fired) - 1))] if len(fired) else 0.0
        assert found.high[latent] == pytest.approx(expected, rel=1e-6)


def test_acts_that_begin_alike_are_refused(subject: Subject) -> None:
    alike = Situation("It was cold. The keeper", {"give": (" kept it for Ana.",), "keep": (" kept it.",)}, "give", "keep")
    site = subject.site("blocks.0.hook_resid_post")
    with pytest.raises(TextError, match="cannot be told apart by the first tokens"):
        decision_slopes(subject, site, [alike])


def test_the_word_is_raised_along_its_direction_and_across_it_is_not(subject: Subject) -> None:
    site, rows = subject.site("blocks.0.hook_resid_post"), [subject.encode(situation.prompt) for situation in SITUATIONS]
    tokens = torch.tensor([5, 9])
    along = lexical_direction(subject, site, rows, tokens)
    across = torch.nn.functional.normalize(torch.randn(len(along), generator=torch.Generator().manual_seed(0)), dim=0)
    across = torch.nn.functional.normalize(across - (across @ along) * along, dim=0)

    def said(direction: torch.Tensor) -> float:
        def edit(x: torch.Tensor, editable: torch.Tensor) -> EditResult:
            return EditResult((1e-2 * direction).expand_as(x), editable)

        total = 0.0
        for row in rows:
            with splice(subject, site, edit, window=Window(0, len(row) - 1)), torch.inference_mode():
                logits = subject.hf_model(input_ids=torch.tensor([row])).logits[0]
            total += float(logits.log_softmax(-1)[:, tokens].logsumexp(-1).sum())
        return total

    assert float(along.norm()) == pytest.approx(1.0)
    assert said(along) > said(0 * along) > said(-along)
    assert abs(said(across) - said(0 * along)) < 0.2 * (said(along) - said(0 * along))

