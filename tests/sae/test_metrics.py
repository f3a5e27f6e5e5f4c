"""The figures: by hand, and against plain transformers with hooks written here."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sae.corpus import Corpus, TextSpec, TokenBatch, open_corpus
from sae.dictionary import Codes, LinearDictionary, Provenance, ReLU, TopK
from sae.evaluation import evaluate
from sae.harvesting import Source, harvest
from sae.metrics import Loss, LossTable, Reconstruction, ReconstructionSum, loss_table, reconstruction
from tests import tiny
from undertow.core.errors import TextError
from undertow.subjects import Site, Subject, load_subject

SITE = Site(1, "resid_post")
NO_CEILING = math.inf
D = tiny.D_MODEL


def identity() -> LinearDictionary:
    """Latent j is the positive, latent D + j the negative part of coordinate j: reconstructs every vector exactly."""
    both = torch.cat([torch.eye(D), -torch.eye(D)])
    return LinearDictionary(both.T.contiguous(), torch.zeros(2 * D), both, torch.zeros(D), ReLU(), Provenance.unknown())


def random_dictionary(k: int = 4, n: int = 96) -> LinearDictionary:
    rows = torch.nn.functional.normalize(torch.randn(n, D, generator=torch.Generator().manual_seed(5)))
    return LinearDictionary(rows.T.contiguous(), torch.zeros(n), rows, torch.zeros(D), TopK(k), Provenance.unknown())


# Reconstruction


def test_reconstruction_by_hand() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 2.0], [2.0, -2.0]])  # mean (2, 0), Σ‖x − x̄‖² = 1 + 1 + 4 + 4
    recon = x + torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, -1.0], [0.0, 0.0]])  # Σ‖x − x̂‖² = 2
    codes = Codes(torch.tensor([0, 1, 1, 3]), torch.tensor([0, 0, 1, 0]), torch.tensor([1.0, 2.0, 0.5, 3.0]))
    total = ReconstructionSum(d_in=2, d_sae=5)
    total.add(x, recon, codes)
    found = total.result()
    assert found.fvu == pytest.approx(0.2)
    assert found.l0 == 1.0
    assert found.dead_share == 0.6
    assert found.density.tolist() == [0.75, 0.25, 0, 0, 0]
    assert found.mean.tolist() == [2, 0]
    assert found.tokens == 4


def test_fvu_of_the_mean_is_one_and_of_zero_is_more() -> None:
    x = torch.randn(300, D, generator=torch.Generator().manual_seed(0)) + 3
    nothing = Codes(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), torch.empty(0))
    for recon, expected in ((x.mean(dim=0).expand_as(x), 1.0),
                            (torch.zeros_like(x), float(x.square().sum() / (x - x.mean(dim=0)).square().sum()))):
        total = ReconstructionSum(D, 3)
        total.add(x, recon, nothing)
        assert total.result().fvu == pytest.approx(expected, rel=1e-6)
    assert expected > 5


def test_fvu_far_from_the_origin() -> None:
    """The variance is a difference of large sums: it has to survive a mean a thousand times the spread."""
    x = torch.randn(500, D, generator=torch.Generator().manual_seed(1)) + 1000
    recon = x + 0.1 * torch.randn(500, D, generator=torch.Generator().manual_seed(2))
    wide = x.double()
    expected = float((wide - recon.double()).square().sum() / (wide - wide.mean(dim=0)).square().sum())
    total = ReconstructionSum(D, 2)
    for a, b in zip(x.split(37), recon.split(37), strict=True):
        total.add(a, b, Codes(torch.tensor([0]), torch.tensor([0]), torch.tensor([1.0])))
    assert total.result().fvu == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_chunk_size_does_not_matter(size: int) -> None:
    x = torch.randn(101, D, generator=torch.Generator().manual_seed(3))
    sae = random_dictionary()
    found = reconstruction(sae, x.split(size))
    f = sae.encode(x)
    recon = sae.decode(f)
    assert found.fvu == pytest.approx(float((x - recon).square().sum() / (x - x.mean(dim=0)).square().sum()), rel=1e-5)
    assert found.l0 == pytest.approx(float((f > 0).sum()) / 101, rel=1e-12)
    assert found.dead_share == pytest.approx(float(((f > 0).sum(dim=0) == 0).double().mean()), rel=1e-12)
    torch.testing.assert_close(found.density, (f > 0).float().mean(dim=0))
    torch.testing.assert_close(found.mean, x.mean(dim=0))


def test_perfect_and_random_dictionary() -> None:
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(4))
    assert reconstruction(identity(), [x]).fvu == 0
    assert reconstruction(identity(), [x]).l0 == D
    assert reconstruction(random_dictionary(), [x]).fvu > 0.2
    assert reconstruction(random_dictionary(), [x]).l0 <= 4


def test_histogram_by_hand() -> None:
    density = torch.tensor([0, 0, 1.0, 0.5, 0.1, 0.05, 1e-3, 2e-6])
    found = Reconstruction(0, 0, 0, density, torch.zeros(1), 1).histogram()
    assert found == {"dead": 2, "1e-7..1e-6": 0, "1e-6..1e-5": 1, "1e-5..1e-4": 0, "1e-4..1e-3": 1, "1e-3..1e-2": 0,
                     "1e-2..1e-1": 2, "1e-1..1e0": 2}


def test_nothing_to_judge() -> None:
    with pytest.raises(TextError, match="held-out text is empty"):
        reconstruction(identity(), [])


# Loss


class Setting(NamedTuple):
    """A subject in float64, and a few rows of its held-out text, the last one padded."""

    subject: Subject
    corpus: Corpus
    batches: list[TokenBatch]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def setting(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    folder = tmp_path_factory.mktemp("metrics")
    tiny.save_text(folder / "text.jsonl")
    subject = load_subject(str(tiny.save_subject(folder / "model", request.param)), device="cpu", dtype="float64")
    spec = TextSpec(source=str(folder / "text.jsonl"), context=32, held_out=0.2)
    corpus = open_corpus(spec, "held_out", subject.tokenizer, subject.bos_id)
    rows = list(corpus.batches(1))
    cut = corpus.batches(3, skip_rows=len(rows) - 6)
    batches = list(cut)
    assert not batches[-1].attend.all()
    return Setting(subject, corpus, batches)


def block(subject: Subject) -> torch.nn.Module:
    model: Any = subject.hf_model
    return (model.transformer.h if model.config.model_type == "gpt2" else model.model.layers)[SITE.layer]


def by_hand(setting: Setting, replace: Callable[[Tensor], Tensor], ceiling: float, everywhere: bool = False) -> Loss:
    """Row by row and without padding: plain cross-entropy and KL, with a hook of our own."""
    ce = kl = 0.0
    n = 0
    for batch in setting.batches:
        for tokens, attend, measured in zip(batch.tokens, batch.attend, batch.measured, strict=True):
            length = int(attend.sum())
            row, counts = tokens[None, :length], measured[:length]

            def hook(_module: Any, _args: Any, output: Any, counts: Tensor = counts) -> Any:
                hidden = output if isinstance(output, Tensor) else output[0]
                changed = hidden.clone()
                for position in range(hidden.shape[1]):
                    if everywhere or (counts[position] and float(hidden[0, position].norm()) <= ceiling):
                        changed[0, position] = replace(hidden[0, position])
                return changed if isinstance(output, Tensor) else (changed, *output[1:])

            with torch.inference_mode():
                base = setting.subject.hf_model(input_ids=row).logits[0].log_softmax(-1)
                handle = block(setting.subject).register_forward_hook(hook)
                arm = setting.subject.hf_model(input_ids=row).logits[0].log_softmax(-1)
                handle.remove()
            for position in range(length - 1):
                if counts[position + 1]:
                    ce -= float(arm[position, row[0, position + 1]])
                    kl += float((base[position].exp() * (base[position] - arm[position])).sum())
                    n += 1
    return Loss(ce / n, kl / n)


def table_of(setting: Setting, sae: LinearDictionary, mean: Tensor, ceiling: float = NO_CEILING) -> LossTable:
    return loss_table(setting.subject, SITE, sae, mean, setting.batches, ceiling)


MEAN = torch.linspace(-1, 1, D)


def close(found: Loss, expected: Loss) -> None:
    assert found.ce == pytest.approx(expected.ce, rel=1e-5)
    assert found.kl == pytest.approx(expected.kl, rel=1e-4, abs=1e-7)


def test_an_identity_dictionary_loses_nothing(setting: Setting) -> None:
    table = table_of(setting, identity(), MEAN)
    assert table.recon.ce == pytest.approx(table.base.ce, abs=1e-6)
    assert table.recon.kl == pytest.approx(0, abs=1e-6)
    assert table.base.kl == 0
    assert table.ce_recovered(table.mean_ablation) == pytest.approx(1, abs=1e-4)
    assert table.kl_recovered(table.zero_ablation) == pytest.approx(1, abs=1e-4)


def test_every_arm_against_plain_transformers(setting: Setting) -> None:
    sae = random_dictionary()
    table = table_of(setting, sae, MEAN)
    close(table.base, by_hand(setting, lambda x: x, NO_CEILING))
    close(table.mean_ablation, by_hand(setting, lambda x: MEAN.double(), NO_CEILING))
    close(table.zero_ablation, by_hand(setting, torch.zeros_like, NO_CEILING))
    close(table.recon, by_hand(setting, lambda x: sae.decode(sae.encode(x.float()[None]))[0].double(), NO_CEILING))
    assert table.recon.kl > 1e-3  # negative control: random directions do lose something
    assert table.mean_ablation.kl > 1e-3
    assert table.tokens == sum(int(batch.measured[:, 1:].sum()) for batch in setting.batches)
    everywhere = by_hand(setting, torch.zeros_like, NO_CEILING, everywhere=True)
    assert abs(everywhere.kl - table.zero_ablation.kl) > 1e-3  # BOS and position 0 would have told


def test_massive_activations_are_left_alone(setting: Setting) -> None:
    norms = torch.cat([hidden_norms(setting.subject, batch) for batch in setting.batches])
    ceiling = float(norms.median())
    table = table_of(setting, identity(), MEAN, ceiling)
    close(table.zero_ablation, by_hand(setting, torch.zeros_like, ceiling))
    assert table.zero_ablation.kl < table_of(setting, identity(), MEAN).zero_ablation.kl


def hidden_norms(subject: Subject, batch: TokenBatch) -> Tensor:
    with torch.inference_mode():
        hidden = subject.hf_model(input_ids=batch.tokens, output_hidden_states=True).hidden_states
    return hidden[SITE.layer + 1].norm(dim=-1)[batch.measured]


def test_rows_a_pass_do_not_matter(setting: Setting) -> None:
    first = len(list(setting.corpus.batches(1))) - 6
    for rows in (1, 6):
        other = setting._replace(batches=list(setting.corpus.batches(rows, skip_rows=first)))
        for a, b in zip(table_of(other, random_dictionary(), MEAN)[:4], table_of(setting, random_dictionary(), MEAN)[:4],
                        strict=True):
            close(a, b)


def test_the_model_is_restored(setting: Setting) -> None:
    modules = list(setting.subject.hf_model.modules())
    before = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in modules]  # transformers keeps some of its own
    table_of(setting, random_dictionary(), MEAN)
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in modules] == before


def test_recovered_by_hand() -> None:
    table = LossTable(base=Loss(2.0, 0.0), recon=Loss(2.5, 0.25), mean_ablation=Loss(4.0, 1.0), zero_ablation=Loss(7.0, 2.0),
                      tokens=1)
    assert table.ce_recovered(table.mean_ablation) == 0.75
    assert table.ce_recovered(table.zero_ablation) == 0.9
    assert table.kl_recovered(table.mean_ablation) == 0.75
    assert table.kl_recovered(table.zero_ablation) == 0.875
    assert table._replace(recon=Loss(5.0, 3.0)).ce_recovered(table.mean_ablation) == -0.5  # reported as it is
    assert math.isnan(table.ce_recovered(table.base))
    assert math.isnan(table.kl_recovered(table.base))


def test_no_token_to_judge(setting: Setting) -> None:
    with pytest.raises(TextError, match="no token to judge the loss on"):
        loss_table(setting.subject, SITE, identity(), MEAN, [], NO_CEILING)


# Both


def test_evaluate(setting: Setting, tmp_path: Path) -> None:
    source = Source(setting.subject, SITE, setting.corpus)
    sae = random_dictionary()
    found = evaluate(sae, source, (300, 128), tmp_path)
    store = harvest(setting.subject, SITE, setting.corpus, 300, tmp_path)
    x = torch.cat([block for _, block in store.chunks(64)])
    assert found.reconstruction.tokens == store.n >= 300
    assert found.reconstruction.fvu == pytest.approx(reconstruction(sae, [x]).fvu, rel=1e-6)
    assert found.massive == store.record["massive"]
    batches = list(setting.corpus.batches(2))[:2]
    assert found.losses.tokens == sum(int(batch.measured[:, 1:].sum()) for batch in batches)
    table = loss_table(setting.subject, SITE, sae, x.mean(dim=0), batches, store.record["norm_ceiling"])
    close(found.losses.mean_ablation, table.mean_ablation)
    summary = found.summary()
    assert summary["ce_recovered"] == pytest.approx(
        (summary["ce_mean_ablation"] - summary["ce_recon"]) / (summary["ce_mean_ablation"] - summary["ce_base"]))
    assert sum(summary["density_histogram"].values()) == sae.d_sae
    costless = found._replace(losses=found.losses._replace(mean_ablation=found.losses.base))
    assert "ce_recovered" not in costless.summary()  # absent where it is not defined
    assert "ce_recovered_zero" in costless.summary()


def test_evaluate_refuses_trained_text(setting: Setting, tmp_path: Path) -> None:
    train = open_corpus(setting.corpus.spec, "train", setting.subject.tokenizer, setting.subject.bos_id)
    with pytest.raises(TextError, match="needs the held-out split, got 'train'"):
        evaluate(identity(), Source(setting.subject, SITE, train), (10, 10), tmp_path)
    assert list(tmp_path.iterdir()) == []
