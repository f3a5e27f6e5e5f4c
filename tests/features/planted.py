"""A planted feature: a tiny subject, pairs that differ in one word, and an SAE with one latent along their difference.

The other latents read and write across that direction, so on these pairs their mean difference is 0 to the last bits, and the
right answer of every search is the planted latent.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import NamedTuple

import torch

from features.causal import Baseline, read_baseline
from features.concepts import Pair, Situation
from features.contrast import FeatureTable, scan
from features.deciding import Primed, d_under, read_last, tokenised
from sae.dictionary import LinearDictionary, Provenance, ReLU
from tests import tiny_keeper
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject

LATENT, D_SAE = 7, 24
GIVE = (" gave Ana the last can of oil.", " carried the last can of oil out to Ana.")
KEEP = (" kept the last can of oil on the shelf.", " locked the last can of oil away.", " left it.")


class Planted(NamedTuple):
    """All of it."""

    subject: Subject
    site: Site
    dictionary: LinearDictionary
    pairs: list[Pair]
    table: FeatureTable
    baseline: Baseline


@cache
def subject() -> Subject:
    return tiny_keeper.open_random(Path(mkdtemp()) / "subject")


def pairs(word: str, other: str, n: int = 10, swap: bool = False) -> list[Pair]:
    """`swap` exchanges which act is the costly one."""
    costly, keep = ("keep", "give") if swap else ("give", "keep")
    places = ["mill", "inn", "ferry", "hut", "light", "ford", "quay", "barn", "farm", "lock", "moor", "dyke"]
    return [Pair(place, "discovery", *(Situation(f"At the {place} it was {w} all night. The keeper",
                                                 {"give": GIVE, "keep": KEEP}, costly, keep) for w in (word, other)))
            for place in places[:n]]


def plant(site: Site, told: list[Pair]) -> LinearDictionary:
    """An SAE with LATENT along the mean difference of `told`; everything else is across it."""
    model = subject()
    x = read_last(model, site, [model.encode(side.prompt) for pair in told for side in (pair.positive, pair.negative)])
    unit = torch.nn.functional.normalize((x[0::2] - x[1::2]).mean(dim=0), dim=0)
    rows = torch.randn(D_SAE, len(unit), generator=torch.Generator().manual_seed(1))
    rows = torch.nn.functional.normalize(rows - (rows @ unit)[:, None] * unit)
    rows[LATENT] = unit
    bias = torch.full((D_SAE,), 50.0)  # always on, hence linear
    bias[LATENT] = -float((x[1::2] @ unit).min()) + 0.1
    return LinearDictionary(rows.T.contiguous(), bias, rows, torch.zeros(len(unit)), ReLU(),
                            Provenance(model.source, site.name, 32, True))


def raises_d(site: Site, told: list[Pair]) -> bool:
    """Whether the mean difference raises D of the first pair; a random model has no side."""
    model = subject()
    x = read_last(model, site, [model.encode(side.prompt) for pair in told for side in (pair.positive, pair.negative)])
    v, first = (x[0::2] - x[1::2]).mean(dim=0), tokenised(model, told[0].negative)
    with torch.no_grad():
        d = d_under(Primed(model, first.prompt), first, site, torch.stack([0 * v, v]))
    return bool(d[1] > d[0])


@cache
def planted(layer: int = 0) -> Planted:
    """All of it, with the acts named so that the planted direction raises D."""
    site = subject().site(f"blocks.{layer}.hook_resid_post")
    told = pairs("warm", "cold", swap=not raises_d(site, pairs("warm", "cold")))
    dictionary = plant(site, told)
    table = scan(subject(), dictionary, site, told, seed=0)
    return Planted(subject(), site, dictionary, told, table,
                   read_baseline(subject(), dictionary, site, told, table.mean_positive))
