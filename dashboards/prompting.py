"""The prompt page: which features fire on a text, per token. The model is opened at the first prompt, not before."""

from __future__ import annotations

import shlex
import threading
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, final

from pydantic import Field

from dashboards.models import Models
from dashboards.passages import Run, level
from dashboards.store import FeatureStore
from dashboards.table import DENSE
from features.searching import FoundFeature, SearchResult, search
from undertow.core.errors import SpecError, UserError
from undertow.core.spec import Spec

MAX_PROMPT = 4_000
WAIT_S = 30.0


class BusyError(UserError):
    """Another prompt holds the model."""


class Ask(Spec):
    """What the prompt page shows; every field is a word of the address.

    Attributes:
        text: the prompt.
        f: the feature whose heat is laid over the text; −1 for none.
        sort: by largest activation, by share of the feature's own maximum, or the rarest feature first.
        dense: "hide" leaves out features that fire on more than 1 % of tokens.
        top: features listed.
    """

    text: str = ""
    f: int = Field(default=-1, ge=-1)
    sort: Literal["value", "share", "rarity"] = "value"
    dense: Literal["show", "hide"] = "show"
    top: int = Field(default=30, ge=1, le=500)

    @classmethod
    def read(cls, params: Mapping[str, str]) -> Ask:
        """From an address. Raises SpecError that names the field, or says that the prompt is too long."""
        given = {name: lines(params[name]) for name in cls.model_fields if params.get(name)}
        if len(given.get("text", "")) > MAX_PROMPT:
            raise SpecError(f"the prompt has {len(given['text']):,} characters; at most {MAX_PROMPT:,} are read",
                            'shorten it, or read it on the command line: undertow features search SAE "..."')
        return cls.checked(given, "the address")

    def params(self, **changes: Any) -> dict[str, str]:
        """Words of the address, without those at their default."""
        moved = {**self.model_dump(), **changes}
        return {name: str(value) for name, value in moved.items() if value != type(self).model_fields[name].default}


class Found(NamedTuple):
    """A feature that fires: its largest activation on the text, as a share of its maximum on the store's text, and more.

    `share` is None for a feature that never fired there.
    """

    latent: int
    value: float
    share: float | None
    text: str
    fired_on: int
    density: float
    label: str


class ReadToken(NamedTuple):
    """A token of the prompt with its strongest features as (latent, activation); none where it is not measured."""

    text: str
    measured: bool
    strongest: tuple[tuple[int, float], ...]


class PromptPage(NamedTuple):
    """What a prompt sets off: `n_found` features fire, `found` are listed; `heat` is the chosen feature over the text."""

    n_tokens: int
    n_found: int
    found: tuple[Found, ...]
    tokens: tuple[ReadToken, ...]
    heat: tuple[Run, ...]
    command: str


@final
class Reader:
    """Reads prompts, one at a time. Raises BusyError if the one before is not done after `wait_s` seconds."""

    def __init__(self, models: Models, wait_s: float = WAIT_S) -> None:
        self._models, self._wait_s = models, wait_s
        self._slot = threading.Lock()

    def read(self, store: FeatureStore, text: str) -> SearchResult:
        """All features that fire on `text`. Raises any UserError of opening the model."""
        if not self._slot.acquire(timeout=self._wait_s):
            raise BusyError("another prompt is being read", "wait a little and load this page again")
        try:
            return search(self._models.open(store), text, store.d_sae)
        finally:
            self._slot.release()


def lines(text: str) -> str:
    """Text of a form as it was typed: a browser sends every line's end as CR LF."""
    return text.replace("\r\n", "\n")


def prompt_page(store: FeatureStore, labels: Mapping[int, str], ask: Ask, result: SearchResult) -> PromptPage:
    """The prompt page, from what the search found."""
    found = [_found(store, labels, feature) for feature in result.features]
    if ask.dense == "hide":
        found = [feature for feature in found if feature.density <= DENSE]
    order: dict[str, Callable[[Found], float]] = {
        "value": lambda feature: -feature.value, "rarity": lambda feature: feature.density,
        "share": lambda feature: -(float("inf") if feature.share is None else feature.share)}
    found.sort(key=order[ask.sort])
    shown = frozenset(feature.latent for feature in found)
    tokens = tuple(ReadToken(token.text, token.measured, tuple((firing.latent, firing.value) for firing in token.firings
                                                               if firing.latent in shown)[:5]) for token in result.tokens)
    command = shlex.join(["undertow", "features", "search", store.record["spec"]["sae"], ask.text, "--top", str(ask.top)])
    return PromptPage(result.n_tokens, len(found), tuple(found[:ask.top]), tokens, _heat(store, ask.f, result), command)


def _found(store: FeatureStore, labels: Mapping[int, str], feature: FoundFeature) -> Found:
    latent, maximum = feature.latent, float(store.columns["maximum"][feature.latent])
    return Found(latent, feature.value, feature.value / maximum if maximum > 0 else None, feature.text, feature.fired_on,
                 float(store.density[latent]), labels.get(latent, ""))


def _heat(store: FeatureStore, latent: int, result: SearchResult) -> tuple[Run, ...]:
    """The text with the activations of one feature; a token without text of its own lends its heat to the one before."""
    if latent < 0:
        return ()
    maximum = float(store.columns["maximum"][store.known(latent)])
    values = [max((firing.value for firing in token.firings if firing.latent == latent), default=0.0)
              for token in result.tokens]
    runs: list[Run] = []
    for token, value in zip(result.tokens, values, strict=True):
        if token.text or not runs:
            runs.append(Run(token.text, level(value, maximum), value, False))
        elif value > runs[-1].value:
            runs[-1] = Run(runs[-1].text, level(value, maximum), value, False)
    peak = max(range(len(runs)), key=lambda i: runs[i].value, default=-1)
    return tuple(run._replace(peak=i == peak and run.value > 0) for i, run in enumerate(runs))
