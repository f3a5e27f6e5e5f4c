"""SAE folders: what we write sae-lens opens, what sae-lens writes we open, with equal codes; the rest is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae import formats
from sae.dictionary import Activation, Dictionary, Gated, JumpReLU, LinearDictionary, Provenance, ReLU, TopK
from sae.formats import check_fits, import_sae, load, save_folder
from undertow.core.errors import ArtifactError, DictionaryError, NumericsError, UserError
from undertow.core.storage import create_artifact

WHERE = Provenance("HuggingFaceTB/SmolLM2-135M-Instruct", "blocks.12.hook_resid_post", 96, True,
                   {"subject_digest": "0123456789abcdef", "text": {"source": "brown"}})


def drawn(seed: int, d_in: int, d_sae: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {"W_enc": torch.randn(d_in, d_sae, generator=draw), "b_enc": torch.randn(d_sae, generator=draw),
            "W_dec": torch.randn(d_sae, d_in, generator=draw), "b_dec": torch.randn(d_in, generator=draw)}


def dictionary(activation: Activation, seed: int = 0, d_in: int = 8, d_sae: int = 24, subtract: bool = True,
               provenance: Provenance = WHERE) -> LinearDictionary:
    return LinearDictionary(**drawn(seed, d_in, d_sae), activation=activation, provenance=provenance,
                            subtract_b_dec=subtract)


def inputs(d_in: int = 8, n: int = 16) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(99))


def assert_same(ours: Dictionary, theirs: Any) -> None:
    """Equal encode and decode, bit for bit, and both sparse paths consistent with them."""
    x = inputs(ours.d_in)
    with torch.no_grad():
        f = theirs.encode(x)
        assert torch.equal(ours.encode(x), f)
        assert torch.equal(ours.decode(f), theirs.decode(f))
        codes = ours.encode_sparse(x)
        dense = torch.zeros_like(f)
        dense[codes.rows, codes.latents] = codes.values
        assert torch.equal(dense, f)
        torch.testing.assert_close(ours.decode_codes(codes, len(x)), theirs.decode(f), atol=1e-5, rtol=1e-5)
        some = torch.tensor([0, ours.d_sae - 1, 1])
        torch.testing.assert_close(ours.latent_values(x, some), f[:, some], atol=1e-5, rtol=1e-5)
        one = torch.eye(ours.d_sae)[some]
        unit = theirs.decode(one) - theirs.decode(torch.zeros_like(one))
        torch.testing.assert_close(ours.directions(some), unit, atol=1e-5, rtol=1e-5)


ACTIVATIONS: dict[str, Activation] = {
    "topk": TopK(5), "topk-rescaled": TopK(5, rescale_by_decoder_norm=True),
    "jumprelu": JumpReLU(torch.linspace(-1, 2, 24)), "standard": ReLU(),
    "batchtopk-as-jumprelu": JumpReLU(torch.full((24,), 0.75)),
    "gated": Gated(torch.linspace(-1, 1, 24), torch.linspace(-0.5, 0.5, 24)),
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_our_folders_open_in_sae_lens(sae_lens: Any, tmp_path: Path, kind: str, subtract: bool, dtype: str) -> None:
    d = dictionary(ACTIVATIONS[kind], subtract=subtract)
    save_folder(d, tmp_path / "sae", dtype)
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "sae")
    again = load(tmp_path / "sae")
    assert_same(again, theirs)
    assert again.provenance == WHERE and again.architecture == d.architecture == theirs.cfg.architecture()
    assert theirs.W_enc.dtype == again.W_dec.dtype == torch.float32
    assert theirs.cfg.metadata.hook_name == WHERE.hook_name and theirs.cfg.metadata.model_name == WHERE.model_name
    assert theirs.cfg.metadata.context_size == 96 and theirs.cfg.metadata.prepend_bos is True
    assert theirs.cfg.metadata.undertow == WHERE.extra
    file = load_file(tmp_path / "sae/sae_weights.safetensors")
    assert {str(t.dtype) for t in file.values()} == {f"torch.{dtype}"}
    if dtype == "float32":
        assert_same(d, theirs)


def test_half_precision_rounds_the_weights_and_nothing_else(tmp_path: Path) -> None:
    d = dictionary(TopK(5))
    save_folder(d, tmp_path / "sae", "float16")
    assert torch.equal(load(tmp_path / "sae").W_dec, d.W_dec.half().float())
    assert not torch.equal(load(tmp_path / "sae").W_dec, d.W_dec)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), d_in=st.integers(1, 6), d_sae=st.integers(2, 12), share=st.floats(0, 1),
       kind=st.sampled_from(["topk", "topk-rescaled", "jumprelu", "standard", "gated"]),
       dtype=st.sampled_from(["float32", "float16"]))
def test_any_shape_goes_through_sae_lens_and_back(sae_lens: Any, tmp_path_factory: pytest.TempPathFactory, seed: int,
                                                  d_in: int, d_sae: int, share: float, kind: str, dtype: str) -> None:
    folder = tmp_path_factory.mktemp("round")
    k = max(1, round(share * d_sae))
    threshold = torch.randn(d_sae, generator=torch.Generator().manual_seed(seed))
    chosen: Activation = {"topk": TopK(k), "topk-rescaled": TopK(k, True), "jumprelu": JumpReLU(threshold),
                          "standard": ReLU(), "gated": Gated(threshold, threshold / 4)}[kind]
    save_folder(dictionary(chosen, seed, d_in, d_sae), folder / "ours", dtype)
    theirs = sae_lens.SAE.load_from_disk(folder / "ours")
    assert_same(load(folder / "ours"), theirs)
    theirs.save_model(folder / "theirs")
    assert_same(load(folder / "theirs"), theirs)


def saved_by_sae_lens(sae_lens: Any, architecture: str, folder: Path, **settings: Any) -> Any:
    """An inference SAE of sae-lens' own with random weights, saved by itself."""
    metadata = sae_lens.saes.sae.SAEMetadata(model_name="gpt2-small", hook_name="blocks.1.hook_resid_pre",
                                             context_size=64, prepend_bos=False)
    cls, cfg = sae_lens.registry.get_sae_class(architecture)
    sae = cls(cfg(d_in=8, d_sae=24, metadata=metadata, **settings))
    draw = torch.Generator().manual_seed(5)
    for parameter in sae.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw).to(parameter.dtype)
    sae.save_model(folder)
    return sae


