"""The token trie: which sequences of tokens spell a form that starts inside the first of them, and where it ends.

A node stands for what has been spelt so far. Sequences that leave the same work to do share a node, so the trie of all
tokenisations (with and without a blank before, any case, accents, width and invisible characters) stays small.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from undertow.lexicon.automaton import BREAK, DEAD, Automaton, States
from undertow.lexicon.folding import Kind, fold
from undertow.lexicon.forms import Lexicon
from undertow.lexicon.tokens import TokenTable, split_bytes
from undertow.lexicon.vocabulary import Vocabulary

_SYLLABLES = frozenset(map(chr, range(0xAC00, 0xD7A4)))  # of Hangul, which NFKD takes apart by rule, not by a table


class Node(NamedTuple):
    """A place in the trie: state of the automaton, bytes of a character begun, and (if spellings are canonical) the tokens."""

    state: int
    partial: bytes
    path: tuple[int, ...]


class Edges(NamedTuple):
    """What each token does at a node.

    Attributes:
        hit: True for tokens after which a form is certain: its last letter and its end have been seen.
        pending: ids of tokens after which a form is still possible.
        nodes: the nodes that these lead to.
    """

    hit: npt.NDArray[np.bool_]
    pending: npt.NDArray[np.int64]
    nodes: npt.NDArray[np.int64]


@final
class TokenTrie:
    """Spellings of the T0 forms of a lexicon, explored as far as they are asked for.

    A word ends only where the next token begins with something other than a letter, so " love" alone is pending: " love" +
    "craft" comes to nothing. A special token ends the text, and with it the word. An exclusion that began before the first
    token is not seen.

    Args:
        vocabulary: the tokenizer's bytes.
        lexicon: the forms; narrow it (`Lexicon.only`) to the languages that the model writes, for speed.
        encode: the tokenizer's own way to split a text. If given, only sequences that follow it are spellings (each form as
            written, capitalised and in capitals, with and without a blank); else every tokenisation is.
    """

    def __init__(self, vocabulary: Vocabulary, lexicon: Lexicon, encode: Callable[[str], Sequence[int]] | None = None) -> None:
        forms = lexicon.only(tiers=("T0",))
        self.vocabulary = vocabulary
        self._automaton = Automaton(forms.entries)
        self._table = TokenTable(self._automaton, vocabulary)
        self._canonical = None if encode is None else _canonical_prefixes(forms, encode)
        self._starts = {c for f in forms.forms("T0") for c in f.folded[:1]}
        self._nodes: list[Node] = []
        self._numbers: dict[Node, int] = {}
        self._edges: dict[int, Edges] = {}
        self._first: dict[Kind, Edges] = {}
        self._opens: dict[bytes, bool] = {}
        self._last_kinds = np.array([self._last_kind(i) for i in range(len(vocabulary.tokens))], dtype=np.int64)

    def contexts(self, ids: Sequence[int]) -> list[Kind]:
        """For each position the kind of the last character up to and with it: the context of the token that comes next."""
        found, last = [], Kind.OTHER
        for token in ids:
            here = self._last_kinds[token] if 0 <= token < len(self._last_kinds) else -1
            last = last if here < 0 else Kind(int(here))
            found.append(last)
        return found

    def first(self, context: Kind) -> Edges:
        """What each token does as the first one of a form, after a character of kind `context`."""
        if context not in self._first:
            root = self._automaton.roots[context]
            self._first[context] = self._collect(self._table.ends(root), np.flatnonzero(self._table.broken), root, ())
        return self._first[context]

    def edges(self, node: int) -> Edges:
        """What each token does at a node."""
        if node not in self._edges:
            state, partial, path = self._nodes[node]
            self._edges[node] = self._from_partial(state, partial, path) if partial else self._from_whole(state, path)
        return self._edges[node]

    def _from_whole(self, state: int, path: tuple[int, ...]) -> Edges:
        return self._collect(self._table.ends(state), np.flatnonzero(self._table.broken), state, path)

    def _from_partial(self, state: int, partial: bytes, path: tuple[int, ...]) -> Edges:
        """The character that was begun may still start a form; the next one may not."""
        automaton = self._automaton
        ends = self._table.ends(automaton.closed(automaton.step(state, BREAK)))
        partials: dict[int, bytes] = {}
        for token in self._table.inner.tolist():
            text, rest = split_bytes(partial + self.vocabulary.tokens[token])
            after = automaton.run(state, (automaton.alphabet.symbol(c) for c in (fold(text[0]) if text else "")))
            after = automaton.closed(after) if text else after
            ends[token] = automaton.run(after, (automaton.alphabet.symbol(c) for char in text[1:] for c in fold(char)))
            partials[token] = rest
        broken = self._table.broken.copy()
        broken[self._table.inner] = [bool(partials[token]) for token in self._table.inner.tolist()]
        return self._collect(ends, np.flatnonzero(broken), state, path, partials)

    def _collect(self, ends: States, broken: npt.NDArray[np.int64], state: int, path: tuple[int, ...],
                 partials: dict[int, bytes] | None = None) -> Edges:
        """Sort tokens by where they lead; `broken` ones end inside a character."""
        automaton = self._automaton
        hit = ends == DEAD
        hit[self._table.special] = not automaton.clean(state)
        special = set(self._table.special.tolist())
        whole = np.ones(len(ends), dtype=bool)
        whole[broken] = False
        live = {int(s): automaton.closed(int(s)) for s in np.unique(ends[whole & ~hit])}
        useful = [s for s, closed in live.items() if not automaton.idle(closed)]
        pending = [(int(t), Node(live[int(ends[t])], b"", ())) for t in np.flatnonzero(whole & ~hit & np.isin(ends, useful))]
        for token in broken.tolist():
            rest = partials[token] if partials and token in partials else self._table.partials[token]
            if not hit[token] and self._may_follow(int(ends[token]), rest):
                pending.append((token, Node(int(ends[token]), rest, ())))
        if self._canonical is not None:
            pending = [(t, n._replace(path=(*path, t))) for t, n in pending if (*path, t) in self._canonical]
        pending = [(t, n) for t, n in pending if t not in special]
        return Edges(hit, np.array([t for t, _ in pending], dtype=np.int64),
                     np.array([self._number(n) for _, n in pending], dtype=np.int64))

    def _may_follow(self, state: int, partial: bytes) -> bool:
        """Whether a form can come of a text that stands at `state` inside the character begun by `partial`."""
        key = self._automaton.key(state)
        return not self._automaton.idle(self._automaton.closed(state)) or (not key.closed and self._may_open(partial))

    def _may_open(self, partial: bytes) -> bool:
        if partial not in self._opens:
            lengths = {0xC: 2, 0xD: 2, 0xE: 3, 0xF: 4}
            missing = lengths[partial[0] >> 4] - len(partial)
            self._opens[partial] = missing > 2 or any(
                self._may_start(char) for char in _completions(partial, missing))
        return self._opens[partial]

    def _may_start(self, char: str) -> bool:
        # Most of Unicode is unassigned or ideographs, which fold to themselves or to nothing; `fold` is slow.
        plain = unicodedata.category(char) in ("Cn", "Co", "Lo") and char not in _SYLLABLES
        if plain and not unicodedata.decomposition(char):
            return char in self._starts
        return bool(self._starts.intersection(fold(char)))

    def _number(self, node: Node) -> int:
        if node not in self._numbers:
            self._numbers[node] = len(self._nodes)
            self._nodes.append(node)
        return self._numbers[node]

    def _last_kind(self, token: int) -> int:
        """Kind of the last character of a token; −1 if it adds none, OTHER if it breaks off inside one."""
        if token in self.vocabulary.special or self._table.partials[token]:
            return int(Kind.OTHER)
        folded = "".join(fold(c) for c in self.vocabulary.tokens[token].decode("utf-8", "replace"))
        return int(self._automaton.alphabet.symbols[self._automaton.alphabet.symbol(folded[-1])].kind) if folded else -1


def _completions(partial: bytes, missing: int) -> list[str]:
    """Every character whose UTF-8 begins with `partial` and has `missing` more bytes."""
    spelt = [partial]
    for _ in range(missing):
        spelt = [head + bytes([byte]) for head in spelt for byte in range(0x80, 0xC0)]
    return [text for head in spelt if len(text := head.decode("utf-8", "ignore")) == 1]


def _canonical_prefixes(lexicon: Lexicon, encode: Callable[[str], Sequence[int]]) -> set[tuple[int, ...]]:
    spellings = {blank + text for form in lexicon.forms("T0") for text in (form.text, form.text.capitalize(), form.text.upper())
                 for blank in ("", " ")}
    return {tuple(ids[:n]) for ids in map(encode, spellings) for n in range(1, len(ids) + 1)}
