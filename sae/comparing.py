"""Several dictionaries side by side: figures on the same held-out tokens, and how much of each lies in the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionary import Dictionary
from sae.grid import GRID_FILE, INDEX
from undertow.core.errors import ArtifactError, DictionaryError
from undertow.core.seeds import generator

ROWS = 1024  # directions compared at a time
SAME = 0.7  # cosine from which two latents count as the same direction
FIGURES = ("fvu", "l0", "dead_share", "ce_recovered", "ce_base", "ce_recon", "ce_mean_ablation", "kl_recon", "tokens",
           "ce_tokens")


class Overlap(NamedTuple):
    """How much of one dictionary's decoder lies in another's.

    Attributes:
        cosine: mean over latents of A of the largest cosine with a latent of B; in [−1, 1], 1 for A in itself.
        matched: share of A's latents whose largest cosine is at least 0.7; in [0, 1].
        chance: `cosine` with B's directions replaced by as many random ones: what width alone gives.
    """

    cosine: float
    matched: float
    chance: float


class Entry(NamedTuple):
    """One dictionary of a comparison: a short name, the dictionary, and its figures by name."""

    name: str
    dictionary: Dictionary
    figures: dict[str, Any]


def expand(sources: Sequence[str]) -> list[str]:
    """The SAEs that are meant: a grid's folder stands for all its runs. Raises ArtifactError for an unfinished grid."""
    found: list[str] = []
    for source in sources:
        if not (Path(source) / GRID_FILE).is_file():
            found.append(source)
            continue
        if not (Path(source) / INDEX).is_file():
            raise ArtifactError(f"the grid {source} is not finished", f"go on with it: undertow sae resume {source}")
        index = json.loads((Path(source) / INDEX).read_text(encoding="utf-8"))
        found += [str(Path(source) / row["name"]) for row in index["runs"]]
    return found


def short_names(sources: Sequence[str]) -> list[str]:
    """The last part of each path where these differ, else the whole path; a name given twice is numbered."""
    last = [source.rstrip("/").rsplit("/", 1)[-1] for source in sources]
    names = last if len(set(last)) == len(last) else list(sources)
    return [f"{name} ({names[:i].count(name) + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


def recorded(source: str) -> dict[str, Any]:
    """The figures of an SAE's own card. Raises DictionaryError if it has none."""
    from sae.formats import PACKAGED

    for folder in (Path(source), PACKAGED / source):
        if (folder / "evaluation.json").is_file():
            return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    raise DictionaryError(f"{source} has no figures of its own", "leave --recorded away, and it will be judged")


def unit_directions(dictionary: Dictionary) -> Float[Tensor, "d_sae d_in"]:
    """Directions of all latents at norm 1 (zero rows stay zero)."""
    rows = dictionary.directions(torch.arange(dictionary.d_sae)).float().cpu()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)


def overlap(a: Float[Tensor, "n d_in"], b: Float[Tensor, "m d_in"]) -> Overlap:
    """How much of the unit directions `a` lies among `b`; not symmetric."""
    random = torch.randn(b.shape, generator=generator(0, "overlap"))
    best = _best_cosine(a, b)
    return Overlap(float(best.mean()), float((best >= SAME).float().mean()),
                   float(_best_cosine(a, random / random.norm(dim=1, keepdim=True)).mean()))


def _best_cosine(a: Float[Tensor, "n d_in"], b: Float[Tensor, "m d_in"]) -> Float[Tensor, "n"]:
    return torch.cat([(rows @ b.T).max(dim=1).values for rows in a.split(ROWS)])


def compare(entries: Sequence[Entry]) -> dict[str, Any]:
    """The comparison as JSON values: `saes` (one line each) and `overlap` (rows: of which SAE; columns: found in which).

    Where two SAEs read activations of different widths their overlap is absent (None).
    """
    rows = [unit_directions(entry.dictionary) for entry in entries]
    table = [[overlap(a, b)._asdict() if a.shape[1] == b.shape[1] else None for b in rows] for a in rows]
    lines = [{"name": entry.name, "architecture": entry.dictionary.architecture, "site": entry.dictionary.provenance.hook_name,
              "width": entry.dictionary.d_sae, **{key: entry.figures[key] for key in FIGURES if key in entry.figures}}
             for entry in entries]
    return {"saes": lines, "overlap": table}
