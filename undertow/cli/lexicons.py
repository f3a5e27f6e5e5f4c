"""Lexicons on the command line: their options, and opening one narrowed to tiers and languages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from undertow.core.errors import SpecError, near_matches

if TYPE_CHECKING:
    from undertow.lexicon import Lexicon

LexiconOption = Annotated[str, typer.Option("--lexicon", help="A packaged lexicon (love), or a YAML file.")]
LanguageOption = Annotated[list[str] | None, typer.Option(
    "--language", help="Only forms of this language, e.g. en; repeatable. All if absent.")]
TierOption = Annotated[list[str] | None, typer.Option(
    "--tier", help="T0 the word, T1 names near it, T2 words that are only watched; repeatable.")]


def open_lexicon(name: str, tiers: Sequence[str], languages: Sequence[str] | None) -> Lexicon:
    """A lexicon, narrowed. Raises SpecError for an unknown name, tier or language, and where nothing is left."""
    from undertow.lexicon import Lexicon

    whole = Lexicon.load(name)
    spoken = sorted({form.language for form in whole.entries if form.tier != "innocent"})
    for language in languages or ():
        if language not in spoken:
            raise SpecError(f"lexicon {whole.name!r} has no language {language!r}",
                            near_matches(language, spoken) or f"its languages: {', '.join(spoken)}")
    return whole.only(tiers, languages or None)


def forms_of(lexicon: Lexicon, tiers: Sequence[str]) -> str:
    """How many forms of which tiers and languages, in words."""
    forms = [form for tier in tiers for form in lexicon.forms(tier)]
    spoken = sorted({form.language for form in forms})
    return f"{len(forms)} forms of {lexicon.name!r} ({', '.join(tiers)}; {', '.join(spoken)})"
