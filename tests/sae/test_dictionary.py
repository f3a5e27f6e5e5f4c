"""The arithmetic of dictionaries, against figures computed by hand and an independent NumPy reference."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae.dictionary import (
    Activation,
    Codes,
    JumpReLU,
    LinearDictionary,
    Provenance,
    ReLU,
    TopK,
    check_weights,
)
from undertow.core.errors import DictionaryError, NumericsError

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def small(activation: Activation, subtract_b_dec: bool = True) -> LinearDictionary:
    """d_in 2, d_sae 3; with b_dec off, pre = x·W_enc + b_enc = (x0, x1, x0 + x1 − 1)."""
    return LinearDictionary(
        W_enc=torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), b_enc=torch.tensor([0.0, 0.0, -1.0]),
        W_dec=torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]), b_dec=torch.tensor([0.5, -0.5]),
        activation=activation, provenance=Provenance.unknown(), subtract_b_dec=subtract_b_dec)


def random_dictionary(seed: int, d_in: int, d_sae: int, activation: str, k: int = 1, rescale: bool = False,
                      subtract_b_dec: bool = True) -> LinearDictionary:
    draw = torch.Generator().manual_seed(seed)
    weights = [torch.randn(*shape, generator=draw) for shape in ((d_in, d_sae), (d_sae,), (d_sae, d_in), (d_in,))]
    chosen: Activation = {"topk": TopK(k, rescale), "standard": ReLU(),
                          "jumprelu": JumpReLU(torch.randn(d_sae, generator=draw))}[activation]
    return LinearDictionary(*weights, chosen, Provenance.unknown(), subtract_b_dec)


def reference(d: LinearDictionary, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and reconstruction in float64 NumPy, token by token."""
    W_enc, b_enc, W_dec, b_dec = (t.double().numpy() for t in (d.W_enc, d.b_enc, d.W_dec, d.b_dec))
    norms = np.sqrt((W_dec**2).sum(axis=1))
    codes = np.zeros((len(x), d.d_sae))
    for i, row in enumerate(x.double().numpy()):
        pre = (row - (b_dec if d.subtract_b_dec else 0)) @ W_enc + b_enc
        if isinstance(d.activation, TopK):
            scaled = pre * (norms if d.activation.rescale_by_decoder_norm else 1)
            for j in np.argsort(-scaled, kind="stable")[:d.activation.k]:
                codes[i, j] = max(scaled[j], 0)
        elif isinstance(d.activation, JumpReLU):
            codes[i] = np.where(pre > d.activation.threshold.double().numpy(), np.maximum(pre, 0), 0)
        else:
            codes[i] = np.maximum(pre, 0)
    rescaled = isinstance(d.activation, TopK) and d.activation.rescale_by_decoder_norm
    return codes, (codes / norms if rescaled else codes) @ W_dec + b_dec


def test_top_k_by_hand() -> None:
    d = small(TopK(1), subtract_b_dec=False)
    x = torch.tensor([[3.0, 2.0], [-1.0, -2.0]])
    assert d.pre_activations(x).tolist() == [[3, 2, 4], [-1, -2, -4]]
    assert d.encode(x).tolist() == [[0, 0, 4], [0, 0, 0]]  # the largest of the second token is negative
    assert d.decode(d.encode(x)).tolist() == [[12.5, 15.5], [0.5, -0.5]]


def test_b_dec_is_subtracted_only_if_asked() -> None:
    x = torch.tensor([[3.0, 2.0]])
    assert small(ReLU()).encode(x).tolist() == [[2.5, 2.5, 4.0]]
    assert small(ReLU(), subtract_b_dec=False).encode(x).tolist() == [[3.0, 2.0, 4.0]]


def test_jump_relu_threshold_is_strict_and_negative_ones_do_not_let_negatives_through() -> None:
    d = small(JumpReLU(torch.tensor([3.0, -5.0, 1.0])), subtract_b_dec=False)
    assert d.encode(torch.tensor([[3.0, -2.0]])).tolist() == [[0, 0, 0]]  # 3 is not above 3; −2 is, but negative
    assert d.encode(torch.tensor([[3.25, 1.0]])).tolist() == [[3.25, 1.0, 3.25]]


