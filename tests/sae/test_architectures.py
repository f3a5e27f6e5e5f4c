"""Every architecture: what its spec asks for, that its step is sae-lens' own where both agree, that its saves open there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from sae.architectures import Architecture, TrainSpec
from sae.dense import gated_step, standard_step
from sae.dictionary import Provenance
from sae.formats import load, save_folder
from sae.normed import NormedDictionary, linear_part, reconstruct
from sae.step import (
    AnyWeights,
    GatedWeights,
    JumpWeights,
    Sparsity,
    StepResult,
    Weights,
    batch_top_k,
    jump_step,
    pre_activations,
    sparse_step,
    tangent_,
    unit_decoder_,
)
from sae.training import Trainer, train
from tests.sae.test_training import fvu, spec_of, synthetic
from undertow.core.errors import DictionaryError, SpecError

D_IN, D_SAE, B = 6, 32, 40


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------- the specs


@pytest.mark.parametrize(("values", "message"), [
    ({"k": 32}, r"k = 32 must be below the width 32"),
    ({}, "topk needs k"),
    ({"architecture": "batchtopk", "k": 3, "penalty": {"coefficient": 1}}, "batchtopk has no price of sparsity"),
    ({"architecture": "standard"}, "standard needs a price of sparsity: try --sparsity 1"),
    ({"architecture": "gated", "k": 3}, "gated has no k: its L0 follows"),
    ({"architecture": "jumprelu"}, "jumprelu needs either k, the L0 to aim at, or a price"),
    ({"architecture": "jumprelu", "k": 3, "penalty": {"coefficient": 1}}, "not both"),
    ({"k": 3, "prefixes": (4, 8)}, "prefixes are matryoshka's; topk has none"),
    ({"architecture": "matryoshka", "k": 3, "prefixes": (8, 8)}, "must rise, and lie between 0 and the width 32"),
    ({"architecture": "matryoshka", "k": 3, "prefixes": (8, 32)}, "must rise"),
    ({"architecture": "matryoshka", "k": 3, "prefixes": (0, 8)}, "must rise"),
    ({"k": 3, "normalize": "batch_norm"}, "normalize = 'batch_norm'"),
    ({"k": 3, "penalty": {"warm_up": 2}}, r"penalty.warm_up = 2"),
])
def test_what_a_spec_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        TrainSpec.checked({"d_sae": 32, "steps": 10, **values}, "test")


def test_what_is_derived() -> None:
    assert spec_of("matryoshka", d_sae=64, steps=1).inner_prefixes == (4, 8, 16, 32)
    assert spec_of("matryoshka", d_sae=5, steps=1).inner_prefixes == (1, 2)
    assert spec_of("matryoshka", d_sae=64, steps=1, prefixes=(10, 20)).inner_prefixes == (10, 20)
    assert spec_of("topk", d_sae=64, steps=1).inner_prefixes == ()
    gated = spec_of("gated", d_sae=64, steps=100, penalty={"coefficient": 2.0, "warm_up": 0.1})
    assert [gated.warmth(step) for step in (0, 4, 9, 50)] == [0.1, 0.5, 1.0, 1.0]
    assert spec_of("gated", d_sae=64, steps=100, penalty={"coefficient": 2.0, "warm_up": 0}).warmth(0) == 1
    assert [Sparsity(2.0, None).of(5.0), Sparsity(2.0, 4.0).of(6.0)] == [(10.0, 2.0), (2.0, 2.0)]
    for architecture in get_args(Architecture):
        spec = spec_of(architecture, d_sae=64, steps=1)
        assert TrainSpec.checked(spec.model_dump(mode="json"), "again") == spec


# ---------------------------------------------------------------- against sae-lens' training classes, in float64


def start() -> tuple[Weights, Tensor]:
    """Weights with unit decoder rows and a batch."""
    rows = drawn(2, D_SAE, D_IN)
    unit_decoder_(rows)
    return Weights(drawn(0, D_SAE, D_IN), 0.3 * drawn(1, D_SAE), rows, drawn(3, D_IN)), drawn(4, B, D_IN)


def theirs(sae_lens: Any, config: Any, weights: AnyWeights) -> Any:
    """sae-lens' training SAE with our weights."""
    made = sae_lens.TrainingSAE.from_dict({**config.to_dict(), "dtype": "float64"})
    for name, value in weights._asdict().items():
        getattr(made, name).data = (value.T if name == "W_enc" else value).clone().contiguous()
    return made


