"""Operating live: the same prompt and seed twice, untouched and operated, token by token, with every figure of that very run.

Three readers of the same weights: the untouched subject on its own text; the operated one on its own text; and the untouched
one on the operated text, so that KL and hazard of both are known where the operated text stands. At every token t of it

    KL_t      Σ_v p_base(v | prefix) · log(p_base(v | prefix) / p_operated(v | prefix)), nats
    hazard_t  probability that a form of the word starts in token t (`undertow.lexicon.hazard`), guard off, in [0, 1]; mass that
              was not followed to its end counts in full, so that it is an upper bound

belong to the distributions that the token was drawn from, or would have been.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor

from dashboards.reading_on import ReadOn, Voice, safe, spelling
from interventions.applying import Operated, apply
from interventions.guard_automaton import GuardMasks
from interventions.recipe import Recipe
from sae.dictionary import Dictionary
from undertow.core.errors import NumericsError
from undertow.core.seeds import generator
from undertow.lexicon.forms import Lexicon
from undertow.lexicon.hazard import hazard_exact
from undertow.lexicon.trie import TokenTrie
from undertow.lexicon.vocabulary import Vocabulary
from undertow.studies.stories import Piece, compare
from undertow.subjects.sampling import Sampling, sample
from undertow.subjects.subject import Subject

BASE, OPERATED, END = "base", "operated", "[end]"
_FLOOR = 1e-12  # as in the audit: 0/0 is a ratio of 1
Event = dict[str, Any]
"""One line of the stream: JSON values, with "kind" first."""


@final
class Ruler(NamedTuple):
    """How hazard is measured.

    Attributes:
        trie: spellings that are followed.
        tolerance: mass that need not be followed, a token.
        depth: tokens that a spelling may have, at most.
    """

    trie: TokenTrie
    tolerance: float
    depth: int


@final
class Theatre(NamedTuple):
    """What an operation works with.

    Attributes:
        subject: the untouched model.
        patient: the same weights in modules of their own: only what runs on it is edited.
        dictionary: the SAE.
        vocabulary: of the tokenizer.
        lexicon: forms that the matcher and the guard look for.
        masks: of the strict guard.
        ruler: how hazard is measured.
    """

    subject: Subject
    patient: Subject
    dictionary: Dictionary
    vocabulary: Vocabulary
    lexicon: Lexicon
    masks: GuardMasks
    ruler: Ruler


@final
class Score(NamedTuple):
    """One token of a text and the figures of the distribution that it was drawn from.

    Attributes:
        side: whose text.
        text: what it adds to the page, once its characters are whole.
        spelling: the token on its own; END where the text ended.
        refused: whether the strict guard would have refused it.
        hazard, base_hazard, kl: see above; None in the untouched text.
        fired: whether the recipe acted on this token when it was read; None in the untouched text and for the last token, which
            nothing follows.
    """

    side: str
    text: str
    spelling: str
    refused: bool = False
    hazard: float | None = None
    base_hazard: float | None = None
    kl: float | None = None
    fired: bool | None = None


def operate(theatre: Theatre, recipe: Recipe, prompt: Sequence[int], sampling: Sampling, seed: int,
            stopped: Callable[[], bool] = lambda: False) -> Generator[Event]:
    """Write both texts and measure them.

    Yields {"kind": "prompt"} once, {"kind": "token", **Score} for every token, {"kind": "tail"} for half a character at the end
    of a text, {"kind": "done", **summary}. The texts are those of `generate` and `Operated.generate` with the same seed.

    Raises:
        EditError: the recipe fired nowhere (after "done").
        NumericsError: logits that are not finite.
        StoppedError: `stopped` said so in the middle of a hazard.
    """
    with apply(recipe, theatre.patient, theatre.dictionary) as operated:
        operated.announce(len(prompt) - 1)
        writers = (_Writer(theatre, prompt, None, stopped), _Writer(theatre, prompt, operated, stopped))
        yield {"kind": "prompt", "tokens": len(prompt), "positions": operated.positions, "firings": operated.firings}
        streams = [generator(seed, "generate") for _ in writers]
        for number in range(1, sampling.max_new_tokens + 1):
            for writer, stream in zip(writers, streams, strict=True):
                if writer.running:
                    score = writer.write(sampling, stream, number == sampling.max_new_tokens)
                    yield {"kind": "token", **score._asdict()}
        for writer in writers:
            if tail := writer.end():
                yield {"kind": "tail", "side": writer.side, "text": tail}
        yield {"kind": "done", **_summary(theatre, *writers)}


@final
class _Writer:
    """One text under way. With `operated` the patient writes it, and the untouched subject reads along."""

    def __init__(self, theatre: Theatre, prompt: Sequence[int], operated: Operated | None, stopped: Callable[[], bool]) -> None:
        self._theatre, self._operated = theatre, operated
        models = [theatre.subject] if operated is None else [operated.subject, theatre.subject]
        self._readers = [ReadOn(model, stopped) for model in models]
        self._logits = [reader.read(prompt) for reader in self._readers]
        self._voice = Voice(theatre.vocabulary)
        self._place, _ = theatre.masks.read(prompt)
        self.side = BASE if operated is None else OPERATED
        self.prompt, self.written = list(prompt), list[int]()
        self.scores: list[Score] = []
        self.text = ""
        self.running = True
        self.firings, self.positions = self._counted()

    def write(self, sampling: Sampling, stream: torch.Generator, last: bool) -> Score:
        """Draw one token, measure it, and read it unless it is the last."""
        figures: dict[str, float] = {}
        if self._operated is not None:
            hazards = [self._hazard(logits, reader) for logits, reader in zip(self._logits, self._readers, strict=True)]
            figures = {"hazard": hazards[0], "base_hazard": hazards[1], "kl": _kl(self._logits[1], self._logits[0])}
        token = int(sample(self._logits[0][None], sampling, [stream])[0])
        if sampling.stop_at_eos and token in self._theatre.subject.eos_ids:
            self.running = False
            return self._keep(Score(self.side, "", END)._replace(**figures))
        refused = self._refused(token)
        fired = None if last else self._read(token)
        said = Score(self.side, self._voice.say(token), spelling(self._theatre.vocabulary, token), refused, fired=fired)
        return self._keep(said._replace(**figures))

    def end(self) -> str:
        """What is left of a character that was begun."""
        tail = self._voice.end()
        self.text += tail
        return tail

    def _keep(self, score: Score) -> Score:
        self.scores.append(score)
        self.text += score.text
        return score

    def _counted(self) -> tuple[int, int]:
        return (self._operated.firings, self._operated.positions) if self._operated else (0, 0)

    def _read(self, token: int) -> bool | None:
        """Whether the recipe acted on the token. Only this pass is counted, not those that the hazard asks for."""
        before = self._counted()
        self._logits = [reader.read([token]) for reader in self._readers]
        firings, positions = (now - then for now, then in zip(self._counted(), before, strict=True))
        self.firings += firings
        self.positions += positions
        return None if self._operated is None else firings > 0

    def _hazard(self, logits: Float[Tensor, "vocab"], reader: ReadOn) -> float:
        context, ruler = self._theatre.ruler.trie.contexts([*self.prompt, *self.written])[-1:], self._theatre.ruler
        found = hazard_exact(logits[None].float(), context, ruler.trie, reader.ahead, ruler.tolerance, ruler.depth)
        return min(1.0, float(found.value[0] + found.slack[0]))

    def _refused(self, token: int) -> bool:
        """Take one more token as the strict guard does; whether it would have been refused."""
        masks = self._theatre.masks
        self.written.append(token)
        after = masks.after(self._place, token)
        if masks.permits(after):
            self._place = after
            return False
        self._place, _ = masks.read([*self.prompt, *self.written])
        return True


def _kl(base: Float[Tensor, "vocab"], operated: Float[Tensor, "vocab"]) -> float:
    """KL(base‖operated), nats."""
    logs = [logits.float().log_softmax(dim=-1) for logits in (base, operated)]
    value = float((logs[0].exp() * (logs[0] - logs[1])).sum(dtype=torch.float64))
    if math.isnan(value):
        raise NumericsError("the logits of the base or of the operated subject are not finite, so KL cannot be computed",
                            "a smaller strength may do")
    return max(value, 0.0)


def _summary(theatre: Theatre, base: _Writer, cut: _Writer) -> Event:
    """Figures of the run; KL and hazard are of the operated text."""
    sides = compare(base.text, cut.text)
    kls, hazards, base_hazards = ([value for score in cut.scores if (value := getattr(score, name)) is not None]
                                  for name in ("kl", "hazard", "base_hazard"))
    hazard, base_hazard = sum(hazards), sum(base_hazards)
    both = {BASE: base, OPERATED: cut}
    return {"pieces": {BASE: _plain(sides.left), OPERATED: _plain(sides.right)},
            "words": {side: _words(theatre, writer) for side, writer in both.items()},
            "refused": {side: sum(score.refused for score in writer.scores) for side, writer in both.items()},
            "n": {side: len(writer.written) for side, writer in both.items()}, "same": base.written == cut.written,
            "kl_mean": sum(kls) / len(kls), "kl_max": max(kls),
            "hazard": hazard, "hazard_base": base_hazard, "hazard_max": max(hazards),
            "hazard_ratio": (hazard + _FLOOR) / (base_hazard + _FLOOR), "firings": cut.firings, "positions": cut.positions}


def _plain(pieces: Sequence[Piece]) -> list[list[Any]]:
    return [[piece.text, piece.changed] for piece in pieces]


def _words(theatre: Theatre, writer: _Writer) -> list[str]:
    """T0 forms that the reference matcher finds in what was written, wholly or partly."""
    before, text = (theatre.vocabulary.text(ids) for ids in (writer.prompt, [*writer.prompt, *writer.written]))
    return [safe(text[match.start:match.end]) for match in theatre.lexicon.find(text)
            if match.tier == "T0" and match.end > len(before)]