@pytest.mark.parametrize(("architecture", "more"), [
    ("topk", {"k": 4}), ("topk", {"k": 4, "rescale_acts_by_decoder_norm": True}), ("jumprelu", {}), ("standard", {}),
    ("standard", {"apply_b_dec_to_input": False}), ("gated", {}), ("abstopk", {"k": 4}),
    ("abstopk", {"k": 4, "rescale_acts_by_decoder_norm": True}), ("matching_pursuit", {})])
def test_folders_of_sae_lens_open_in_ours(sae_lens: Any, tmp_path: Path, architecture: str,
                                          more: dict[str, Any]) -> None:
    saved_by_sae_lens(sae_lens, architecture, tmp_path / "sae", **more)
    ours, theirs = load(tmp_path / "sae"), sae_lens.SAE.load_from_disk(tmp_path / "sae")
    assert_same(ours, theirs)
    assert isinstance(ours, LinearDictionary) == (architecture in ("topk", "jumprelu", "standard", "gated"))
    assert ours.provenance == Provenance("gpt2-small", "blocks.1.hook_resid_pre", 64, False)
    assert not ours.encode(inputs()).requires_grad


def test_a_wrapped_sae_moves_and_refuses_another_width(sae_lens: Any, tmp_path: Path) -> None:
    theirs = saved_by_sae_lens(sae_lens, "abstopk", tmp_path / "sae", k=4)
    ours = load(tmp_path / "sae")
    assert_same(ours.to("cpu"), theirs)
    with pytest.raises(DictionaryError, match="width 3 given to an SAE of width 8"):
        ours.encode(torch.zeros(1, 3))


