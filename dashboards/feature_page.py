"""Everything that the page of one feature shows, as one value."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from dashboards.evidence import FAILS, MEASURES, NAMING, Evidence
from dashboards.layout import LOGIT_BINS, N_INTERVALS
from dashboards.notes import Entry, Notes
from dashboards.passages import Passage, Width, passages
from dashboards.store import FeatureStore
from features.cards import Bar, feature_id
from features.examples import BIN_EDGES
from undertow.core.spec import Spec


class Display(Spec):
    """How contexts are shown; every field is a word of the address.

    Attributes:
        width: short (5 tokens each way), passage (all whose activation is kept), row (the whole token row).
        breaks: "on" breaks the line at every ↵.
        values: "on" writes the activation behind every active token.
    """

    width: Width = "passage"
    breaks: Literal["off", "on"] = "off"
    values: Literal["off", "on"] = "off"

    @classmethod
    def read(cls, params: Any) -> Display:
        """From an address. Raises SpecError that names the field."""
        return cls.checked({name: params[name] for name in cls.model_fields if params.get(name)}, "the address")

    def params(self, **changes: str) -> dict[str, str]:
        """Words of the address, without those at their default."""
        moved = {**self.model_dump(), **changes}
        return {name: value for name, value in moved.items() if value != type(self).model_fields[name].default}


class LogitToken(NamedTuple):
    """A vocabulary entry and the feature's direct effect on its logit."""

    text: str
    token: int
    effect: float


class Neighbour(NamedTuple):
    """Another feature, the cosine of the two directions, and the token it peaks on."""

    latent: int
    cosine: float
    peak: str


class Group(NamedTuple):
    """Contexts drawn in one way, and what that way is in words."""

    title: str
    sample: str
    passages: tuple[Passage, ...]


class Measure(NamedTuple):
    """A figure of a search; `fails` says that a naming screen ties the feature to the word."""

    name: str
    meaning: str
    value: float
    fails: bool


class Finding(NamedTuple):
    """What one search found of the feature; `rank` is its place among the chosen, from 1, None if it was not chosen."""

    key: str
    title: str
    rank: int | None
    n_chosen: int
    measures: tuple[Measure, ...]


class FeaturePage(NamedTuple):
    """One feature.

    Attributes:
        id: name of the feature, e.g. "smollm2/12:1475".
        latent: its index.
        figures: figures by name; see layout.COLUMNS, and density (share of tokens, in [0, 1]).
        peak: the token it peaks on.
        histogram: firings by activation, from the first to the last occupied bin.
        groups: contexts.
        promoted, suppressed: tokens whose logit its direction raises and lowers most.
        logits: number of tokens by effect on their logit.
        neighbours: features with the nearest directions.
        labels, notes: newest first.
        findings: what searches found of it; those that say nothing of it are left out.
        command: what prints the same on the command line.
    """

    id: str
    latent: int
    figures: dict[str, float]
    peak: str
    histogram: tuple[Bar, ...]
    groups: tuple[Group, ...]
    promoted: tuple[LogitToken, ...]
    suppressed: tuple[LogitToken, ...]
    logits: tuple[Bar, ...]
    neighbours: tuple[Neighbour, ...]
    labels: tuple[Entry, ...]
    notes: tuple[Entry, ...]
    findings: tuple[Finding, ...]
    command: str


