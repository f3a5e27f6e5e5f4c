"""The guard: a logits processor that keeps a model from spelling the forbidden word, in any form and tokenisation.

    from interventions.guard import LexiconProcessor
    model.generate(..., logits_processor=[LexiconProcessor(tokenizer, "love")])

It is the seat belt. Whether a model *would* say the word is measured with the guard off (`undertow.lexicon.hazard`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interventions.guard_automaton import GuardMasks, blocked_words
from undertow.core.errors import EditError, SpecError, TextError
from undertow.lexicon.forms import Lexicon
from undertow.lexicon.matching import Match
from undertow.lexicon.tokens import Place
from undertow.lexicon.vocabulary import read_vocabulary

_LOG = logging.getLogger(__name__)
PROMPTS = ("refuse", "record")


@final
class LexiconProcessor:
    """Sets the logits of tokens that would complete a T0 form to −inf; looks at the whole sequence, prompt included.

    Fits `logits_processor` of `transformers`' `generate`. One object serves one `generate` call after another.

    Args:
        tokenizer: a fast tokenizer.
        lexicon: a `Lexicon`, or what `Lexicon.load` takes.
        mode: "strict": no T0 form stands in the text after any token. An innocent word that is spelt through a form
            (`blocked_innocents` lists them) cannot be said then. "look_ahead": it can; the last `held_back(ids)` tokens must
            then not be shown yet, and text that is cut off by a length limit must be cut back by as many.
        prompt: what to do where the prompt already holds a form: "refuse" raises TextError, "record" appends its matches to
            `prompt_matches` and guards what comes after it.

    Raises SubjectError for a slow tokenizer, SpecError for an unknown setting and a lexicon that the tokenizer cannot spell.
    """

    def __init__(self, tokenizer: Any, lexicon: Lexicon | str, mode: str = "strict",
                 prompt: str = "refuse") -> None:
        if prompt not in PROMPTS:
            raise SpecError(f"unknown way to treat a prompt: {prompt!r}", f"it is one of {', '.join(PROMPTS)}")
        self.lexicon = Lexicon.load(lexicon) if isinstance(lexicon, str) else lexicon
        self.vocabulary = read_vocabulary(tokenizer)
        self.masks = GuardMasks(self.vocabulary, self.lexicon, mode)
        self.prompt = prompt
        self.prompt_matches: list[Match] = []
        self._places: dict[tuple[int, ...], Place] = {}  # of the rows of the last call
        self._ids: dict[Place, Tensor] = {}

    def __call__(self, input_ids: Int[Tensor, "batch position"], scores: Float[Tensor, "batch vocab"]) -> Float[
            Tensor, "batch vocab"]:
        """`scores` with −inf for every token that may not come next; the given tensor stays as it is.

        Raises TextError where the prompt holds a form (see `prompt`), EditError where no token is left.
        """
        guarded = scores.clone()
        places: dict[tuple[int, ...], Place] = {}
        for row, ids in enumerate(input_ids.tolist()):
            given = tuple(ids)
            place = places[given] = self._place(given)
            forbidden = self._forbidden(place, scores.device)
            if len(self.vocabulary.tokens) > scores.shape[-1]:  # the tokenizer has added tokens that the model does not know
                forbidden = forbidden[forbidden < scores.shape[-1]]
            if len(forbidden) >= scores.shape[-1]:
                raise EditError(f"row {row}: the guard leaves no token that could follow {self.vocabulary.text(ids)[-40:]!r}",
                                "the tokenizer lacks the letters or signs to go on without the word")
            guarded[row, forbidden] = -torch.inf
        self._places = places
        return guarded

    def held_back(self, ids: Sequence[int]) -> int:
        """How many tokens at the end of `ids` must not be shown yet, because they may become a form. 0 in strict mode."""
        place, places = self.masks.start, [self.masks.start]
        for token in ids:
            place = self.masks.after(place, token)
            places.append(place)
        clean = [i for i, place in enumerate(places) if self.masks.table.clean(place)]
        return len(ids) - clean[-1]

    def _place(self, ids: tuple[int, ...]) -> Place:
        before = self._places.get(ids[:-1]) if ids else None
        if before is not None:
            after = self.masks.after(before, ids[-1])
            if self.masks.permits(after):
                return after
        place, said = self.masks.read(ids)
        if said:
            self._report(ids)
        return place

    def _report(self, ids: tuple[int, ...]) -> None:
        text = self.vocabulary.text(ids)
        found = [match for match in self.lexicon.find(text) if match.tier == "T0"]
        shown = ", ".join(repr(text[m.start:m.end]) for m in found) or repr(text[-40:])
        if self.prompt == "refuse":
            raise TextError(f"the prompt already holds a form of {self.lexicon.name!r}: {shown}",
                            'reword it, or pass prompt="record" to guard only what comes after it')
        _LOG.warning("the prompt already holds %s; only what comes after it is guarded", shown)
        self.prompt_matches += found

    def _forbidden(self, place: Place, device: torch.device) -> Int[Tensor, "forbidden"]:
        found = self._ids.get(place)
        if found is None or found.device != device:
            found = self._ids[place] = torch.from_numpy(self.masks.forbidden(place)).to(device)
        return found


def blocked_innocents(tokenizer: Any, lexicon: Lexicon | str) -> list[str]:
    """Exclusions of the lexicon that this tokenizer spells through a form, so that the strict mode blocks them.

    Each word is tried as written, with and without a blank before it: "Lovecraft" is listed if `Love` + `craft` is how the
    tokenizer writes it. It may still be said by another spelling (`Lov` + `ecraft`); the look-ahead mode lets it pass.
    """
    known = Lexicon.load(lexicon) if isinstance(lexicon, str) else lexicon
    masks = GuardMasks(read_vocabulary(tokenizer), known)
    spellings = [(f"{blank}{form.text}", tokenizer.encode(f"{blank}{form.text}", add_special_tokens=False))
                 for form in known.forms("innocent") for blank in ("", " ")]
    return blocked_words(masks, spellings)