def assert_as_theirs(sae: Any, x: Tensor, got: StepResult, coefficients: dict[str, float]) -> None:
    """Loss and gradients are equal; of JumpReLU, whose rows are held at norm 1, but for the part along them."""
    from sae_lens.saes.sae import TrainStepInput

    out = sae.training_forward_pass(TrainStepInput(sae_in=x, coefficients=coefficients, dead_neuron_mask=None,
                                                   n_training_steps=0, is_logging_step=False))
    out.loss.backward()
    assert got.loss + got.aux_loss == pytest.approx(float(out.loss.detach()), rel=1e-7)
    for name, gradient in got.grads._asdict().items():
        reference = getattr(sae, name).grad
        reference = (reference.T if name == "W_enc" else reference).clone().double()
        mine = gradient.clone()
        if name == "W_dec" and isinstance(got.grads, JumpWeights):
            for one in (mine, reference):
                tangent_(one, sae.W_dec.data)
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-6, msg=name)


def test_matryoshka_is_sae_lens_own(sae_lens: Any) -> None:
    weights, x = start()
    config = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=4, matryoshka_widths=[5, 12, D_SAE],
                                                           rescale_acts_by_decoder_norm=False)
    pre = pre_activations(weights, x)
    got = sparse_step(weights, x, pre, batch_top_k(pre, 4), prefixes=(5, 12))
    assert_as_theirs(theirs(sae_lens, config, weights), x, got, {})


def test_jump_relu_at_a_price_is_sae_lens_own(sae_lens: Any) -> None:
    weights, x = start()
    jump = JumpWeights(*weights, drawn(5, D_SAE).abs().float().double())
    config = sae_lens.JumpReLUTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, jumprelu_bandwidth=0.4, l0_coefficient=0.7)
    sae = theirs(sae_lens, config, jump)
    sae.threshold.data = sae.threshold.data.float()  # they keep it in single precision
    got = jump_step(jump, x, pre_activations(weights, x), 0.4, Sparsity(0.7, None))
    assert_as_theirs(sae, x, got, {"l0": 0.7})


def test_standard_is_sae_lens_own(sae_lens: Any) -> None:
    weights, x = start()
    weights = weights._replace(W_dec=1.7 * weights.W_dec)
    config = sae_lens.StandardTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=0.7)
    assert_as_theirs(theirs(sae_lens, config, weights), x, standard_step(weights, x, 0.7), {"l1": 0.7})


def test_gated_is_sae_lens_own(sae_lens: Any) -> None:
    (W_enc, b_gate, W_dec, b_dec), x = start()
    gated = GatedWeights(W_enc, b_gate, 0.2 * drawn(6, D_SAE), 0.1 * drawn(7, D_SAE), 1.7 * W_dec, b_dec)
    config = sae_lens.GatedTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, l1_coefficient=0.7)
    assert_as_theirs(theirs(sae_lens, config, gated), x, gated_step(gated, x, 0.7), {"l1": 0.7})


# ---------------------------------------------------------------- whole trainings


@pytest.fixture(scope="module", params=get_args(Architecture))
def trained(request: pytest.FixtureRequest) -> Any:
    """A short training, and its dictionary."""
    spec = spec_of(request.param, d_sae=64, steps=60, batch_size=256, lr=3e-3)
    return spec, train(synthetic(60, 256), spec, Provenance("gpt2", "blocks.1.hook_mlp_out", 64, True))


SAVED_AS = {"topk": "topk", "standard": "standard", "gated": "gated"}


def test_saves_open_in_sae_lens_with_equal_codes(trained: Any, sae_lens: Any, tmp_path: Path) -> None:
    spec, made = trained
    save_folder(made, tmp_path / "sae")
    other, again = sae_lens.SAE.load_from_disk(tmp_path / "sae"), load(tmp_path / "sae")
    assert other.cfg.architecture() == again.architecture == SAVED_AS.get(spec.architecture, "jumprelu")
    x = next(synthetic(1, 300, start=9_000))
    with torch.no_grad():
        f = other.encode(x)
        for mine in (made, again):
            assert torch.equal(mine.encode(x), f)
            assert torch.equal(mine.decode(f), other.decode(f))
    assert 0.5 < float((f > 0).float().sum(1).mean()) < 64


def test_layer_norm_saves_open_in_sae_lens(sae_lens: Any, tmp_path: Path) -> None:
    for architecture in get_args(Architecture):
        spec = spec_of(architecture, d_sae=64, steps=20, batch_size=256, lr=3e-3, normalize="layer_norm")
        made = train(synthetic(20, 256), spec)
        assert isinstance(made, NormedDictionary)
        save_folder(made, tmp_path / architecture)
        other = sae_lens.SAE.load_from_disk(tmp_path / architecture)
        x = next(synthetic(1, 300, start=9_000))
        with torch.no_grad():
            recon = other.decode(other.encode(x))
        torch.testing.assert_close(reconstruct(made, x)[0], recon, rtol=1e-4, atol=1e-4)
        with pytest.raises(DictionaryError, match="codes alone"):
            made.decode(made.encode(x))


