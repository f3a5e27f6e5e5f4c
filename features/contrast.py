"""The scan: which latents differ at the decision site between the two situations of a pair, family-wise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64
from numpy import ndarray

from features.codes import CHUNK, dictionary_digest
from features.concepts import Pair, refuse_unequal_sites
from features.deciding import Progress, read_last, silent
from sae.dictionary import Dictionary
from undertow.core.errors import DictionaryError, NumericsError, TextError
from undertow.core.record import run_record
from undertow.core.seeds import generator
from undertow.core.spec import digest_json
from undertow.core.storage import create_artifact, open_artifact, write_json
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject

KIND = "feature-table"
FLIPS = 1_999
ALPHA = 0.01
_FLIPS_AT_ONCE = 128
_LEAST_VARIANCE = 1e-6  # of the mean square, so that families which agree to the last bit do not give infinity


@final
class Origin(NamedTuple):
    """What a table was measured with: digests of SAE, subject and pairs, the site's name, and how many pairs and families."""

    sae: str
    subject: str
    site: str
    pairs: str
    n_pairs: int
    n_families: int
    seed: int


@final
@dataclass(frozen=True)
class FeatureTable:
    """One row a latent; every value is at the decision site, in units of the latent's own activation unless said otherwise.

    Attributes:
        origin: what it was measured with.
        mean_positive: mean over families in the positive situations; mean_negative: in the negative ones.
        rate_positive: share of pairs in which the latent fires in the positive situation, in [0, 1]; rate_negative: negative.
        effect: mean over families of the family's mean difference, positive − negative.
        t: effect / its standard error over families, no unit.
        p: family-wise p of |t| over all latents of the table, in (0, 1].
    """

    origin: Origin
    mean_positive: Float32[ndarray, "d_sae"]
    mean_negative: Float32[ndarray, "d_sae"]
    rate_positive: Float32[ndarray, "d_sae"]
    rate_negative: Float32[ndarray, "d_sae"]
    effect: Float32[ndarray, "d_sae"]
    t: Float32[ndarray, "d_sae"]
    p: Float64[ndarray, "d_sae"]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.t)

    def significant(self, alpha: float = ALPHA) -> list[int]:
        """Latents with p ≤ alpha, the largest |t| first."""
        return [int(i) for i in np.argsort(-np.abs(self.t), kind="stable") if self.p[i] <= alpha]

    def raised(self, alpha: float = ALPHA) -> list[int]:
        """Those of them that are stronger in the positive situation."""
        return [i for i in self.significant(alpha) if self.effect[i] > 0]

    def opposed(self, alpha: float = ALPHA) -> list[int]:
        """Those of them that are stronger in the negative situation: they show where a state is missing."""
        return [i for i in self.significant(alpha) if self.effect[i] < 0]

    def row(self, latent: int) -> dict[str, float]:
        """All figures of one latent."""
        return {name: float(getattr(self, name)[latent]) for name in _COLUMNS}

    def save(self, path: Path, spec: Mapping[str, Any] | None = None) -> None:
        """Write an artifact of kind "feature-table"; `spec` says what was asked. Raises ArtifactError if `path` is taken."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        record = run_record(dict(spec or {}), self.origin.seed)
        with create_artifact(path, KIND, record) as folder:
            write_json(folder / "origin.json", self.origin._asdict())
            pq.write_table(pa.table({name: getattr(self, name) for name in _COLUMNS}), folder / "table.parquet")


_COLUMNS = tuple(field.name for field in fields(FeatureTable) if field.name != "origin")


def load_table(path: Path) -> FeatureTable:
    """Read what `FeatureTable.save` wrote. Raises ArtifactError if it is missing, incomplete or changed."""
    import json

    import pyarrow.parquet as pq

    open_artifact(path, KIND)
    table = pq.read_table(path / "table.parquet")
    origin = Origin(**json.loads((path / "origin.json").read_text(encoding="utf-8")))
    return FeatureTable(origin, *(table.column(name).to_numpy() for name in _COLUMNS))


@final
class Families(NamedTuple):
    """Which family each pair belongs to.

    Attributes:
        members: number of the family of every pair.
        n: number of families.
    """

    members: Int64[ndarray, "pair"]
    n: int

    @classmethod
    def of(cls, pairs: Sequence[Pair]) -> Families:
        """Families of some pairs, numbered as they come. Raises TextError if there are fewer than two."""
        numbers: dict[str, int] = {}
        members = np.array([numbers.setdefault(pair.family, len(numbers)) for pair in pairs], dtype=np.int64)
        if len(numbers) < 2:
            raise TextError(f"{len(pairs)} pairs of {len(numbers)} families; the family is the unit of inference, and at least "
                            "2 are needed", "ask for more pairs, or write more families")
        return cls(members, len(numbers))

    def means(self, values: Float64[ndarray, "pair *k"]) -> Float64[ndarray, "family *k"]:
        """Mean over the pairs of every family."""
        sums = np.zeros((self.n, *values.shape[1:]))
        np.add.at(sums, self.members, values)
        return sums / np.bincount(self.members, minlength=self.n).reshape(-1, *[1] * (values.ndim - 1))

    def mean(self, values: Float64[ndarray, "pair *k"]) -> Float64[ndarray, "*k"]:
        """Mean over families of the family's mean."""
        return np.asarray(self.means(values).mean(axis=0))