def test_a_trained_batch_top_k_opens_as_jump_relu(sae_lens: Any, tmp_path: Path) -> None:
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    cfg = sae_lens.BatchTopKTrainingSAEConfig(d_in=8, d_sae=24, k=3)
    draw = torch.Generator().manual_seed(7)

    def activations() -> Iterator[Tensor]:
        while True:
            yield torch.randn(64, 8, generator=draw)

    training = sae_lens.BatchTopKTrainingSAE(cfg)
    steps = SAETrainerConfig(n_checkpoints=0, checkpoint_path=None, save_final_checkpoint=False,
                             total_training_samples=64 * 20, device="cpu", autocast=False, lr=1e-3, lr_end=1e-4,
                             lr_scheduler_name="constant", lr_warm_up_steps=0, adam_beta1=0.9, adam_beta2=0.999,
                             lr_decay_steps=0, n_restart_cycles=1, train_batch_size_samples=64,
                             dead_feature_window=1000, feature_sampling_window=1000,
                             logger=sae_lens.LoggingConfig(log_to_wandb=False))
    trained = SAETrainer(cfg=steps, sae=training, data_provider=activations(), evaluator=None).fit()
    trained.save_inference_model(tmp_path / "sae")
    ours = load(tmp_path / "sae")
    assert isinstance(ours, LinearDictionary) and isinstance(ours.activation, JumpReLU)
    assert float(ours.activation.threshold.min()) > 0
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path / "sae"))


def test_half_precision_configurations_are_computed_in_float32(sae_lens: Any, tmp_path: Path) -> None:
    saved_by_sae_lens(sae_lens, "topk", tmp_path / "sae", k=4, dtype="bfloat16")
    assert_same(load(tmp_path / "sae"), sae_lens.SAE.load_from_disk(tmp_path / "sae", dtype="float32"))


def test_folders_from_before_version_6_keep_their_site(sae_lens: Any, tmp_path: Path) -> None:
    save_file(drawn(0, 8, 24), tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({
        "d_in": 8, "d_sae": 24, "dtype": "float32", "hook_point": "blocks.3.hook_resid_pre", "model_name": "gpt2-small",
        "activation_fn": "topk", "activation_fn_kwargs": {"k": 4}, "context_size": 128,
        "normalize_activations": False}))
    ours = load(tmp_path)
    assert ours.architecture == "topk" and ours.provenance.hook_name == "blocks.3.hook_resid_pre"
    assert_same(ours, sae_lens.SAE.load_from_disk(tmp_path))


def test_metadata_without_a_version_is_kept_although_sae_lens_drops_it(sae_lens: Any, tmp_path: Path) -> None:
    save_folder(dictionary(TopK(3)), tmp_path / "sae")
    rewrite(tmp_path / "sae", lambda cfg: cfg["metadata"].pop("sae_lens_version"))
    assert sae_lens.SAE.load_from_disk(tmp_path / "sae").cfg.metadata.hook_name is None
    assert load(tmp_path / "sae").provenance == WHERE


def test_our_architectures_are_read_and_written_without_importing_sae_lens(tmp_path: Path) -> None:
    save_folder(dictionary(TopK(3)), tmp_path / "sae")
    code = (f"import sys; from pathlib import Path; from sae.formats import load, save_folder\n"
            f"save_folder(load({str(tmp_path / 'sae')!r}), Path({str(tmp_path / 'again')!r}))\n"
            "assert not {'sae_lens', 'transformer_lens', 'wandb'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True,
                          cwd=Path(formats.__file__).parents[1])
    assert done.returncode == 0, done.stderr


def test_firing_frequencies_are_written_for_sae_lens(tmp_path: Path) -> None:
    density = torch.linspace(-9, -1, 24)
    save_folder(dictionary(TopK(3)), tmp_path / "sae", log10_density=density)
    assert torch.equal(load_file(tmp_path / "sae/sparsity.safetensors")["sparsity"], density)


# ---------------------------------------------------------------- refusals


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    change(cfg)
    (folder / "cfg.json").write_text(json.dumps(cfg))


def reweigh(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "sae_weights.safetensors")
    change(tensors)
    save_file(tensors, folder / "sae_weights.safetensors")


@pytest.mark.parametrize(("change", "message"), [
    (lambda cfg: cfg.pop("dtype"), "has no 'dtype'"),
    (lambda cfg: cfg.pop("architecture"), "has no 'architecture'"),
    (lambda cfg: cfg.pop("k"), "has no 'k'"),
    (lambda cfg: cfg.update(dtype="int8"), "unknown dtype 'int8'"),
    (lambda cfg: cfg.update(d_in="8"), "d_in = '8' is not a whole number"),
    (lambda cfg: cfg.update(k=25), "k = 25 is outside 1..24"),
    (lambda cfg: cfg.update(d_in=9), r"W_enc has shape \(8, 24\); cfg.json says \(9, 24\)"),
    (lambda cfg: cfg.update(architecture="jumprelu"), "lacks the tensor 'threshold'"),
    (lambda cfg: cfg.update(architecture="transcoder"), "reads one site and writes another"),
    (lambda cfg: cfg.update(architecture="jumprelu_skip_transcoder"), "reads one site and writes another"),
    (lambda cfg: cfg.update(architecture="temporal"), "needs whole sequences"),
    (lambda cfg: cfg.update(architecture="matryoshka_batchtopk"), "training checkpoint"),
    (lambda cfg: cfg.update(architecture="abstopk", normalize_activations="layer_norm"), "'layer_norm': decoding needs"),
    (lambda cfg: cfg.update(normalize_activations="expected_average_only_in"), "wrong scale"),
])
def test_configurations_that_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], object],
                                         message: str) -> None:
    save_folder(dictionary(TopK(3)), tmp_path / "sae")
    rewrite(tmp_path / "sae", change)
    with pytest.raises(DictionaryError, match=message):
        load(tmp_path / "sae")


