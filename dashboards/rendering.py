"""Templates to HTML: everything is escaped, links are built from words, numbers are written one way."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

DATA = Path(__file__).parent / "data"
STATIC, TEMPLATES = DATA / "static", DATA / "templates"


@cache
def environment() -> Environment:
    """The templates, with autoescape on and undefined names refused; compiled once, so that no first page waits for it."""
    made = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"percent": percent, "figure": figure, "value": value_of, "visible": visible,
                     "pair": lambda value, name: (name, value)}
    made.globals |= {"link": link, "link_pairs": link_pairs}
    for name in made.list_templates():
        made.get_template(name)
    return made


def link(path: str, *params: dict[str, str]) -> str:
    """An address of this server: `path` and the words of all `params`."""
    return link_pairs(path, list({name: value for part in params for name, value in part.items()}.items()))


def link_pairs(path: str, words: Sequence[tuple[str, str]]) -> str:
    """An address of this server whose words may come several times."""
    return f"{path}?{urlencode(words)}" if words else path


def percent(share: float) -> str:
    """A share in percent with three significant digits; 0 is exactly none."""
    return f"{share * 100:.3g}\u00a0%" if share else "0\u00a0%"


def figure(value: float) -> str:
    """A number with three significant digits, without an exponent where that is readable."""
    text = f"{value:.3g}"
    return f"{value:,.0f}" if "e+" in text and abs(value) < 1e9 else text.replace("-", "−", 1) if value < 0 else text


def value_of(value: Any) -> str:
    """A JSON value in a few characters; what was not taken is "–"."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return figure(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def visible(text: str, breaks: bool = False) -> Markup:
    """Text of tokens, escaped; with `breaks` the line is broken after every ↵."""
    safe = escape(text)
    return Markup(re.sub("↵", "↵<br>", safe)) if breaks else safe