def feature_page(store: FeatureStore, latent: int, notes: Notes | None, display: Display, searches: Sequence[Evidence] = ()
                 ) -> FeaturePage:
    """The page of one feature; without `notes` it has no labels. Raises DictionaryError if there is none of that number."""
    detail = store.details[store.known(latent)]
    figures = {name: values[latent].item() for name, values in store.columns.items() if not name.endswith("_token")}
    return FeaturePage(
        id=feature_id(store.name, latent), latent=latent, figures={**figures, "density": float(store.density[latent])},
        peak=store.token(int(store.columns["peak_token"][latent])), histogram=_histogram(detail["histogram"]),
        groups=_groups(store, latent, detail, display.width),
        promoted=_tokens(store, detail["promoted"]), suppressed=_tokens(store, detail["suppressed"]),
        logits=_logits(detail), neighbours=_neighbours(store, detail["neighbours"]),
        labels=notes.labels(store.dictionary, latent) if notes else (),
        notes=notes.notes(store.dictionary, latent) if notes else (),
        findings=tuple(finding for search in searches if (finding := _finding(search, latent)) is not None),
        command=show_command(store, latent))


def _finding(search: Evidence, latent: int) -> Finding | None:
    measured, rank = search.of(latent), search.rank(latent)
    if not measured and rank is None:
        return None
    return Finding(search.key, search.title, rank, len(search.chosen), tuple(
        Measure(name, MEASURES[name], value, name in (*NAMING, "naming_p") and value < FAILS)
        for name, value in measured.items()))


def show_command(store: FeatureStore, latent: int) -> str:
    """The command that prints this feature; of a store on the training text, which `features show` does not read, "". """
    spec = store.record["spec"]
    if spec["split"] != "held_out":
        return ""
    return shlex.join(["undertow", "features", "show", spec["sae"], str(latent), *spec["options"],
                       "--tokens", str(spec["tokens"]), "--seed", str(store.record["seed"])])


def to_json(page: FeaturePage) -> dict[str, Any]:
    """The page as plain JSON values."""
    return _plain(page)


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        fields = getattr(value, "_fields", None)
        return [_plain(item) for item in value] if fields is None else {
            name: _plain(item) for name, item in zip(fields, value, strict=True)}
    return value


def _histogram(counts: Any) -> tuple[Bar, ...]:
    occupied = counts.nonzero()[0]
    if not len(occupied):
        return ()
    return tuple(Bar(float(BIN_EDGES[i]), float(BIN_EDGES[i + 1]), int(counts[i]))
                 for i in range(occupied[0], occupied[-1] + 1))


def _logits(detail: Any) -> tuple[Bar, ...]:
    low, high = float(detail["logit_low"]), float(detail["logit_high"])
    step = (high - low) / LOGIT_BINS
    return tuple(Bar(low + i * step, low + (i + 1) * step, int(n)) for i, n in enumerate(detail["logits"]))


def _groups(store: FeatureStore, latent: int, detail: Any, width: Width) -> tuple[Group, ...]:
    count, seed = int(store.columns["count"][latent]), store.record["seed"]
    if not count:
        return ()
    groups = [Group("Strongest", f"the strongest of {count:,} firings, one a token row",
                    passages(store, latent, detail["top"], width))]
    for number in reversed(range(N_INTERVALS)):
        inside = int(detail["intervals"][number])
        low, high = 100 * number // N_INTERVALS, 100 * (number + 1) // N_INTERVALS
        shown = passages(store, latent, detail["strata"][number], width)
        if inside:
            groups.append(Group(f"{low} to {high} % of the maximum",
                                f"{inside:,} firings ({inside / count:.1%}); drawn at random from them, seed {seed}", shown))
    groups.append(Group("Any firing", f"drawn at random from all {count:,} firings, seed {seed}",
                        passages(store, latent, detail["uniform"], width)))
    return tuple(groups)


def _tokens(store: FeatureStore, pairs: Any) -> tuple[LogitToken, ...]:
    return tuple(LogitToken(store.token(int(pair["id"])), int(pair["id"]), float(pair["value"]))
                 for pair in pairs if pair["id"] >= 0)


def _neighbours(store: FeatureStore, pairs: Any) -> tuple[Neighbour, ...]:
    return tuple(Neighbour(int(pair["id"]), float(pair["value"]), store.token(int(store.columns["peak_token"][pair["id"]])))
                 for pair in pairs if pair["id"] >= 0)