def test_an_unknown_architecture_is_named_with_the_near_ones(sae_lens: Any, tmp_path: Path) -> None:
    save_folder(dictionary(TopK(3)), tmp_path / "sae")
    rewrite(tmp_path / "sae", lambda cfg: cfg.update(architecture="jumpreloo"))
    with pytest.raises(DictionaryError, match="unknown architecture 'jumpreloo'") as caught:
        load(tmp_path / "sae")
    assert "jumprelu" in caught.value.hint


def test_what_sae_lens_cannot_open_is_a_clear_error(sae_lens: Any, tmp_path: Path) -> None:
    saved_by_sae_lens(sae_lens, "abstopk", tmp_path / "sae", k=4)
    reweigh(tmp_path / "sae", lambda tensors: tensors.pop("b_enc"))
    with pytest.raises(DictionaryError, match=r"sae-lens cannot open .*b_enc"):
        load(tmp_path / "sae")


@pytest.mark.parametrize(("change", "error", "message"), [
    (lambda t: t.pop("b_enc"), DictionaryError, "lacks the tensor 'b_enc'"),
    (lambda t: t.update(surprise=torch.zeros(2)), DictionaryError, "unknown tensor 'surprise'"),
    (lambda t: t.update(W_dec=torch.zeros(8, 24)), DictionaryError, r"W_dec has shape \(8, 24\); .* says \(24, 8\)"),
    (lambda t: t["b_dec"].fill_(float("nan")), NumericsError, "b_dec of the SAE has 8 NaN"),
    (lambda t: t["W_enc"][0].fill_(float("inf")), NumericsError, "W_enc of the SAE has 24 NaN or infinite .* of 192"),
])
def test_weights_that_are_refused(tmp_path: Path, change: Callable[[dict[str, Tensor]], object], error: type[UserError],
                                  message: str) -> None:
    save_folder(dictionary(TopK(3)), tmp_path / "sae")
    reweigh(tmp_path / "sae", change)
    with pytest.raises(error, match=message):
        load(tmp_path / "sae")


def test_nan_in_a_wrapped_sae_is_named(sae_lens: Any, tmp_path: Path) -> None:
    saved_by_sae_lens(sae_lens, "abstopk", tmp_path / "sae", k=4)
    reweigh(tmp_path / "sae", lambda tensors: tensors["b_enc"].fill_(float("nan")))
    with pytest.raises(NumericsError, match="b_enc of the SAE has 24 NaN"):
        load(tmp_path / "sae")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights_are_named(tmp_path: Path, keep: int) -> None:
    save_folder(dictionary(TopK(3)), tmp_path / "sae")
    weights = tmp_path / "sae/sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    with pytest.raises(DictionaryError, match=r"sae_weights\.safetensors is truncated or damaged"):
        load(tmp_path / "sae")


def test_missing_files_are_named(tmp_path: Path) -> None:
    save_folder(dictionary(TopK(3)), tmp_path / "run/sae")
    with pytest.raises(DictionaryError, match=r"has no cfg\.json") as caught:
        load(tmp_path / "run")
    assert str(tmp_path / "run/sae") in caught.value.hint
    with pytest.raises(DictionaryError, match="is a file"):
        load(tmp_path / "run/sae/cfg.json")
    (tmp_path / "run/sae/sae_weights.safetensors").unlink()
    with pytest.raises(DictionaryError, match=r"has no sae_weights\.safetensors"):
        load(tmp_path / "run/sae")
    (tmp_path / "run/sae/cfg.json").write_text("{")
    with pytest.raises(DictionaryError, match="is not JSON"):
        load(tmp_path / "run/sae")
    (tmp_path / "run/sae/cfg.json").write_text("[]")
    with pytest.raises(DictionaryError, match="holds list"):
        load(tmp_path / "run/sae")


