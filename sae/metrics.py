"""Judging a dictionary, on held-out text only. Every figure states its formula, unit and range."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.corpus import TokenBatch
from sae.dictionary import Codes, Dictionary
from sae.normed import reconstruct
from undertow.core.errors import TextError
from undertow.subjects.sites import Site
from undertow.subjects.splicing import EditResult, splice
from undertow.subjects.subject import Subject

DENSITY_EDGES = tuple(range(-7, 1))  # powers of ten


class Reconstruction(NamedTuple):
    """How well a dictionary reconstructs activations, and how sparsely.

    Attributes:
        fvu: fraction of variance unexplained, Σ‖x − x̂‖² / Σ‖x − x̄‖² with x̄ the mean over the same activations; ≥ 0,
            0 is perfect, 1 is as good as the mean. (1 − R², the mean-centred form; not sae-lens' older one about zero.)
        l0: mean number of latents above zero a token.
        dead_share: share of latents that never fired on these tokens, in [0, 1]; falls with the number of tokens.
        density: share of tokens on which each latent fired.
        mean: x̄.
        tokens: number of activations.
    """

    fvu: float
    l0: float
    dead_share: float
    density: Float[Tensor, "d_sae"]
    mean: Float[Tensor, "d_in"]
    tokens: int

    def histogram(self) -> dict[str, int]:
        """Latents by density: `dead`, then one bin a power of ten, upper bound included."""
        counts = {"dead": int((self.density == 0).sum())}
        for low in DENSITY_EDGES[:-1]:
            inside = (self.density > 10.0**low) & (self.density <= 10.0 ** (low + 1))
            counts[f"1e{low}..1e{low + 1}"] = int(inside.sum())
        return counts


@final
class ReconstructionSum:
    """Accumulates Reconstruction over chunks, in float64."""

    def __init__(self, d_in: int, d_sae: int) -> None:
        self._error, self._square, self._tokens = 0.0, 0.0, 0
        self._sum = torch.zeros(d_in, dtype=torch.float64)
        self._fired = torch.zeros(d_sae, dtype=torch.int64)

    def add(self, x: Float[Tensor, "token d_in"], recon: Float[Tensor, "token d_in"], codes: Codes) -> None:
        """Add one chunk: activations, reconstructions, codes."""
        wide = x.double().cpu()
        self._error += float((wide - recon.double().cpu()).square().sum())
        self._square += float(wide.square().sum())
        self._sum += wide.sum(dim=0)
        self._tokens += len(x)
        self._fired += torch.bincount(codes.latents[codes.values > 0].cpu(), minlength=len(self._fired))

    def result(self) -> Reconstruction:
        """Raises TextError before the first token."""
        if self._tokens == 0:
            raise TextError("no activation to judge on: the held-out text is empty")
        mean = self._sum / self._tokens
        variance = self._square - self._tokens * float(mean.square().sum())
        return Reconstruction(
            fvu=self._error / max(variance, 1e-30), l0=float(self._fired.sum()) / self._tokens,
            dead_share=float((self._fired == 0).double().mean()), density=(self._fired.double() / self._tokens).float(),
            mean=mean.float(), tokens=self._tokens)


def reconstruction(dictionary: Dictionary, chunks: Iterable[Float[Tensor, "_ d_in"]]) -> Reconstruction:
    """Reconstruction figures over a stream of activations; memory is one chunk."""
    total = ReconstructionSum(dictionary.d_in, dictionary.d_sae)
    for x in chunks:
        recon, codes = reconstruct(dictionary, x)
        total.add(x, recon, codes)
    return total.result()


class Loss(NamedTuple):
    """Next-token loss under one replacement of the site's activations.

    Attributes:
        ce: mean cross-entropy, nats a token.
        kl: mean KL(untouched ‖ replaced), nats a token, ≥ 0.
    """

    ce: float
    kl: float


class LossTable(NamedTuple):
    """Cross-entropy and KL of the untouched model and of three replacements at the same positions.

    `ce_recovered` = (ablation − recon)/(ablation − base); 1: the reconstruction loses nothing, 0: no better than the
    ablation. Above 1 or below 0 is possible and is reported as it is.
    """

    base: Loss
    recon: Loss
    mean_ablation: Loss
    zero_ablation: Loss
    tokens: int

    def ce_recovered(self, ablation: Loss) -> float:
        """Share of the ablation's loss that the reconstruction wins back; NaN if the ablation costs nothing."""
        cost = ablation.ce - self.base.ce
        return (ablation.ce - self.recon.ce) / cost if cost else float("nan")

    def kl_recovered(self, ablation: Loss) -> float:
        """1 − KL(recon)/KL(ablation); NaN if the ablation changes nothing."""
        return 1 - self.recon.kl / ablation.kl if ablation.kl else float("nan")


Replace = Callable[[Float[Tensor, "token d_in"]], Float[Tensor, "token d_in"]]


def loss_table(subject: Subject, site: Site, dictionary: Dictionary, mean: Float[Tensor, "d_in"],
               batches: Iterable[TokenBatch], norm_ceiling: float) -> LossTable:
    """Cross-entropy and KL on held-out rows with the site's activations left, reconstructed, set to their mean, or zero.

    Only measured positions below `norm_ceiling` are replaced: position 0, special tokens and massive activations stay,
    in every arm alike. The loss is taken at positions whose next token is measured.
    """
    offset = mean.to(subject.device)
    replacements: dict[str, Replace] = {
        "recon": lambda x: reconstruct(dictionary, x.float())[0].to(x.dtype),
        "mean_ablation": lambda x: offset.to(x.dtype).expand_as(x),
        "zero_ablation": torch.zeros_like,
    }
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in ("base", *replacements)}
    tokens = 0
    for batch in batches:
        judged = batch.measured[:, 1:]
        if not judged.any():
            continue
        base = _log_probs(subject, batch)
        sums["base"] += _losses(base, base, batch.tokens, judged)
        for name, replace in replacements.items():
            with splice(subject, site, _Replacement(replace, batch.measured), norm_ceiling):
                arm = _log_probs(subject, batch)
            sums[name] += _losses(base, arm, batch.tokens, judged)
        tokens += int(judged.sum())
    if tokens == 0:
        raise TextError("no token to judge the loss on: the held-out text is empty")
    losses = {name: Loss(*(float(v) for v in total / tokens)) for name, total in sums.items()}
    return LossTable(tokens=tokens, **losses)