def scan(subject: Subject, dictionary: Dictionary, site: Site, pairs: Sequence[Pair], seed: int,
         progress: Progress = silent) -> FeatureTable:
    """Contrast every latent between the situations of `pairs`.

    Raises:
        TextError: fewer than two families, or a pair whose prompts end in different tokens.
        DictionaryError: the dictionary reads another width.
        NumericsError: a code is NaN or infinite.
    """
    if dictionary.d_in != subject.d_model:
        raise DictionaryError(f"the SAE reads activations of width {dictionary.d_in}; {subject.name} has {subject.d_model}",
                              "give the subject that it was trained on with --model")
    families = Families.of(pairs)
    refuse_unequal_sites(subject, pairs)
    prompts = [subject.encode(side.prompt) for pair in pairs for side in (pair.positive, pair.negative)]
    codes = encode(dictionary, read_last(subject, site, prompts, progress))
    origin = Origin(dictionary_digest(dictionary), subject.digest, site.name, pairs_digest(pairs), len(pairs), families.n, seed)
    return contrast(codes[0::2], codes[1::2], families, origin)


def encode(dictionary: Dictionary, x: torch.Tensor) -> Float32[ndarray, "n d_sae"]:
    """Dense codes of some activations. Raises NumericsError if one is not finite."""
    with torch.inference_mode():
        codes = torch.cat([dictionary.encode(part).float().cpu() for part in x.split(CHUNK)]).numpy()
    if not np.isfinite(codes).all():
        raise NumericsError(f"the code of prompt {int(np.argwhere(~np.isfinite(codes))[0, 0])} is NaN or infinite",
                            "the SAE's weights may be damaged")
    return codes


def pairs_digest(pairs: Sequence[Pair]) -> str:
    """16 hex characters over all texts of the pairs, in order."""
    return digest_json([[pair.family, pair.split, *([side.prompt, dict(side.options), side.costly, side.keep]
                                                    for side in (pair.positive, pair.negative))] for pair in pairs])


def contrast(positive: Float32[ndarray, "pair d_sae"], negative: Float32[ndarray, "pair d_sae"], families: Families,
             origin: Origin) -> FeatureTable:
    """The table of given codes; see FeatureTable."""
    differences = families.means((positive - negative).astype(np.float64)).astype(np.float32)
    t, p = sign_flip_max(differences, origin.seed)
    means = [families.mean(side.astype(np.float64)).astype(np.float32) for side in (positive, negative)]
    rates = [(side > 0).mean(axis=0).astype(np.float32) for side in (positive, negative)]
    return FeatureTable(origin, means[0], means[1], rates[0], rates[1], differences.mean(axis=0), t, p)


@final
class FlipTest(NamedTuple):
    """t of every column, and its family-wise p."""

    t: Float32[ndarray, "column"]
    p: Float64[ndarray, "column"]


def sign_flip_max(differences: Float32[ndarray, "family column"], seed: int, flips: int = FLIPS) -> FlipTest:
    """Test that the mean of each column is 0, over families, with the maximum over columns as the statistic.

    t = mean / sqrt(variance / n). Under the null each family's sign is arbitrary, and one flip turns all columns of a family,
    so the columns' dependence is kept: p = (1 + #{flips: max over columns |t| ≥ |t_column|}) / (1 + flips), two-sided, which
    holds the chance of any false finding at p (Westfall and Young 1993; Nichols and Holmes 2002). Least value 1/(1 + flips).
    """
    values = torch.from_numpy(np.ascontiguousarray(differences))
    n = len(values)
    square = values.square().sum(dim=0)

    def t_of(sums: torch.Tensor) -> torch.Tensor:
        means = sums / n
        variance = ((square - n * means.square()) / (n - 1)).clamp_min(_LEAST_VARIANCE * square / n)
        return torch.where(square > 0, means * n**0.5 / variance.sqrt().clamp_min(1e-30), 0.0)

    t = t_of(values.sum(dim=0))
    rng = generator(seed, "sign_flip_max")
    highest = []
    for start in range(0, flips, _FLIPS_AT_ONCE):
        signs = torch.randint(0, 2, (min(_FLIPS_AT_ONCE, flips - start), n), generator=rng).float() * 2 - 1
        highest.append(t_of(signs @ values).abs().amax(dim=1))
    null = np.sort(torch.cat(highest).numpy())
    reached = flips - np.searchsorted(null, np.abs(t.numpy()) * (1 - 1e-5))
    return FlipTest(t.numpy(), (1 + reached) / (1.0 + flips))