def test_a_changed_artifact_is_refused(tmp_path: Path) -> None:
    with create_artifact(tmp_path / "sae", "sae", {}) as work:
        save_folder(dictionary(TopK(3)), work)
    assert load(tmp_path / "sae").d_in == 8
    reweigh(tmp_path / "sae", lambda tensors: tensors["b_dec"].add_(1))
    with pytest.raises(ArtifactError, match="has changed"):
        load(tmp_path / "sae")
    with create_artifact(tmp_path / "other", "activations", {}) as work:
        save_folder(dictionary(TopK(3)), work)
    with pytest.raises(ArtifactError, match="of kind 'activations'"):
        load(tmp_path / "other")


def test_nothing_is_overwritten_and_bad_types_leave_nothing(tmp_path: Path) -> None:
    save_folder(dictionary(TopK(3)), tmp_path / "sae")
    with pytest.raises(ArtifactError, match="already holds an SAE"):
        save_folder(dictionary(ReLU()), tmp_path / "sae")
    with pytest.raises(DictionaryError, match="'int4'"):
        save_folder(dictionary(ReLU()), tmp_path / "new", "int4")
    large = LinearDictionary(**drawn(0, 8, 24) | {"b_enc": torch.full((24,), 1e5)}, activation=ReLU(), provenance=WHERE)
    with pytest.raises(NumericsError, match="b_enc has values beyond the range of float16"):
        save_folder(large, tmp_path / "new", "float16")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- names


def test_packaged_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_folder(dictionary(TopK(3)), tmp_path / "smollm2/12")
    monkeypatch.setattr(formats, "PACKAGED", tmp_path)
    assert formats.packaged_names() == ["smollm2/12"]
    assert load("smollm2/12").provenance == WHERE
    with pytest.raises(DictionaryError, match=r"no SAE called 'smolm2/12': .*\(smollm2/12\)") as caught:
        load("smolm2/12")
    assert caught.value.hint == "did you mean smollm2/12?"
    with pytest.raises(DictionaryError, match=r"no SAE called '\.\./smollm2/12'"):
        load("../smollm2/12")
    with pytest.raises(DictionaryError) as caught:
        load("runs/nothing")
    assert "RELEASE:SAE_ID" in caught.value.hint


def test_a_release_that_cannot_be_fetched_is_a_clear_error(sae_lens: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(release: str, sae_id: str, **_: Any) -> None:
        raise ConnectionError(f"no route to the hub for {release} {sae_id}")

    with pytest.raises(DictionaryError, match=r"sae-lens cannot open no-such-release:x: .*not found") as caught:
        load("no-such-release:x")
    assert "needs the network" in caught.value.hint
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", offline)
    with pytest.raises(DictionaryError, match=r"ConnectionError: no route to the hub for gpt2-small-res-jb blocks\.0"):
        load("gpt2-small-res-jb:blocks.0.hook_resid_pre")


@pytest.mark.parametrize(("architecture", "more"), [("topk", {"k": 4}), ("gated", {})])
def test_a_release_is_opened_and_imported(sae_lens: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          architecture: str, more: dict[str, Any]) -> None:
    theirs = saved_by_sae_lens(sae_lens, architecture, tmp_path / "hub", **more)
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *_, **__: sae_lens.SAE.load_from_disk(tmp_path / "hub"))
    assert_same(load("some-release:some/id"), theirs)
    imported = import_sae("some-release:some/id", tmp_path / "out", "gpt2", 8, "blocks.1.hook_resid_pre")
    assert imported.warnings == []
    assert_same(load(tmp_path / "out"), theirs)
    assert load(tmp_path / "out").provenance == imported.dictionary.provenance


# ---------------------------------------------------------------- fit


def fits(subject: str = "smollm2", d_model: int = 8, hook: str | None = "blocks.12.hook_resid_post",
         digest: str | None = None, same_model: bool = False, **changed: Any) -> list[str]:
    where = Provenance(**{"model_name": WHERE.model_name, "hook_name": WHERE.hook_name, "context_size": 96,
                          "prepend_bos": True, "extra": WHERE.extra} | changed)
    return check_fits(dictionary(TopK(3), provenance=where), subject, d_model, hook, digest, same_model)