@final
class _Replacement:
    """An edit that replaces the activations of measured positions."""

    def __init__(self, replace: Replace, measured: Bool[Tensor, "batch pos"]) -> None:
        self._replace, self._measured = replace, measured

    def __call__(self, x: Float[Tensor, "batch pos d_model"], editable: Bool[Tensor, "batch pos"]) -> EditResult:
        fired = editable & self._measured.to(x.device)
        delta = torch.zeros_like(x)
        delta[fired] = self._replace(x[fired]) - x[fired]
        return EditResult(delta, fired)


def _log_probs(subject: Subject, batch: TokenBatch) -> Float[Tensor, "batch pos vocab"]:
    with torch.inference_mode():
        logits = subject.hf_model(input_ids=batch.tokens.to(subject.device), use_cache=False,
                                  attention_mask=batch.attend.to(subject.device).long()).logits
        return logits[:, :-1].float().log_softmax(dim=-1)


def _losses(base: Float[Tensor, "batch pos vocab"], arm: Float[Tensor, "batch pos vocab"],
            tokens: Int[Tensor, "batch context"], judged: Bool[Tensor, "batch pos"]) -> Float[Tensor, "2"]:
    """(Σ cross-entropy, Σ KL(base ‖ arm)) over the judged positions, in nats."""
    keep = judged.to(arm.device)
    target = tokens[:, 1:].to(arm.device)
    ce = -arm.gather(-1, target[..., None])[..., 0][keep].double().sum()
    if base is arm:
        return torch.stack([ce, torch.zeros_like(ce)]).cpu()
    kl = torch.nn.functional.kl_div(arm[keep], base[keep], log_target=True, reduction="none").sum(-1).double().sum()
    return torch.stack([ce, kl]).cpu()
