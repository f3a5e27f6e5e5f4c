"""Dictionaries of inputs that are normalised one by one: nothing is kept between encoding and decoding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae.dictionary import TopK
from sae.formats import SaeLensDictionary, load, save_folder
from sae.normed import NormedDictionary, OwnNorm, normalise, reconstruct
from tests.sae.test_formats import WHERE, dictionary, inputs, saved_by_sae_lens
from undertow.core.errors import DictionaryError

NORMS: tuple[OwnNorm, ...] = ("layer_norm", "constant_norm_rescale")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("architecture", "more"), [("topk", {"k": 4}), ("jumprelu", {}), ("standard", {}), ("gated", {})])
def test_own_norms_are_computed_without_a_hidden_state(sae_lens: Any, tmp_path: Path, architecture: str, more: dict[str, Any],
                                                       norm: OwnNorm) -> None:
    """Codes are σ times sae-lens', reconstructions are equal, and nothing depends on the order of calls."""
    saved_by_sae_lens(sae_lens, architecture, tmp_path / "sae", normalize_activations=norm, **more)
    ours, theirs = load(tmp_path / "sae"), sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert isinstance(ours, NormedDictionary)
    x = inputs() * torch.linspace(0.5, 20, 16)[:, None] + 3
    seen = normalise(x, norm)
    with torch.no_grad():
        f = theirs.encode(x)
        recon = theirs.decode(f)
    assert torch.equal(ours.inner.encode(seen.z), f)
    torch.testing.assert_close(ours.encode(x), f * seen.scale)
    got, codes = reconstruct(ours, x)
    torch.testing.assert_close(got, recon, atol=1e-4, rtol=1e-5)
    reconstruct(ours, 10 * x)
    assert torch.equal(reconstruct(ours, x)[0], got)
    dense = torch.zeros_like(f)
    dense[codes.rows, codes.latents] = codes.values
    torch.testing.assert_close(dense, ours.encode(x))
    some = torch.tensor([0, 23, 1])
    torch.testing.assert_close(ours.latent_values(x, some), ours.encode(x)[:, some], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_an_edit_by_directions_is_the_difference_of_two_reconstructions(sae_lens: Any, tmp_path: Path, norm: OwnNorm) -> None:
    saved_by_sae_lens(sae_lens, "jumprelu", tmp_path / "sae", normalize_activations=norm)
    ours, theirs = load(tmp_path / "sae"), sae_lens.SAE.load_from_disk(tmp_path / "sae")
    x = inputs() * torch.linspace(0.5, 20, 16)[:, None] + 3
    latent = torch.tensor([7])
    with torch.no_grad():
        f = theirs.encode(x)
        before = theirs.decode(f)
        changed = theirs.encode(x).clone()
        changed[:, 7] *= 2.5
        after = theirs.decode(changed)
    delta = 1.5 * ours.latent_values(x, latent) * ours.directions(latent)
    assert float(delta.abs().max()) > 1
    torch.testing.assert_close(delta, after - before, atol=1e-3, rtol=1e-4)


def test_codes_alone_do_not_decode_where_inputs_are_normalised(tmp_path: Path) -> None:
    ours = NormedDictionary(dictionary(TopK(3)), "layer_norm")
    save_folder(ours, tmp_path / "sae")
    again = load(tmp_path / "sae")
    assert isinstance(again, NormedDictionary) and again.norm == "layer_norm" and again.provenance == WHERE
    for call in (lambda: again.decode(again.encode(inputs())), lambda: again.decode_codes(again.encode_sparse(inputs()), 16)):
        with pytest.raises(DictionaryError, match="codes alone do not reconstruct") as caught:
            call()
        assert "sae.reconstruct" in caught.value.hint
    with pytest.raises(DictionaryError, match="width 3 given to an SAE of width 8"):
        again.encode(torch.zeros(1, 3))


def test_layer_norm_would_depend_on_the_order_of_calls_in_sae_lens(sae_lens: Any, tmp_path: Path) -> None:
    """Why architectures that sae-lens computes are refused: another `encode` in between changes what `decode` returns."""
    theirs = saved_by_sae_lens(sae_lens, "abstopk", tmp_path / "sae", k=4, normalize_activations="layer_norm")
    x = inputs()
    with torch.no_grad():
        f = theirs.encode(x)
        first = theirs.decode(f)
        theirs.encode(x)
        theirs.encode(10 * x)
        assert not torch.allclose(first, theirs.decode(f))
    with pytest.raises(DictionaryError, match="layer_norm"):
        load(tmp_path / "sae")
    with pytest.raises(DictionaryError, match="layer_norm"):
        SaeLensDictionary(theirs, WHERE)
