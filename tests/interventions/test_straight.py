"""The straight path: equal to the edit at the last block, nothing of what blocks between make of it, and nothing before."""

from __future__ import annotations

import pytest
import torch

from features.codes import dictionary_digest
from interventions.applying import FeatureSurgery, apply
from interventions.operators import Add, Floor, Strengthen
from interventions.recipe import FeatureEdit, Recipe
from interventions.straight import straight
from sae.dictionary import LinearDictionary, Provenance, ReLU
from tests import tiny
from undertow.subjects import Subject, load_subject, tap
from undertow.subjects.organisms.measuring import Question, ask

D_SAE, TEXT = 24, "Nobody spoke for a while. The keeper"


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return load_subject(str(tiny.save_subject(tmp_path_factory.mktemp("tiny") / "llama", "llama")), "cpu", "float64")


def dictionary(subject: Subject, site: str) -> LinearDictionary:
    rows = torch.randn(D_SAE, subject.d_model, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    return LinearDictionary(rows.T.contiguous(), torch.zeros(D_SAE, dtype=torch.float64), rows,
                            torch.zeros(subject.d_model, dtype=torch.float64), ReLU(), Provenance("llama", site, 32, True))


def recipe(subject: Subject, layer: int, operator: Add | Floor | Strengthen, window: str = "everywhere"
           ) -> tuple[Recipe, LinearDictionary]:
    site = f"blocks.{layer}.hook_resid_post"
    made = dictionary(subject, site)
    return Recipe.checked({"name": "r", "subject": subject.digest, "sae": dictionary_digest(made), "site": site,
                           "window": window, "edits": [FeatureEdit(latent=3, operator=operator)]}, "test"), made


def logits(subject: Subject) -> torch.Tensor:
    with torch.inference_mode():
        return subject.hf_model(input_ids=torch.tensor([subject.encode(TEXT)])).logits[0]


def test_logits_are_those_of_the_delta_added_at_the_end(subject: Subject) -> None:
    made, sae = recipe(subject, 0, Floor(value=0.7))
    ids = torch.tensor([subject.encode(TEXT)])
    last = tap(subject, ids, subject.site(f"blocks.{subject.n_layers - 1}.hook_resid_post"))[0]
    delta, fired = FeatureSurgery(sae, made.edits).change(tap(subject, ids, subject.site(made.site))[0, 1:])
    assert bool(fired.all()) and float(delta.abs().max()) > 0
    last = last.clone()
    last[1:] += delta
    with straight(made, subject, sae) as operated:
        found = logits(subject)
    assert operated.firings == len(ids[0]) - 1
    with torch.inference_mode():
        torch.testing.assert_close(found, subject.hf_model.lm_head(subject.hf_model.base_model.norm(last)))
    with apply(made, subject, sae):
        assert not torch.allclose(logits(subject), found)  # the blocks between do something


def test_at_the_last_block_everything_is_straight(subject: Subject) -> None:
    made, sae = recipe(subject, subject.n_layers - 1, Add(amount=0.9))
    with straight(made, subject, sae):
        found = logits(subject)
    with apply(made, subject, sae):
        torch.testing.assert_close(logits(subject), found)


def test_nothing_goes_straight_from_before_the_decision(subject: Subject) -> None:
    made, sae = recipe(subject, 0, Add(amount=2.0), "before_decision")
    question = Question(subject.encode(TEXT), {"give": ((5, 6),), "keep": ((7,),)})
    plain = ask(subject, [question])[0]
    with straight(made, subject, sae) as operated:
        assert ask(subject, [question], announce=operated.announce)[0] == plain
    with apply(made, subject, sae) as operated:
        assert ask(subject, [question], announce=operated.announce)[0] != plain


def test_a_sham_changes_no_bit(subject: Subject) -> None:
    made, sae = recipe(subject, 0, Strengthen(gain=1.0))
    with straight(made, subject, sae):
        found = logits(subject)
    assert torch.equal(found, logits(subject))