def test_a_matryoshka_prefix_reconstructs_where_one_of_batchtopk_does_not() -> None:
    """Negative control: without the inner losses, the first half of the latents is any half."""
    x = next(synthetic(1, 1000, start=9_000))

    def prefix_fvu(architecture: str, width: int) -> float:
        made = linear_part(train(synthetic(200, 256), spec_of(architecture, d_sae=64, steps=200, batch_size=256, lr=1e-2)))
        f = made.encode(x)
        f[:, width:] = 0
        return float((x - made.decode(f)).square().sum() / (x - x.mean(0)).square().sum())

    assert prefix_fvu("matryoshka", 32) < 0.6 * prefix_fvu("batchtopk", 32)


def test_jump_relu_comes_to_its_target() -> None:
    made = train(synthetic(300, 256), spec_of("jumprelu", d_sae=64, steps=300, batch_size=256, lr=1e-2))
    x = next(synthetic(1, 2000, start=9_000))
    assert float((made.encode(x) > 0).float().sum(1).mean()) == pytest.approx(3, rel=0.1)
    assert fvu(made, x) < 0.2


@pytest.mark.parametrize("architecture", ["jumprelu", "standard", "gated"])
def test_a_higher_price_buys_a_lower_l0(architecture: str) -> None:
    def l0(price: float) -> float:
        spec = TrainSpec.checked({"d_sae": 64, "steps": 150, "batch_size": 256, "architecture": architecture, "lr": 3e-3,
                                  "penalty": {"coefficient": price}}, "test")
        made = train(synthetic(150, 256), spec)
        return float((made.encode(next(synthetic(1, 500, start=9_000))) > 0).float().sum(1).mean())

    assert l0(2.0) < 0.7 * l0(0.1)


@pytest.mark.parametrize("architecture", ["standard", "gated"])
def test_free_row_sizes_go_into_the_codes(architecture: str) -> None:
    """What is saved has decoder rows of norm 1 and is the function that was trained."""
    trainer = Trainer.begin(spec_of(architecture, d_sae=64, steps=20, batch_size=256, lr=3e-3), next(synthetic(1)))
    for batch in synthetic(20, 256):
        trainer.step(batch)
    assert float((trainer.weights.W_dec.detach().norm(dim=1) - 1).abs().min()) > 0.1
    made = linear_part(trainer.dictionary(Provenance.unknown()))
    torch.testing.assert_close(made.W_dec.norm(dim=1), torch.ones(64))
    x = next(synthetic(1, 100, start=9_000))
    seen = x * trainer.scale
    if isinstance(trainer.weights, GatedWeights):
        W_enc, b_gate, b_mag, r_mag, W_dec, b_dec = trainer.weights
        linear = (seen - b_dec) @ W_enc.T
        f = (linear + b_gate > 0) * (linear * r_mag.exp() + b_mag).relu()
    else:
        assert isinstance(trainer.weights, Weights)
        W_enc, b_enc, W_dec, b_dec = trainer.weights
        f = ((seen - b_dec) @ W_enc.T + b_enc).relu()
    recon = ((f @ W_dec + b_dec) / trainer.scale).detach()
    torch.testing.assert_close(made.decode(made.encode(x)), recon, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("normalize", ["none", "expected_average_only_in", "layer_norm"])
def test_normalisations(normalize: str) -> None:
    """Tokens of very different size: only layer norm sees them alike; all reconstruct in the units given."""
    spec = spec_of("topk", d_sae=64, steps=300, batch_size=256, lr=5e-3, normalize=normalize)
    made = train(synthetic(300, 256), spec)
    x = next(synthetic(1, 500, start=9_000))
    recon, codes = reconstruct(made, x)
    assert float((x - recon).square().sum() / (x - x.mean(0)).square().sum()) < 0.25
    ratio = float(made.encode(10 * x).norm() / made.encode(x).norm())
    if normalize == "layer_norm":
        assert ratio == pytest.approx(10, rel=1e-3)  # σ scales the codes, and nothing else changes
        assert torch.equal(made.encode_sparse(10 * x).latents, codes.latents)
    else:
        assert ratio != pytest.approx(10, rel=1e-3)  # b_dec is not ten times as large


def test_a_checkpoint_knows_its_architecture(tmp_path: Path) -> None:
    trainer = Trainer.begin(spec_of("gated", d_sae=8, steps=4), next(synthetic(1)))
    trainer.save(tmp_path / "checkpoint.safetensors")
    assert Trainer.resume(tmp_path / "checkpoint.safetensors").spec.architecture == "gated"
