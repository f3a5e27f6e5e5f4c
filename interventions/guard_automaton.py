"""Which tokens may come next so that a text never holds a forbidden form. Integers and bytes only; no torch.

Why this is not llguidance: its masks keep whatever can still become a member of the language, byte by byte. That is the
look-ahead mode (tests compare the two). The strict mode asks another question, whether the text is clean *at the end of a
token*: " amazing" as one token passes, although its bytes pass through the Spanish "ama", while "ama" alone does not. No
byte language says that; a prefix-closed one would forbid " amazing", " American" and " among".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import final

import numpy as np

from undertow.core.errors import SpecError
from undertow.lexicon.automaton import BREAK, DEAD, Automaton, States
from undertow.lexicon.folding import Kind, fold
from undertow.lexicon.forms import Lexicon
from undertow.lexicon.tokens import Ids, Place, TokenTable
from undertow.lexicon.vocabulary import Vocabulary

MODES = ("strict", "look_ahead")
_KEPT = 1_024  # texts whose places are kept


@final
class GuardMasks:
    """Masks over a vocabulary, one computed for each place that is reached and then kept.

    Args:
        vocabulary: the tokenizer's own bytes.
        lexicon: T0 forms are forbidden; exclusions are heeded.
        mode: "strict": the text is clean after every token. "look_ahead": a form may stand at the end of the text as long as
            the word can still go on into an innocent one; such text has to be held back (`Place` not clean).

    Raises SpecError for another mode, and if no form can be spelt with the vocabulary.
    """

    start = Place(int(Kind.OTHER) + 1)  # the first root of the automaton: nothing said yet

    def __init__(self, vocabulary: Vocabulary, lexicon: Lexicon, mode: str = "strict") -> None:
        if mode not in MODES:
            raise SpecError(f"unknown guard mode {mode!r}", f"modes are {', '.join(MODES)}")
        forbidden = lexicon.only(tiers=("T0",))
        self.mode = mode
        self.table = TokenTable(Automaton(forbidden.entries), vocabulary)
        check_spellable(vocabulary, forbidden)
        self._forbidden: dict[Place, Ids] = {}
        self._allowed: dict[tuple[int, bool], bool] = {}
        self._read: OrderedDict[tuple[int, ...], tuple[Place, bool]] = OrderedDict()

    def forbidden(self, place: Place) -> Ids:
        """Ids of the tokens that may not come next, ascending. From a place where the form is said already: all."""
        found = self._forbidden.get(place)
        if found is None:
            found = self._forbidden[place] = self._compute(place)
        return found

    def after(self, place: Place, token: int) -> Place:
        """Where the text stands after one more token."""
        return self.table.after(place, token)

    def read(self, ids: Sequence[int]) -> tuple[Place, bool]:
        """Where a given text (a prompt) stands, and whether a form is said in it.

        A form in it counts as said: the masks that follow look only at what goes on from the end of the text. The last texts
        are kept, since one prompt is read for many arms.
        """
        key = tuple(ids)
        if key not in self._read:
            self._read[key] = self._read_anew(key)
            if len(self._read) > _KEPT:
                self._read.popitem(last=False)
        return self._read[key]

    def _read_anew(self, ids: Sequence[int]) -> tuple[Place, bool]:
        place, said = self.start, False
        for token in ids:
            after = self.after(place, token)
            if after.state == DEAD:
                said = True
                after = self.after(Place(self.table.automaton.forgiven(place.state), place.partial), token)
                if after.state == DEAD:  # the form lies inside this token
                    after = Place(self._last_root(token))
            place = after
        if not self.permits(place):
            return Place(self.table.automaton.forgiven(place.state), place.partial), True
        return place, said

    def permits(self, place: Place) -> bool:
        """True if the mode lets a text stand at `place`."""
        return self._permits(place.state, bool(place.partial))

    def _permits(self, state: int, broken: bool) -> bool:
        key = (state, broken)
        if key not in self._allowed:
            automaton = self.table.automaton
            strict = self.mode == "strict" or broken  # a character that is not whole shows as a break
            self._allowed[key] = automaton.clean(state) if strict else automaton.viable(state)
        return self._allowed[key]

    def _last_root(self, token: int) -> int:
        """The state after the last characters of a token within which a form was said."""
        automaton, state = self.table.automaton, self.start.state
        for char in self.table.vocabulary.tokens[token].decode("utf-8", "replace"):
            for symbol in (automaton.alphabet.symbol(c) for c in fold(char)):
                after = automaton.step(state, symbol)
                state = after if after != DEAD else automaton.step(automaton.forgiven(state), symbol)
        return state

    def _compute(self, place: Place) -> Ids:
        table = self.table
        if place.state == DEAD:
            return np.arange(len(table.partials))
        if not place.partial:
            return np.flatnonzero(~self._verdicts(place.state, table.ends(place.state)))
        ends = table.ends(table.automaton.step(place.state, BREAK))
        permitted = self._verdicts(place.state, ends)
        for token in table.inner:  # these may complete the character
            permitted[token] = self.permits(self.after(place, int(token)))
        permitted[table.empty] = True
        permitted[table.special] = table.clean(place)
        return np.flatnonzero(~permitted)

    def _verdicts(self, state: int, ends: States) -> np.ndarray:
        """Whether the text may stand at the end of each token."""
        broken = self.table.broken
        permitted = np.empty(len(ends), dtype=bool)
        for part in (False, True):
            chosen = broken == part
            reached = np.unique(ends[chosen])
            good = np.array([self._permits(int(s), part) for s in reached], dtype=bool)
            permitted[chosen] = good[np.searchsorted(reached, ends[chosen])]
        permitted[self.table.special] = self.table.automaton.clean(state)
        return permitted


def check_spellable(vocabulary: Vocabulary, lexicon: Lexicon) -> None:
    """Raise SpecError unless the vocabulary has the characters of at least one T0 form."""
    known = {c for token in vocabulary.tokens for char in token.decode("utf-8", "ignore") for c in fold(char)}
    single = {token[0] for token in vocabulary.tokens if len(token) == 1}
    if len(single) == 256 or any(set(form.folded) <= known for form in lexicon.forms("T0")):
        return
    raise SpecError(f"lexicon {lexicon.name!r} matches nothing in this tokenizer: not one of its {len(lexicon.forms('T0'))} T0 "
                    "forms can be spelt with its tokens", "choose a lexicon in a language that the tokenizer writes")


def blocked_words(masks: GuardMasks, spellings: Sequence[tuple[str, Sequence[int]]]) -> list[str]:
    """Those of `spellings` (a word and its tokens) that the masks do not let through, although they hold no form."""
    blocked = []
    for word, ids in spellings:
        place = masks.start
        for token in ids:
            place = masks.after(place, token)
            if not masks.permits(place):
                blocked.append(word)
                break
    return blocked
