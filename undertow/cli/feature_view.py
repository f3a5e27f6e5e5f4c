"""Feature cards and search results for a terminal. All text goes through `rich.text.Text`: no markup counts."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from features.cards import Bar, Context, FeatureCard, Part, WordEffect
    from features.searching import ReadToken, SearchResult

BLOCKS = "▁▂▃▄▅▆▇█"
PEAK, OTHER = "«»", "‹›"  # the second cue beside colour: the token that counts, and others on which the latent fires
_FILE_WIDTH = 120


def card_view(card: FeatureCard, n_contexts: int) -> RenderableType:
    """A card with at most `n_contexts` contexts of each kind."""
    head = Text.assemble((card.id, "bold"), f"   {_firing_line(card)}")
    parts: list[RenderableType] = [head, Text(f"measured on {card.measured_on}", style="dim")]
    if card.histogram:
        parts += [_histogram(card.histogram), Text()]
        parts += [Text("strongest, one a passage", style="bold"), _contexts(card.top[:n_contexts]), Text(),
                  Text("drawn at random from all firings", style="bold"), _contexts(card.uniform[:n_contexts]), Text()]
    parts.append(Text("written straight into the logits, per unit of activation, up to the final norm's scale",
                      style="bold"))
    parts += [_words("promotes", card.promoted), _words("suppresses", card.suppressed)]
    return Group(*parts)


def cards_text(cards: Iterable[FeatureCard], n_contexts: int) -> str:
    """The cards as plain text, without colour."""
    out = io.StringIO()
    console = Console(file=out, width=_FILE_WIDTH, color_system=None, highlight=False)
    for card in cards:
        console.print(card_view(card, n_contexts))
        console.print()
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines()) + "\n"


def _firing_line(card: FeatureCard) -> str:
    if not card.count:
        return f"never fired on {card.n_tokens:,} tokens"
    return (f"fires on {card.count:,} of {card.n_tokens:,} tokens ({card.density:.3%}); "
            f"activation {card.mean:.3g} on average where it fires, {card.maximum:.3g} at most")


def _histogram(bars: tuple[Bar, ...]) -> Text:
    most = max(bar.firings for bar in bars)
    line = "".join(BLOCKS[-(-bar.firings * len(BLOCKS) // most) - 1] if bar.firings else " " for bar in bars)
    return Text.assemble("activation ", f"{bars[0].low:.3g} ", (line, "cyan"), f" {bars[-1].high:.3g}",
                         (f"   (log scale, half an octave a bar; the tallest holds {most:,})", "dim"))


def _contexts(contexts: tuple[Context, ...]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for context in contexts:
        text = Text()
        for part in context.before:
            _append(text, part, OTHER, "yellow")
        _append(text, context.token, PEAK, "bold underline yellow")
        for part in context.after:
            _append(text, part, OTHER, "yellow")
        table.add_row(f"{context.value:.3g}", text)
    return table


def _append(text: Text, part: Part, brackets: str, style: str) -> None:
    if part.value <= 0:
        text.append(part.text)
        return
    bare = part.text.lstrip(" ") or part.text  # a token of spaces keeps them inside
    text.append(part.text[:len(part.text) - len(bare)])
    text.append(f"{brackets[0]}{bare}{brackets[1]}", style=style)


def _words(title: str, words: tuple[WordEffect, ...]) -> Text:
    text = Text.assemble((f"{title:<11}", "bold"))
    for number, word in enumerate(words):
        text.append("  " if number else "")
        text.append(f"'{word.token}'", style="cyan")
        text.append(f" {word.effect:+.2g}", style="dim")
    return text


def search_view(result: SearchResult, n_features: int) -> RenderableType:
    """The strongest features of a text, then every token with its strongest features."""
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    for title in ("feature", "activation", "on token", "tokens", "fires in general"):
        table.add_column(title, justify="right" if title in ("activation", "tokens") else "left", overflow="fold")
    for found in result.features[:n_features]:
        rarity = "?" if found.density is None else f"{found.density:.3%} of tokens" if found.density else "never before"
        table.add_row(Text(found.id), f"{found.value:.3g}", Text(f"'{found.text}'"), str(found.fired_on), rarity)
    head = Text(f"{len(result.features)} features fire on {result.n_tokens} tokens; the strongest:")
    return Group(head, table, Text(), _per_token(result.tokens))


def _per_token(tokens: tuple[ReadToken, ...]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("token")
    table.add_column("its strongest features (latent, activation)", overflow="fold")
    for token in tokens:
        shown = "   ".join(f"{firing.latent} {firing.value:.3g}" for firing in token.firings)
        table.add_row(Text(f"'{token.text}'"), shown if token.measured else Text("not measured (massive)", style="dim"))
    return table
