"""SAE folders in sae-lens' format: the only place that reads or writes them, and the only door to sae-lens.

A folder holds `cfg.json`, `sae_weights.safetensors` and perhaps `sparsity.safetensors` (log10 firing frequency). Four
architectures are read without sae-lens, whose import takes seconds: topk, jumprelu, standard and gated. BatchTopK and
Matryoshka SAEs are jumprelu on disk. Everything else that sae-lens opens is wrapped.

Computation is in float32 whatever the file's type (float64 stays), as in sae-lens' `from_pretrained`.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import json
import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.dictionary import (
    UNKNOWN_CONTEXT,
    Activation,
    Codes,
    Dictionary,
    Gated,
    JumpReLU,
    LinearDictionary,
    Provenance,
    ReLU,
    TopK,
    known_latents,
    require_finite,
    sparse_codes,
    weight_shapes,
)
from sae.normed import OWN_NORMS, NormedDictionary, linear_part
from undertow.core.errors import ArtifactError, DictionaryError, NumericsError, near_matches
from undertow.core.record import run_record
from undertow.core.storage import MANIFEST, create_artifact, disk_errors, open_artifact, refuse_existing, write_json
from undertow.subjects.catalog import fetchable

log = logging.getLogger(__name__)
KIND = "sae"
CFG, WEIGHTS, SPARSITY = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
PACKAGED = Path(__file__).parent / "data"
NATIVE = ("topk", "jumprelu", "standard", "gated")
TRAINING_ONLY = ("batchtopk", "matryoshka_batchtopk")
SAE_LENS = "6.54.12"  # written where sae-lens is not installed; without a version its loader drops all metadata
FILE_DTYPES = {"float32": torch.float32, "float16": torch.float16}
CFG_DTYPES = ("float32", "float64", "float16", "bfloat16")
ALIASES = {"hook_in": "hook_resid_pre", "hook_out": "hook_resid_post", "attn.o.hook_in": "attn.hook_z"}
HEADS_SIDE_BY_SIDE = "hook_z"  # a site whose width is not the subject's: heads × head width
SAME_MODELS = {"gpt2-small": "gpt2"}


class Imported(NamedTuple):
    """An imported SAE: its folder, the opened dictionary, and what the user should know about the fit."""

    path: Path
    dictionary: Dictionary
    warnings: list[str]


@final
class SaeLensDictionary:
    """Any other inference SAE that sae-lens opens, e.g. abstopk.

    Of these, SAEs that scale every input by its own norm or variance are refused: sae-lens keeps the statistics of the
    last `encode` on the module, so that `decode` would depend on the order of calls. (Those of `NATIVE` are ours to
    compute, without such a state: see `sae.normed`.)
    """

    def __init__(self, sae: Any, provenance: Provenance) -> None:
        """`sae` is a sae_lens.SAE; it is not typed as one because that import takes seconds."""
        cfg = sae.cfg.to_dict()
        _refuse_unsupported(cfg, native=False)
        require_finite(dict(sae.state_dict()))
        sae.requires_grad_(False)
        sae.turn_off_forward_pass_hook_z_reshaping()  # our activations are flat already
        self._sae = sae
        self._rescaled = bool(cfg.get("rescale_acts_by_decoder_norm"))
        self.provenance = provenance
        self.architecture = str(cfg["architecture"])
        self.d_in, self.d_sae = int(cfg["d_in"]), int(cfg["d_sae"])

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        """Decoder rows as stored."""
        return self._sae.W_dec.data

    def encode(self, x: Float[Tensor, "token d_in"]) -> Float[Tensor, "token d_sae"]:
        """Codes of activations, dense. Raises DictionaryError if their width is not d_in."""
        if x.shape[-1] != self.d_in:
            raise DictionaryError(f"activations of width {x.shape[-1]} given to an SAE of width {self.d_in}",
                                  "use the subject and the site that the SAE was trained on")
        return self._sae.encode(x.to(self.W_dec))

    def encode_sparse(self, x: Float[Tensor, "token d_in"]) -> Codes:
        """Codes of activations, the non-zero ones only."""
        return sparse_codes(self.encode(x))

    def latent_values(self, x: Float[Tensor, "token d_in"], latents: Int[Tensor, "k"]) -> Float[Tensor, "token k"]:
        """Codes of a few latents (all are computed). Raises DictionaryError for an unknown latent."""
        return self.encode(x)[:, known_latents(latents, self.d_sae).to(self.W_dec.device)]

    def decode(self, f: Float[Tensor, "token d_sae"]) -> Float[Tensor, "token d_in"]:
        """Reconstruction from dense codes."""
        return self._sae.decode(f.to(self.W_dec))

    def decode_codes(self, codes: Codes, n: int) -> Float[Tensor, "n d_in"]:
        """Reconstruction of `n` tokens from sparse codes."""
        f = torch.zeros(n, self.d_sae, dtype=self.W_dec.dtype, device=self.W_dec.device)
        f[codes.rows, codes.latents] = codes.values.to(self.W_dec)
        return self.decode(f)

    def directions(self, latents: Int[Tensor, "k"]) -> Float[Tensor, "k d_in"]:
        """What one unit of each latent adds to the reconstruction. Raises DictionaryError for an unknown latent."""
        rows = self.W_dec[known_latents(latents, self.d_sae).to(self.W_dec.device)]
        return rows / rows.norm(dim=-1, keepdim=True) if self._rescaled else rows

    def to(self, device: torch.device | str) -> SaeLensDictionary:
        """The same dictionary on `device`."""
        return SaeLensDictionary(copy.deepcopy(self._sae).to(device=device), self.provenance)

    def save(self, folder: Path) -> None:
        """Write the SAE as sae-lens does."""
        self._sae.save_model(folder)


Opened = LinearDictionary | NormedDictionary | SaeLensDictionary


def load(path_or_name: str | Path) -> Opened:
    """Open an SAE: a folder (ours, digests checked, or sae-lens'), a packaged name, or "release:sae_id" of sae-lens.

    Raises:
        DictionaryError: no such SAE, or one that cannot be used, with the reason.
        ArtifactError: a folder of ours that has changed since it was written.
        NumericsError: weights with NaN or infinity, naming the tensor.
    """
    folder = _find_folder(path_or_name)
    return _load_release(str(path_or_name)) if folder is None else _load_folder(folder)


def packaged_names() -> list[str]:
    """Names of the SAEs that come with this package, such as `smollm2/12`."""
    return sorted(cfg.parent.relative_to(PACKAGED).as_posix() for cfg in PACKAGED.rglob(CFG))


def save_folder(dictionary: LinearDictionary | NormedDictionary, folder: Path, dtype: str = "float32",
                log10_density: Float[Tensor, "d_sae"] | None = None) -> None:
    """Write a folder that both `load` and `sae_lens.SAE.load_from_disk` open, `cfg.json` last.

    With `dtype` "float16" the file is half as large and cfg.json still says float32, so that both readers widen the
    weights and compute in float32. `log10_density` is log10 of each latent's firing frequency.

    Raises:
        ArtifactError: the folder already holds an SAE.
        DictionaryError: an unknown `dtype`.
        NumericsError: a weight is out of range for `dtype`.
    """
    if dtype not in FILE_DTYPES:
        raise DictionaryError(f"cannot write weights as {dtype!r}", f"choose {' or '.join(FILE_DTYPES)}")
    if (folder / CFG).exists() or (folder / WEIGHTS).exists():
        raise ArtifactError(f"{folder} already holds an SAE", "choose another --out")
    tensors = {name: tensor.detach().to("cpu", FILE_DTYPES[dtype]).contiguous()
               for name, tensor in linear_part(dictionary).tensors().items()}
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise NumericsError(f"{name} has values beyond the range of {dtype}", "write the SAE as float32")
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS)
        if log10_density is not None:
            save_file({"sparsity": log10_density.detach().float().cpu().contiguous()}, folder / SPARSITY)
        write_json(folder / CFG, _cfg(dictionary))


def check_fits(dictionary: Dictionary, subject_name: str, d_model: int, hook_name: str | None,
               subject_digest: str | None, same_model: bool = False) -> list[str]:
    """Refuse an SAE of another width, site or model; return warnings about what cannot be told or is only nearly right.

    Args:
        dictionary: the SAE.
        subject_name: the subject's name or folder; names are compared by their last part, in lower case.
        d_model: width of the subject's residual stream.
        hook_name: the site it will be used at; None takes the SAE's own.
        subject_digest: digest of the subject's weights, if known; equal digests settle the question of the model.
        same_model: take the subject for the model of the SAE although its name differs.

    Raises DictionaryError.
    """
    if dictionary.d_in != d_model and not (hook_name or dictionary.provenance.hook_name).endswith(HEADS_SIDE_BY_SIDE):
        raise DictionaryError(f"the SAE reads activations of width {dictionary.d_in}; {subject_name} has {d_model}",
                              _trained_on(dictionary.provenance))
    found = _check_site(dictionary.provenance.hook_name, hook_name)
    found += _check_model(dictionary.provenance, subject_name, subject_digest, same_model)
    return found


def import_sae(source: str | Path, out: Path, subject_name: str, d_model: int, hook_name: str | None,
               subject_digest: str | None = None, same_model: bool = False) -> Imported:
    """Copy a sae-lens folder or release to `out`, an artifact of ours, if `check_fits` lets it pass.

    Files of a folder are copied as they are. After any error nothing is left at `out`.

    Raises:
        DictionaryError: the SAE cannot be opened or does not fit.
        ArtifactError: `out` is not empty.
    """
    refuse_existing(out)
    folder = _find_folder(source)
    dictionary = load(source)
    warnings = check_fits(dictionary, subject_name, d_model, hook_name, subject_digest, same_model)
    record = run_record({"source": str(source), "subject": subject_name, "site": hook_name}, seed=0, warnings=warnings,
                        architecture=dictionary.architecture, d_in=dictionary.d_in, d_sae=dictionary.d_sae)
    with create_artifact(out, KIND, record) as work:
        if folder is not None:
            for name in (CFG, WEIGHTS, SPARSITY):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, work / name)
        elif isinstance(dictionary, SaeLensDictionary):
            dictionary.save(work)
        else:
            save_folder(dictionary, work)
    return Imported(out, dictionary, warnings)


def _find_folder(path_or_name: str | Path) -> Path | None:
    """The folder meant by `path_or_name`, or None if it has the form of a release."""
    path, name = Path(path_or_name), str(path_or_name)
    if path.is_dir():
        return path
    if path.exists():
        raise DictionaryError(f"{path} is a file, not an SAE folder", f"give the folder that holds {CFG} and {WEIGHTS}")
    packaged = packaged_names()
    if name in packaged:
        return PACKAGED / name
    release, colon, sae_id = name.partition(":")
    if release and colon and sae_id:
        return None
    raise DictionaryError(
        f"no SAE called {name!r}: not a folder, and not one of the packaged ({', '.join(packaged) or 'none'})",
        near_matches(name, packaged) or f"give a folder with {CFG}, a packaged name, or RELEASE:SAE_ID")


def _load_folder(folder: Path) -> Opened:
    if (folder / MANIFEST).is_file():
        open_artifact(folder, KIND)
    cfg = _read_cfg(folder)
    provenance = _provenance(cfg)
    if _is_modern(cfg) and cfg["architecture"] in NATIVE:
        return _linear(cfg, _read_weights(folder), provenance, str(folder))
    _read_weights(folder)  # so that a damaged file is named before sae-lens is imported
    from sae_lens import SAE  # takes seconds
    from sae_lens.registry import SAE_CLASS_REGISTRY

    architecture = cfg.get("architecture", "standard")
    if architecture not in SAE_CLASS_REGISTRY:
        raise DictionaryError(f"{folder / CFG}: unknown architecture {architecture!r}",
                              near_matches(str(architecture), SAE_CLASS_REGISTRY)
                              or f"known are {', '.join(SAE_CLASS_REGISTRY)}")
    with _sae_lens_errors(str(folder), "check cfg.json, or save the SAE again with sae-lens"):
        sae = SAE.load_from_disk(folder, dtype=_compute_dtype(cfg, str(folder)))
    return _from_sae_lens(sae, provenance, str(folder))


def _load_release(name: str) -> Opened:
    release, _, sae_id = name.partition(":")
    from sae_lens import SAE  # takes seconds

    with _sae_lens_errors(name, "a release needs the network, or an earlier download in the Hugging Face cache"):
        sae = SAE.from_pretrained(release, sae_id, device="cpu", dtype="float32")
    return _from_sae_lens(sae, _provenance(sae.cfg.to_dict()), name)


def _from_sae_lens(sae: Any, provenance: Provenance, origin: str) -> Opened:
    cfg = sae.cfg.to_dict()
    _refuse_unsupported(cfg)
    if cfg["architecture"] in NATIVE:
        return _linear(cfg, {name: tensor.detach() for name, tensor in sae.state_dict().items()}, provenance, origin)
    return SaeLensDictionary(sae, provenance)


@contextlib.contextmanager
def _sae_lens_errors(origin: str, hint: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any kind: sae-lens lets those of the libraries below it through
        text = " ".join(str(error).split())[:300]
        raise DictionaryError(f"sae-lens cannot open {origin}: {type(error).__name__}: {text}", hint) from error


def _read_cfg(folder: Path) -> dict[str, Any]:
    """cfg.json, with everything that would be refused later refused now."""
    path = folder / CFG
    if not path.is_file():
        inside = sorted(str(cfg.parent) for cfg in folder.glob(f"*/{CFG}"))[:3]
        raise DictionaryError(f"{folder} is not an SAE folder: it has no {CFG}",
                              f"did you mean {' or '.join(inside)}?" if inside else "")
    try:
        cfg = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DictionaryError(f"{path} is not JSON: {error}") from None
    if not isinstance(cfg, dict):
        raise DictionaryError(f"{path} holds {type(cfg).__name__}, not a mapping of settings")
    needed = ["dtype", "d_in", "d_sae"]
    if _is_modern(cfg):
        needed += ["architecture", "k"] if cfg.get("architecture") == "topk" else ["architecture"]
    for key in needed:
        if key not in cfg:
            raise DictionaryError(f"{path} has no {key!r}", f"cfg.json needs {', '.join(needed)}")
        if key in ("d_in", "d_sae", "k") and not isinstance(cfg[key], int):
            raise DictionaryError(f"{path}: {key} = {cfg[key]!r} is not a whole number")
    _compute_dtype(cfg, str(path))
    _refuse_unsupported(cfg)
    return cfg


def _is_modern(cfg: dict[str, Any]) -> bool:
    """Whether sae-lens 6 or later wrote it; earlier layouts are left to sae-lens to convert."""
    version = cfg.get("sae_lens_version") or _metadata(cfg).get("sae_lens_version")
    return version is not None and int(re.match(r"\d*", str(version))[0] or 0) >= 6  # pyright: ignore[reportOptionalSubscript]


def _metadata(cfg: dict[str, Any]) -> dict[str, Any]:
    metadata = cfg.get("metadata")
    return metadata if isinstance(metadata, dict) else {}


def _refuse_unsupported(cfg: dict[str, Any], native: bool = True) -> None:
    """`native`: it will be computed by us, if its architecture is one of `NATIVE`."""
    architecture, scaling = str(cfg.get("architecture", "standard")), cfg.get("normalize_activations") or "none"
    if "transcoder" in architecture:
        raise DictionaryError(f"architecture {architecture!r} reads one site and writes another",
                              "give an SAE: its input and output are the same site")
    if architecture == "temporal":
        raise DictionaryError("architecture 'temporal' needs whole sequences; its codes alone do not reconstruct",
                              "give an SAE that reads single activations, such as topk, jumprelu, standard or gated")
    if architecture in TRAINING_ONLY:
        raise DictionaryError(f"architecture {architecture!r} is a training checkpoint, not an inference SAE",
                              "save it with sae-lens' save_inference_model")
    if scaling in OWN_NORMS:
        if native and architecture in NATIVE:
            return
        raise DictionaryError(f"normalize_activations = {scaling!r}: decoding needs the statistics of each input, and of an "
                              f"SAE of architecture {architecture!r} sae-lens keeps them between calls",
                              "give an SAE with normalize_activations = 'none'")
    if scaling != "none":
        raise DictionaryError(f"normalize_activations = {scaling!r}: the factor is not in the folder, so activations "
                              "would be read at a wrong scale", "fold it into the weights with sae-lens and save again")


def _compute_dtype(cfg: dict[str, Any], origin: str) -> str:
    dtype = str(cfg["dtype"]).removeprefix("torch.")
    if dtype not in CFG_DTYPES:
        raise DictionaryError(f"{origin}: unknown dtype {cfg['dtype']!r}", f"choose one of {', '.join(CFG_DTYPES)}")
    return "float64" if dtype == "float64" else "float32"


def _read_weights(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        raise DictionaryError(f"{folder} has no {WEIGHTS}", "copy the whole folder")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise DictionaryError(f"{path} is truncated or damaged: {error}", "copy or download it again") from None


def _linear(cfg: dict[str, Any], tensors: dict[str, Tensor], provenance: Provenance,
            origin: str) -> LinearDictionary | NormedDictionary:
    architecture = cfg["architecture"]
    d_in, d_sae = cfg["d_in"], cfg["d_sae"]
    shapes = weight_shapes(architecture, d_in, d_sae)
    missing, extra = sorted(shapes.keys() - tensors.keys()), sorted(tensors.keys() - shapes.keys())
    if missing or extra:
        problem = f"lacks the tensor {missing[0]!r}" if missing else f"has the unknown tensor {extra[0]!r}"
        raise DictionaryError(f"{origin}: {WEIGHTS} {problem}", f"{architecture} has {', '.join(shapes)}")
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise DictionaryError(f"{origin}: {name} has shape {tuple(tensors[name].shape)}; cfg.json says {shape}")
    require_finite(tensors)
    weights = {name: tensors[name].to(getattr(torch, _compute_dtype(cfg, origin))) for name in shapes}
    activation: Activation = ReLU()
    if architecture == "topk":
        activation = TopK(int(cfg["k"]), bool(cfg.get("rescale_acts_by_decoder_norm", False)))
    if architecture == "jumprelu":
        activation = JumpReLU(weights.pop("threshold"))
    if architecture == "gated":
        activation = Gated(weights.pop("b_mag"), weights.pop("r_mag"))
        weights["b_enc"] = weights.pop("b_gate")
    made = LinearDictionary(**weights, activation=activation, provenance=provenance,
                            subtract_b_dec=bool(cfg.get("apply_b_dec_to_input", True)))
    norm = cfg.get("normalize_activations")
    return NormedDictionary(made, norm) if norm in OWN_NORMS else made


def _provenance(cfg: dict[str, Any]) -> Provenance:
    """From the metadata, else from the top level, where sae-lens kept these before version 6."""
    known = {"hook_name": cfg.get("hook_point")} | cfg | _metadata(cfg)
    prepend_bos, extra = known.get("prepend_bos"), known.get("undertow")
    return Provenance(model_name=str(known.get("model_name") or ""), hook_name=str(known.get("hook_name") or ""),
                      context_size=int(known.get("context_size") or UNKNOWN_CONTEXT),
                      prepend_bos=True if prepend_bos is None else bool(prepend_bos),
                      extra=extra if isinstance(extra, dict) else {})


def _cfg(dictionary: LinearDictionary | NormedDictionary) -> dict[str, Any]:
    try:
        version = importlib.metadata.version("sae-lens")
    except importlib.metadata.PackageNotFoundError:
        version = SAE_LENS
    p, linear = dictionary.provenance, linear_part(dictionary)
    cfg: dict[str, Any] = {
        "architecture": dictionary.architecture, "d_in": dictionary.d_in, "d_sae": dictionary.d_sae, "dtype": "float32",
        "device": "cpu", "apply_b_dec_to_input": linear.subtract_b_dec,
        "normalize_activations": dictionary.norm if isinstance(dictionary, NormedDictionary) else "none",
        "reshape_activations": HEADS_SIDE_BY_SIDE if p.hook_name.endswith(HEADS_SIDE_BY_SIDE) else "none",
        "metadata": {"sae_lens_version": version, "model_name": p.model_name, "hook_name": p.hook_name,
                     "context_size": p.context_size, "prepend_bos": p.prepend_bos, "undertow": p.extra},
    }
    if isinstance(linear.activation, TopK):
        cfg |= {"k": linear.activation.k, "rescale_acts_by_decoder_norm": linear.activation.rescale_by_decoder_norm}
    return cfg


def _trained_on(provenance: Provenance) -> str:
    if not provenance.model_name:
        return "give the subject that it was trained on with --model"
    site = f" at {provenance.hook_name}" if provenance.hook_name else ""
    return f"it was trained on {provenance.model_name}{site}: give that with --model"


def _canonical_hook(name: str) -> str:
    """TransformerLens' aliases by one name."""
    match = re.fullmatch(r"(blocks\.\d+\.)(.+)", name)
    return match[1] + ALIASES.get(match[2], match[2]) if match else name


def _check_site(own: str, asked: str | None) -> list[str]:
    if asked is None:
        return []
    if not own:
        return [f"the SAE does not say which site it was trained at; taking {asked}"]
    if _canonical_hook(own) == _canonical_hook(asked):
        return []
    sites = [re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", _canonical_hook(name)) for name in (own, asked)]
    boundary = {int(site[1]) + (site[2] == "post") for site in sites if site}
    same = all(sites) and len(boundary) == 1
    hint = f"use it at its own site: --site {own}"
    raise DictionaryError(f"the SAE was trained at {own}, not at {asked}",
                          f"the two carry the same numbers, but are different sites; {hint}" if same else hint)


def _model_key(name: str) -> str:
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    entry = fetchable(last)
    return entry.hub.rsplit("/", 1)[-1].lower() if entry else SAME_MODELS.get(last, last)


def _check_model(provenance: Provenance, subject_name: str, subject_digest: str | None, same_model: bool) -> list[str]:
    own, own_digest = provenance.model_name, provenance.extra.get("subject_digest")
    if subject_digest and own_digest == subject_digest:
        return []
    if not own:
        return [f"the SAE does not say which model it was trained on; taking {subject_name}"]
    if _model_key(own) != _model_key(subject_name):
        if not same_model:
            raise DictionaryError(f"the SAE was trained on {own}; the subject is {subject_name}",
                                  f"use --model {own}, or --same-model if both are the same model under two names")
        return [f"the SAE was trained on {own}; taking {subject_name} for the same model, as asked"]
    if subject_digest and own_digest:
        return [f"the SAE was trained on other weights of {own} (digest {own_digest}) than these ({subject_digest}), "
                "for example another quantisation: figures may be worse than its card says"]
    return []