def test_what_fits() -> None:
    assert fits() == []  # smollm2 is the catalogue's name for that repository
    assert fits(hook=None) == []
    assert fits("SmolLM2-135M-Instruct/") == []
    assert fits("/models/smollm2-135m-instruct", digest="0123456789abcdef") == []
    assert fits("/models/mine", digest="0123456789abcdef") == []  # the same weights under another name
    assert fits(hook="blocks.12.hook_out") == []
    assert fits("gpt2", model_name="gpt2-small", extra={}) == []
    assert fits("openai-community/GPT2", model_name="gpt2-small", extra={}) == []
    assert fits(hook="blocks.3.hook_resid_pre", hook_name="blocks.3.hook_in") == []


def test_another_width_is_refused_and_both_are_named() -> None:
    with pytest.raises(DictionaryError, match="width 8; smollm2 has 16") as caught:
        fits(d_model=16)
    assert WHERE.model_name in caught.value.hint


def test_another_site_is_refused_and_both_are_named() -> None:
    with pytest.raises(DictionaryError, match=r"at blocks\.12\.hook_resid_post, not at blocks\.11\.hook") as caught:
        fits(hook="blocks.11.hook_resid_post")
    assert caught.value.hint == "use it at its own site: --site blocks.12.hook_resid_post"
    for hook in ("blocks.13.hook_resid_pre", "blocks.13.hook_in"):
        with pytest.raises(DictionaryError) as caught:
            fits(hook=hook)
        assert "carry the same numbers" in caught.value.hint
    with pytest.raises(DictionaryError) as caught:
        fits(hook="blocks.12.hook_mlp_out")
    assert "same numbers" not in caught.value.hint


def test_another_model_is_refused_unless_said_to_be_the_same() -> None:
    for digest in (None, "ffffffffffffffff"):
        with pytest.raises(DictionaryError, match=rf"on {WHERE.model_name}; the subject is gpt2") as caught:
            fits("gpt2", digest=digest)
        assert "--same-model" in caught.value.hint
        assert "for the same model, as asked" in fits("gpt2", digest=digest, same_model=True)[0]
    with pytest.raises(DictionaryError):
        fits("gpt2-medium", model_name="gpt2-small", extra={})


def test_what_cannot_be_told_is_a_warning() -> None:
    [other_weights] = fits(digest="ffffffffffffffff")
    assert "0123456789abcdef" in other_weights and "ffffffffffffffff" in other_weights
    site, model = fits(model_name="", hook_name="", extra={})
    assert "which site" in site and "which model" in model


def test_import_copies_the_files_as_they_are(sae_lens: Any, tmp_path: Path) -> None:
    saved_by_sae_lens(sae_lens, "gated", tmp_path / "theirs")
    save_file({"sparsity": torch.zeros(24)}, tmp_path / "theirs/sparsity.safetensors")
    (tmp_path / "theirs/trainer_state.pt").write_bytes(b"never read")
    imported = import_sae(tmp_path / "theirs", tmp_path / "out", "gpt2", 8, "blocks.1.hook_resid_pre", "ab" * 8)
    assert imported.path == tmp_path / "out" and imported.dictionary.architecture == "gated"
    for name in ("cfg.json", "sae_weights.safetensors", "sparsity.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "cfg.json", "manifest.json", "sae_weights.safetensors", "sparsity.safetensors"]
    assert_same(load(tmp_path / "out"), sae_lens.SAE.load_from_disk(tmp_path / "out"))


@pytest.mark.parametrize(("d_model", "hook", "subject"), [
    (9, "blocks.12.hook_resid_post", "smollm2"), (8, "blocks.3.hook_resid_post", "smollm2"),
    (8, "blocks.12.hook_resid_post", "gpt2")])
def test_an_import_that_does_not_fit_leaves_nothing(tmp_path: Path, d_model: int, hook: str, subject: str) -> None:
    save_folder(dictionary(TopK(3)), tmp_path / "sae")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DictionaryError):
        import_sae(tmp_path / "sae", tmp_path / "out", subject, d_model, hook)
    assert sorted(tmp_path.iterdir()) == before
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/file").write_text("mine")
    with pytest.raises(ArtifactError, match="not empty"):
        import_sae(tmp_path / "sae", tmp_path / "taken", "smollm2", 8, None)
    assert (tmp_path / "taken/file").read_text() == "mine"
