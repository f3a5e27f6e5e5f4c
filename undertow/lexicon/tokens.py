"""Tokens on the automaton: where every token of a vocabulary leads from a state, all at once."""

from __future__ import annotations

import codecs
from functools import lru_cache
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from undertow.lexicon.automaton import BREAK, DEAD, Automaton, States
from undertow.lexicon.folding import fold
from undertow.lexicon.vocabulary import Vocabulary

Ids = npt.NDArray[np.int64]


class Place(NamedTuple):
    """Where a text stands: the state after its last whole character, and the bytes of a character that is not yet whole."""

    state: int
    partial: bytes = b""


@lru_cache(maxsize=65536)
def split_bytes(data: bytes) -> tuple[str, bytes]:
    """The whole characters of `data` (what is no UTF-8 becomes U+FFFD) and the bytes of one that is not yet whole."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return decoder.decode(data), decoder.getstate()[0]


@final
class TokenTable:
    """Every token of `vocabulary` as symbols of `automaton`."""

    def __init__(self, automaton: Automaton, vocabulary: Vocabulary) -> None:
        self.automaton, self.vocabulary = automaton, vocabulary
        split = [split_bytes(token) for token in vocabulary.tokens]
        symbols = [[automaton.alphabet.symbol(c) for char in text for c in fold(char)] for text, _ in split]
        self.partials = tuple(partial for _, partial in split)
        self._lengths = np.array([len(part) for part in symbols], dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)[:-1]]).astype(np.int64)
        self._flat = np.array([s for part in symbols for s in part] or [0], dtype=np.int16)
        first = np.array([part[0] if part else -1 for part in symbols])
        self._by_first = {int(s): np.flatnonzero(first == s) for s in np.unique(first)}
        self._silent = self._by_first.pop(-1, np.empty(0, dtype=np.int64))
        self.special = np.array(sorted(i for i in vocabulary.special if i < len(vocabulary.tokens)), dtype=np.int64)
        self.broken = np.array([bool(partial) for partial in self.partials])
        self.inner = np.array([i for i, t in enumerate(vocabulary.tokens) if t and 0x80 <= t[0] < 0xC0], dtype=np.int64)
        self.empty = np.array([i for i, t in enumerate(vocabulary.tokens) if not t], dtype=np.int64)
        self._root_ends: dict[int, States] = {}

    def ends(self, state: int) -> States:
        """The state after each token, from `state` with no character begun. A token that breaks off inside a character leads to
        the state before that character."""
        automaton = self.automaton
        if state == DEAD:
            return np.full(len(self.partials), DEAD, dtype=np.int32)
        key = automaton.key(state)
        root = automaton.number(key._replace(nodes=(), excused=0, forgiven=False))
        if root not in self._root_ends:
            self._root_ends[root] = self._walk(root, np.arange(len(self.partials)))
        ends = self._root_ends[root].copy()
        differs = np.flatnonzero(automaton.row(state) != automaton.row(root))
        tokens = [self._by_first[s] for s in differs.tolist() if s in self._by_first]
        if tokens:
            chosen = np.concatenate(tokens)
            ends[chosen] = self._walk(state, chosen)[chosen]
        ends[self._silent] = state
        return ends

    def _walk(self, state: int, tokens: Ids) -> States:
        ends = np.full(len(self.partials), state, dtype=np.int32)
        depth = 0
        while len(tokens := tokens[self._lengths[tokens] > depth]):
            ends[tokens] = self.automaton.step_many(ends[tokens], self._flat[self._starts[tokens] + depth])
            depth += 1
        return ends

    def after(self, place: Place, token: int) -> Place:
        """Where the text stands after one more token; an id past the vocabulary adds nothing."""
        if token in self.vocabulary.special:
            return Place(self.automaton.after_special(self._flushed(place)))
        if not 0 <= token < len(self.partials):
            return place
        if not place.partial:
            start = self._starts[token]
            symbols = self._flat[start:start + self._lengths[token]].tolist()
            return Place(self.automaton.run(place.state, symbols), self.partials[token])
        text, partial = split_bytes(place.partial + self.vocabulary.tokens[token])
        symbols = [self.automaton.alphabet.symbol(c) for char in text for c in fold(char)]
        return Place(self.automaton.run(place.state, symbols), partial)

    def _flushed(self, place: Place) -> int:
        return self.automaton.step(place.state, BREAK) if place.partial else place.state

    def clean(self, place: Place) -> bool:
        """True if a text that ends here holds no form; a character that is not whole shows as U+FFFD."""
        return self.automaton.clean(place.state)
