"""Feature cards: every figure by hand, contexts, JSON, and text that tries to rule the terminal."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from rich.text import Text

from features.cards import Bar, FeatureCard, Lens, Part, card, feature_id
from features.examples import collect_examples
from undertow.cli.feature_view import OTHER, _append, card_view, cards_text
from undertow.core.errors import DictionaryError
from undertow.subjects.unembed import UnembedView

HOSTILE = "\x1b[31m"
WORDS = ["<s>", " a", " b", HOSTILE, "[bold]", "\n", " c", "é", " d", "z"]


class WordTokenizer:
    """A vocabulary of whole words."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False, **kwargs: bool) -> str:
        return "".join(WORDS[i] for i in token_ids)

    def convert_ids_to_tokens(self, ids: int, /) -> str | list[str]:
        return WORDS[ids]


@pytest.fixture
def made(memory_store: Any, identity_dictionary: Any) -> Callable[[int], FeatureCard]:
    """Cards over two rows `<s> a b ESC [bold]` and `\\n c é d z`: latent 0 fires on three tokens, latent 2 on none."""
    activations = torch.tensor([
        [0.5, 0, 0], [0, 0, 0], [4.0, 0, 0], [0, 1.0, 0],
        [0, 0, 0], [2.0, 0, 0], [0, 1.0, 0], [0, 0, 0]])
    table = collect_examples(identity_dictionary(3), memory_store(activations, 2, 5), seed=0)
    gamma, unembed = torch.ones(3), torch.eye(10, 3)
    lens = Lens(WordTokenizer(), UnembedView(gamma, False, unembed))
    return lambda latent: card("toy", latent, torch.eye(3)[latent % 3], table, lens, "8 tokens of a toy")


def test_figures(made: Callable[[int], FeatureCard]) -> None:
    found = made(0)
    assert (found.id, found.latent, found.count, found.n_tokens) == ("toy:0", 0, 3, 8)
    assert (found.density, found.maximum, found.mean) == (3 / 8, 4.0, 6.5 / 3)
    assert [bar.firings for bar in found.histogram] == [1, 0, 0, 0, 1, 0, 1]
    assert found.histogram[0] == Bar(0.5, 0.5 * 2**0.5, 1)
    assert found.histogram[-1].low == 4.0
    assert found.promoted[0].token == "<s>"
    assert found.promoted[0].effect == pytest.approx(0.9)
    assert found.suppressed[0].effect == pytest.approx(-0.1)


def test_contexts(made: Callable[[int], FeatureCard]) -> None:
    strongest, second = made(0).top
    assert strongest.before == (Part("<s>", 0.0), Part(" a", 0.5), Part(" b", 0.0))
    assert strongest.token == Part("\\x1b[31m", 4.0)
    assert strongest.after == (Part("[bold]", 0.0),)
    assert (strongest.value, strongest.row, strongest.position) == (4.0, 0, 3)
    assert second.before == (Part("↵", 0.0), Part(" c", 0.0))
    assert second.token == Part("é", 2.0)
    assert {context.value for context in made(0).uniform} == {0.5, 2.0, 4.0}


def test_dead_latent(made: Callable[[int], FeatureCard]) -> None:
    dead = made(2)
    assert (dead.count, dead.histogram, dead.top, dead.uniform) == (0, (), (), ())
    assert "never fired on 8 tokens" in cards_text([dead], 8)
    assert "strongest" not in cards_text([dead], 8)


def test_out_of_range(made: Callable[[int], FeatureCard]) -> None:
    with pytest.raises(DictionaryError, match="no feature 3: this SAE has 3\n  choose from 0 to 2"):
        made(3)


def test_json(made: Callable[[int], FeatureCard]) -> None:
    found = json.loads(json.dumps(made(0).to_json(), allow_nan=False))
    assert found["top"][0]["token"] == {"text": "\\x1b[31m", "value": 4.0}
    assert found["histogram"][0]["firings"] == 1
    assert set(found["promoted"][0]) == {"token", "token_id", "effect"}


def test_nothing_in_the_text_rules_the_terminal(made: Callable[[int], FeatureCard]) -> None:
    out = io.StringIO()
    Console(file=out, width=120, force_terminal=True, color_system="truecolor").print(card_view(made(0), 8))
    shown = out.getvalue()
    assert HOSTILE not in shown
    assert "\\x1b[31m" in shown
    assert "[bold]" in shown
    assert "\x1b[" in shown  # negative control: our own colours are there


def test_reads_without_colour(made: Callable[[int], FeatureCard]) -> None:
    text = cards_text([made(0)], 8)
    assert "\x1b" not in text
    assert "<s> ‹a› b«\\x1b[31m»[bold]" in text
    assert "fires on 3 of 8 tokens (37.500%)" in text
    assert "0.5 █   █ █ 5.66" in text
    assert "'<s>' +0.9" in text


def test_a_token_of_spaces_can_be_seen() -> None:
    text = Text()
    _append(text, Part("  ", 1.0), OTHER, "yellow")
    _append(text, Part(" a", 1.0), OTHER, "yellow")
    assert text.plain == "‹  › ‹a›"


def test_ids() -> None:
    assert feature_id("smollm2/12", 1475) == "smollm2/12:1475"
