"""Lexicons: forms of a word in tiers and languages, from a packaged or a user's YAML file."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, final

from pydantic import Field, StrictStr

from undertow.core.errors import SpecError, near_matches
from undertow.core.spec import Spec
from undertow.lexicon.folding import extends
from undertow.lexicon.matching import Form, FormTrie, Match, make_form, matches

TIERS = ("T0", "T1", "T2")
DATA = Path(__file__).parent / "data"
Words = dict[Annotated[str, Field(pattern=r"^[a-z]{2,3}$")], list[StrictStr]]


@final
class LexiconSpec(Spec):
    """The content of a lexicon file.

    Attributes:
        name: what the lexicon is called.
        tiers: forms by tier and language: T0 the word itself, T1 names near it, T2 words that are only watched. A form is one
            word or a phrase; `*` before or after it lets it stand inside a longer word.
        innocent: longer words and phrases, by language, in which a form may stand.
    """

    name: str = Field(min_length=1)
    tiers: dict[str, Words]
    innocent: Words = Field(default_factory=dict)

    def written(self) -> Iterator[tuple[str, str, Form]]:
        """Every form and exclusion: where it stands, how it is written, and the form."""
        for tier, words in (*self.tiers.items(), ("innocent", self.innocent)):
            for language, items in words.items():
                for written in items:
                    yield f"{tier}.{language}", written, make_form(written, tier, language)


def _check(spec: LexiconSpec) -> str:
    """What is wrong with the words of `spec`, with place and value; empty if nothing."""
    for tier in spec.tiers:
        if tier not in TIERS:
            return f"unknown tier {tier!r}; tiers are {', '.join(TIERS)}"
    if not any(words for words in spec.tiers.get("T0", {}).values()):
        return "tier T0 has no form, so there is nothing to look for"
    seen: set[tuple[str, str]] = set()
    tier_of: dict[str, str] = {}
    for place, written, form in spec.written():
        if wrong := _wrong_form(written, form):
            return f"{place}: {wrong}"
        key = (place, unicodedata.normalize("NFC", written.strip()).casefold())
        if key in seen:
            return f"{place}: {written!r} is a duplicate"
        seen.add(key)
        if form.tier != "innocent" and tier_of.setdefault(form.folded, form.tier) != form.tier:
            return f"{place}: {written!r} also stands in {tier_of[form.folded]}"
    for place, written, form in spec.written():
        if form.tier == "innocent" and form.folded in tier_of:
            return f"{place}: the exclusion {written!r} is itself a form, which would then never be found"
        if form.tier == "innocent" and not any(other in form.folded for other in tier_of):
            return f"{place}: the exclusion {written!r} contains no form, so it excludes nothing"
    return ""


def _wrong_form(written: str, form: Form) -> str:
    if not form.text:
        return f"{written!r} is an empty form"
    if not form.folded:
        return f"{written!r} holds only invisible characters; nothing is left of it to look for"
    if "*" in form.folded:
        return f"{written!r} has a * that is not at an edge; it may only begin or end a form"
    if extends(form.folded[0]):
        return f"{written!r} begins in the middle of a letter"
    return ""


@final
@dataclass(frozen=True)
class Lexicon:
    """Forms of a word, ready to be looked for. Made by `Lexicon.load`.

    Attributes:
        name: what it is called.
        entries: forms and innocent exclusions, as `make_form` reads them.
        digest: 16 hex digits of the content it was loaded from (and of the narrowing by `only`).
    """

    name: str
    entries: tuple[Form, ...] = field(repr=False)
    digest: str

    @classmethod
    def load(cls, name_or_path: str | Path) -> Lexicon:
        """Open a packaged lexicon by name ("love") or a YAML file by path.

        Raises SpecError that names the file, the place in it and the value.
        """
        path = Path(name_or_path)
        if path.suffix not in (".yaml", ".yml"):
            known = packaged_names()
            if str(name_or_path) not in known:
                near = near_matches(str(name_or_path), known)
                raise SpecError(f"no lexicon is called {str(name_or_path)!r}",
                                near or f"packaged: {', '.join(known)}; or give the path of a .yaml file")
            path = DATA / f"{name_or_path}.yaml"
        return cls.from_spec(LexiconSpec.from_yaml(path), str(path))

    @classmethod
    def from_spec(cls, spec: LexiconSpec, origin: str = "") -> Lexicon:
        """A lexicon from a spec; `origin` (a file) is named where a form is refused, by SpecError."""
        if wrong := _check(spec):
            raise SpecError(f"lexicon {spec.name!r} refused{f' ({origin})' if origin else ''}: {wrong}")
        return cls(spec.name, tuple(form for _, _, form in spec.written()), spec.digest())

    def forms(self, tier: str) -> tuple[Form, ...]:
        """Forms of one tier, or the exclusions for "innocent". Raises SpecError for another name."""
        if tier not in (*TIERS, "innocent"):
            raise SpecError(f"unknown tier {tier!r}", f"tiers are {', '.join(TIERS)}, and innocent")
        return tuple(form for form in self.entries if form.tier == tier)

    def only(self, tiers: Sequence[str] = TIERS, languages: Sequence[str] | None = None) -> Lexicon:
        """The same lexicon with some tiers and languages; all exclusions stay. Raises SpecError if nothing is left."""
        for tier in tiers:
            self.forms(tier)
        kept = tuple(f for f in self.entries if f.tier == "innocent"
                     or (f.tier in tiers and (languages is None or f.language in languages)))
        if all(form.tier == "innocent" for form in kept):
            known = sorted({form.language for form in self.entries})
            raise SpecError(f"{self.name} has no form in tiers {list(tiers)} and languages {languages}",
                            f"its languages: {', '.join(known)}")
        suffix = "" if kept == self.entries else "/" + ",".join((*tiers, *(languages or ("all",))))
        return Lexicon(self.name, kept, self.digest + suffix)

    def find(self, text: str) -> list[Match]:
        """Where forms of any tier stand in `text`, by start; offsets are those of `text`. Rules: `undertow.lexicon.matching`.

        Of forms of one tier that overlap the leftmost and then the longest is reported; a form of another tier is reported
        beside it, so that T0 is never hidden.
        """
        return matches(text, self._tries[0], self._tries[1])

    @cached_property
    def _tries(self) -> tuple[FormTrie, FormTrie]:
        return (FormTrie(form for form in self.entries if form.tier != "innocent"), FormTrie(self.forms("innocent")))


def packaged_names() -> list[str]:
    """Names of the packaged lexicons."""
    return sorted(path.stem for path in DATA.glob("*.yaml"))