def test_rescaling_chooses_by_decoder_norm_and_divides_in_decoding() -> None:
    d = small(TopK(1, rescale_by_decoder_norm=True), subtract_b_dec=False)  # norms 1, 2, 5
    x = torch.tensor([[3.0, 2.0], [9.0, -8.5]])
    assert d.encode(x).tolist() == [[0, 0, 20], [9, 0, 0]]  # second token: 9, −17, −2.5
    assert torch.allclose(d.decode(d.encode(x)), torch.tensor([[12.5, 15.5], [9.5, -0.5]]))
    assert torch.allclose(d.directions(torch.tensor([2, 1])), torch.tensor([[0.6, 0.8], [0.0, 1.0]]))
    assert small(TopK(1)).directions(torch.tensor([2])).tolist() == [[3, 4]]


KINDS = st.sampled_from(["topk", "jumprelu", "standard"])


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), d_in=st.integers(1, 7), d_sae=st.integers(1, 19), n=st.integers(1, 5), kind=KINDS,
       share=st.floats(0, 1), rescale=st.booleans(), subtract=st.booleans())
def test_every_path_agrees_with_the_reference(seed: int, d_in: int, d_sae: int, n: int, kind: str, share: float,
                                              rescale: bool, subtract: bool) -> None:
    k = max(1, round(share * d_sae))
    d = random_dictionary(seed, d_in, d_sae, kind, k, rescale, subtract)
    x = torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed + 1))
    codes, recon = reference(d, x)
    f = d.encode(x)
    np.testing.assert_allclose(f.numpy(), codes, atol=1e-4)
    np.testing.assert_allclose(d.decode(f).numpy(), recon, atol=1e-3)

    sparse = d.encode_sparse(x)
    dense = torch.zeros_like(f)
    dense[sparse.rows, sparse.latents] = sparse.values
    assert torch.equal(dense, f)
    places = (sparse.rows * d_sae + sparse.latents).tolist()
    assert places == sorted(set(places)) and not (sparse.values == 0).any()
    torch.testing.assert_close(d.decode_codes(sparse, n), d.decode(f), atol=1e-4, rtol=1e-4)

    latents = torch.randint(d_sae, (3,), generator=torch.Generator().manual_seed(seed + 2))
    torch.testing.assert_close(d.latent_values(x, latents), f[:, latents], atol=1e-5, rtol=1e-5)

    unit = d.decode(torch.eye(d_sae)[latents]) - d.decode(torch.zeros(3, d_sae))
    torch.testing.assert_close(d.directions(latents), unit, atol=1e-4, rtol=1e-4)


def test_latent_values_read_only_the_needed_columns() -> None:
    d = random_dictionary(0, 4, 6, "jumprelu")
    poisoned = dataclasses.replace(d)
    poisoned.W_enc[:, 2] = float("nan")  # after construction, so that the check does not see it
    x = torch.randn(3, 4)
    assert torch.isfinite(poisoned.latent_values(x, torch.tensor([0, 5]))).all()
    assert torch.isnan(poisoned.latent_values(x, torch.tensor([2]))).all()


