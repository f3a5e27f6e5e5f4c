"""Training: it recovers a known dictionary, resumes bit for bit, folds its scale, and names bad input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from sae.architectures import BY_PRICE, Architecture
from sae.dictionary import JumpReLU, Provenance, TopK
from sae.training import Trainer, TrainSpec, rebatch, train
from undertow.core.errors import ArtifactError, NumericsError, SpecError, TextError

D_IN, N_TRUE = 24, 40


def true_directions() -> torch.Tensor:
    rows = torch.randn(N_TRUE, D_IN, generator=torch.Generator().manual_seed(99))
    return rows / rows.norm(dim=1, keepdim=True)


def synthetic(batches: int, size: int = 512, scale: float = 1.0, start: int = 0) -> Iterator[torch.Tensor]:
    """Sums of 3 of 40 known directions with strengths in [1, 2], plus a constant."""
    directions = true_directions()
    for number in range(start, start + batches):
        g = torch.Generator().manual_seed(number)
        chosen = torch.rand(size, N_TRUE, generator=g).topk(3, dim=1).indices
        codes = torch.zeros(size, N_TRUE).scatter(1, chosen, 1 + torch.rand(size, 3, generator=g))
        yield scale * (codes @ directions + 3.0)


def fvu(dictionary: object, x: torch.Tensor) -> float:
    recon = dictionary.decode(dictionary.encode(x))  # pyright: ignore[reportAttributeAccessIssue]
    return float((x - recon).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("architecture", ["topk", "batchtopk", "jumprelu"])
def test_training_recovers_known_directions(architecture: str) -> None:
    spec = TrainSpec(d_sae=64, k=3, steps=800, architecture=architecture, batch_size=512, lr=1e-2)  # pyright: ignore[reportArgumentType]
    dictionary = train(synthetic(800), spec)
    held_out = next(synthetic(1, start=10_000))
    assert fvu(dictionary, held_out) < 0.1
    best = (true_directions() @ dictionary.W_dec.T).max(dim=1).values
    assert float((best > 0.9).float().mean()) > 0.9
    assert isinstance(dictionary.activation, TopK if architecture == "topk" else JumpReLU)
    assert abs(float((dictionary.encode(held_out) > 0).float().sum(1).mean()) - 3) < 0.3
    untrained = train(synthetic(1), spec.model_copy(update={"steps": 1}))
    assert fvu(untrained, held_out) > 0.3  # the negative control


def test_the_scale_of_the_activations_does_not_matter() -> None:
    """A thousand times larger activations give the same latents and a thousand times larger codes."""
    spec = TrainSpec(d_sae=32, k=3, steps=60, batch_size=256, lr=3e-3)
    small, large = train(synthetic(60, 256), spec), train(synthetic(60, 256, scale=1024.0), spec)
    x = next(synthetic(1, 100, start=5_000))
    assert torch.allclose(small.W_dec, large.W_dec, atol=1e-5)
    assert torch.allclose(large.encode(1024 * x), 1024 * small.encode(x), rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("architecture", get_args(Architecture))
@pytest.mark.parametrize("normalize", ["expected_average_only_in", "layer_norm"])
def test_resuming_is_bit_exact(tmp_path: Path, architecture: str, normalize: str) -> None:
    spec = spec_of(architecture, d_sae=64, steps=40, batch_size=128, lr=3e-3, aux_coefficient=1.0, normalize=normalize)
    sample = next(synthetic(1, 512))
    straight = Trainer.begin(spec, sample)
    for batch in synthetic(40, 128):
        straight.step(batch)
    broken = Trainer.begin(spec, sample)
    for batch in synthetic(17, 128):
        broken.step(batch)
    broken.save(tmp_path / "checkpoint.safetensors")
    resumed = Trainer.resume(tmp_path / "checkpoint.safetensors")
    assert resumed.spec == spec and resumed.step_number == 17
    for batch in synthetic(23, 128, start=17):
        resumed.step(batch)
    assert resumed.finished
    assert straight.weights._fields == resumed.weights._fields
    for a, b in zip(straight.weights, resumed.weights, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(straight.idle, resumed.idle) and straight.threshold == resumed.threshold


def spec_of(architecture: str, **more: Any) -> TrainSpec:
    """A spec with what the architecture needs."""
    sparse = {"penalty": {"coefficient": 0.5}} if architecture in BY_PRICE else {"k": 3}
    return TrainSpec.checked({**sparse, "architecture": architecture, **more}, "test")


def test_same_seed_same_weights_other_seed_other_weights() -> None:
    spec = TrainSpec(d_sae=32, k=2, steps=5, batch_size=64, seed=3)
    first, again = train(synthetic(5, 64), spec), train(synthetic(5, 64), spec)
    other = train(synthetic(5, 64), spec.model_copy(update={"seed": 4}))
    assert torch.equal(first.W_enc, again.W_enc) and not torch.equal(first.W_enc, other.W_enc)


def test_dead_latents_are_revived() -> None:
    spec = TrainSpec(d_sae=64, k=2, steps=400, batch_size=256, lr=3e-3)

    def dead_after(coefficient: float) -> float:
        trainer = Trainer.begin(spec.model_copy(update={"aux_coefficient": coefficient}), next(synthetic(1)))
        with torch.no_grad():
            trainer.weights.b_enc[:32] -= 0.5  # half of the latents start far below the others
        for batch in synthetic(400, 256):
            trainer.step(batch)
        return float((trainer.idle[:32] >= spec.dead_after).float().mean())

    without, with_aux = dead_after(0.0), dead_after(1.0)
    assert without > 0.5 and with_aux < without / 2


def test_rebatch_keeps_order_and_drops_the_tail() -> None:
    blocks = [torch.arange(a, b).float()[:, None] for a, b in ((0, 3), (3, 10), (10, 11), (11, 23))]
    batches = list(rebatch(blocks, 5))
    assert [len(b) for b in batches] == [5, 5, 5, 5]
    assert torch.equal(torch.cat(batches)[:, 0], torch.arange(20).float())


def test_bad_activations_are_named() -> None:
    spec = TrainSpec(d_sae=32, k=2, steps=4, batch_size=64)
    broken = list(synthetic(4, 64))
    broken[2][7, 3] = float("nan")
    trainer = Trainer.begin(spec, broken[0])
    trainer.step(broken[0])
    trainer.step(broken[1])
    before = [w.clone() for w in trainer.weights]
    with pytest.raises(NumericsError, match="batch 2: 1 of 64 activations are not finite, the first in row 7"):
        trainer.step(broken[2])
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.weights, strict=True))  # nothing lost
    with pytest.raises(NumericsError, match="mean norm nan"):
        train(broken[2:3], spec.model_copy(update={"steps": 1}))
    with pytest.raises(TextError, match="ended after step 3 of 4"):
        train(synthetic(3, 64), spec)
    with pytest.raises(SpecError, match="do not fill one batch of 64"):
        train(synthetic(1, 63), spec)
    with pytest.raises(SpecError, match=r"k = 32 must be below the width 32"):
        TrainSpec.checked({"d_sae": 32, "k": 32, "steps": 1}, "test")


def test_a_broken_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.safetensors"
    Trainer.begin(TrainSpec(d_sae=8, k=2, steps=4), next(synthetic(1))).save(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match=r"checkpoint .* cannot be read"):
        Trainer.resume(path)


def test_schedule_by_hand() -> None:
    spec = TrainSpec(d_sae=16384, k=2, steps=100)
    assert spec.peak_lr == 4e-4
    shares = [round(spec.lr_at(s) / spec.peak_lr, 6) for s in (0, 4, 50, 69, 70, 85, 99)]
    assert shares == [0.2, 1, 1, 1, 1, 0.5, round(1 / 30, 6)]
    assert Provenance.unknown().model_name == ""


@pytest.mark.parametrize("architecture", get_args(Architecture))
@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_lower_precision_keeps_float32_weights(architecture: str, precision: str) -> None:
    """The run differs from float32 (bfloat16: on any machine), ends as well, and leaves no setting behind."""
    before = torch.get_float32_matmul_precision()
    made = {}
    for name in ("float32", precision):
        spec = spec_of(architecture, d_sae=64, steps=150, batch_size=128, lr=5e-3, precision=name)
        trainer = Trainer.begin(spec, next(synthetic(1)))
        for batch in synthetic(150, 128):
            trainer.step(batch)
        assert all(weight.dtype == torch.float32 for weight in trainer.weights)
        made[name] = trainer.dictionary(Provenance.unknown())
    assert torch.get_float32_matmul_precision() == before and not torch.is_autocast_enabled("cpu")
    held_out = next(synthetic(1, start=10_000))
    assert fvu(made[precision], held_out) == pytest.approx(fvu(made["float32"], held_out), rel=0.1, abs=5e-3)
    if precision == "bfloat16":
        assert not torch.equal(made["bfloat16"].W_dec, made["float32"].W_dec)