def test_tokens_without_codes_decode_to_the_bias() -> None:
    d = small(ReLU())
    empty = Codes(torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert d.decode_codes(empty, 2).tolist() == [[0.5, -0.5]] * 2
    one = Codes(torch.tensor([1]), torch.tensor([2]), torch.tensor([2.0]))
    assert d.decode_codes(one, 3).tolist() == [[0.5, -0.5], [6.5, 7.5], [0.5, -0.5]]


@pytest.mark.parametrize("rows", [[1, 0], [0, 3], [-1, 0]])
def test_codes_out_of_order_or_range_are_refused(rows: list[int]) -> None:
    codes = Codes(torch.tensor(rows), torch.tensor([0, 0]), torch.ones(2))
    with pytest.raises(ValueError, match="sorted by row"):
        small(ReLU()).decode_codes(codes, 3)


def test_gradients_run_through_encoding_and_decoding() -> None:
    for kind in ("topk", "jumprelu", "standard"):
        d = random_dictionary(3, 4, 8, kind, k=3, rescale=True)
        x = torch.randn(2, 4, requires_grad=True)
        d.decode(d.encode(x)).square().sum().backward()
        assert x.grad is not None and bool(torch.isfinite(x.grad).all()) and float(x.grad.norm()) > 0


def test_nan_activations_stay_visible_in_sparse_codes() -> None:
    for kind in ("topk", "jumprelu", "standard"):
        codes = random_dictionary(0, 2, 4, kind, k=2).encode_sparse(torch.tensor([[1.0, 2.0], [float("nan"), 0.0]]))
        bad = ~torch.isfinite(codes.values)
        assert bool(bad.any()) and set(codes.rows[bad].tolist()) == {1}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_inputs_are_cast_and_moving_keeps_everything(device: str) -> None:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(2))
    for kind in ("topk", "jumprelu", "standard"):
        d = random_dictionary(1, 4, 8, kind, k=3)
        moved = d.to(device)
        assert {t.device.type for t in moved.tensors().values()} == {device} and moved.provenance == d.provenance
        f = moved.encode(x)
        assert f.device.type == device
        torch.testing.assert_close(f.cpu(), d.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(moved.decode_codes(moved.encode_sparse(x), 2), moved.decode(f), atol=1e-5, rtol=1e-5)
        assert d.encode(x.bfloat16()).dtype == torch.float32


def test_another_width_is_refused_and_both_are_named() -> None:
    with pytest.raises(DictionaryError, match=r"width 3 given to an SAE of width 2"):
        small(ReLU()).encode(torch.zeros(1, 3))


@pytest.mark.parametrize("latent", [3, -1])
def test_an_unknown_feature_is_refused(latent: int) -> None:
    for call in (small(ReLU()).directions, lambda i: small(ReLU()).latent_values(torch.zeros(1, 2), i)):
        with pytest.raises(DictionaryError, match=f"no feature {latent}: this SAE has 3") as caught:
            call(torch.tensor([latent]))
        assert caught.value.hint == "choose from 0 to 2"


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_number_of_latents_is_refused(k: int) -> None:
    with pytest.raises(DictionaryError, match=f"k = {k} is outside"):
        small(TopK(k))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(name: str, value: float) -> None:
    tensors = small(JumpReLU(torch.zeros(3))).tensors()
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[1] = value
    with pytest.raises(NumericsError, match=f"{name} of the SAE has 1 NaN or infinite"):
        check_weights(tensors, JumpReLU(tensors["threshold"]))


@pytest.mark.parametrize(("name", "shape"), [("b_enc", (4,)), ("W_dec", (2, 3)), ("b_dec", (3,)), ("threshold", (1,))])
def test_wrong_shapes_are_named(name: str, shape: tuple[int, ...]) -> None:
    tensors = small(JumpReLU(torch.zeros(3))).tensors() | {name: torch.zeros(shape)}
    with pytest.raises(DictionaryError, match=name) as caught:
        check_weights(tensors, ReLU())
    assert str(shape) in caught.value.what


def test_mixed_types_and_rows_that_cannot_be_rescaled_are_refused() -> None:
    tensors = small(ReLU()).tensors()
    with pytest.raises(DictionaryError, match=r"b_dec is torch\.float64"):
        check_weights(tensors | {"b_dec": torch.zeros(2, dtype=torch.float64)}, ReLU())
    dead = tensors | {"W_dec": torch.tensor([[1.0, 0.0], [0.0, 0.0], [3.0, 4.0]])}
    check_weights(dead, TopK(1))
    with pytest.raises(NumericsError, match="row 1 of W_dec is zero"):
        check_weights(dead, TopK(1, rescale_by_decoder_norm=True))
