"""The automaton: "contains a form that no exclusion covers", over folded characters, made deterministic as it is used.

A state is what must be remembered of the text so far: the kind of the last character, the forms and exclusions that are under
way (nodes of two tries, oldest start first), and whether a form is complete that only an exclusion still under way can excuse.
It says what `Lexicon.find` says (see `undertow.lexicon.matching` for the rules), after every prefix. Because folding looks at
one character at a time, nothing of the normalisation is lost.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, final

import numpy as np
import numpy.typing as npt

from undertow.lexicon.folding import Kind, extends, kind
from undertow.lexicon.matching import Form

BREAK = 0  # the symbol of every character that is no letter and stands in no form; the end of a text acts like it
DEAD = 0  # the state after a form that nothing excuses
_NEVER, _BOUND, _FREE = 0, 1, 2

States = npt.NDArray[np.int32]


class Symbol(NamedTuple):
    """A class of folded characters that the automaton need not tell apart; `char` is "" for characters of no form."""

    char: str
    kind: Kind
    extends: bool


class Key(NamedTuple):
    """A state.

    Attributes:
        kind: of the last character.
        nodes: nodes under way, oldest start first, of one start the exclusion before the form.
        excused: a form is complete and the first `excused` nodes may still cover it; 0 if there is none.
        closed: True if no form may start any more.
        forgiven: True if a form that is complete here counts as said already.
    """

    kind: Kind
    nodes: tuple[int, ...] = ()
    excused: int = 0
    closed: bool = False
    forgiven: bool = False


@final
class Tries:
    """Four tries of folded characters: exclusions and forms (even and odd roots), all of them (0, 1) and those that may start
    anywhere (2, 3).

    Attributes:
        children: for every node, the node after each character.
        end: whether a form ends at a node, and how (_NEVER, _BOUND, _FREE).
        covers: whether a node is of an exclusion.
        chars: every character in them, ascending.
        starts: the characters that something starts with.
    """

    def __init__(self, forms: Iterable[Form]) -> None:
        self.children: list[dict[str, int]] = [{} for _ in range(4)]
        self.end, self.covers = [_NEVER] * 4, [True, False, True, False]
        for form in forms:
            for root in (0, 2) if form.free_start else (0,):
                self._insert(root + (form.tier != "innocent"), form)
        self.chars = sorted({char for children in self.children for char in children})
        self.starts = set(self.children[0]) | set(self.children[1])

    def _insert(self, root: int, form: Form) -> None:
        node = root
        for char in form.folded:
            if char not in self.children[node]:
                self.children[node][char] = len(self.children)
                self.children.append({})
                self.end.append(_NEVER)
                self.covers.append(self.covers[root])
            node = self.children[node][char]
            if char == " ":
                self.children[node][" "] = node
        self.end[node] = max(self.end[node], _FREE if form.free_end else _BOUND)

    def completions(self, node: int) -> list[str]:
        """What is missing at `node` to complete each exclusion."""
        found = [""] if self.end[node] else []
        for char, child in self.children[node].items():
            if child != node:
                found += [char + rest for rest in self.completions(child)]
        return found

    def after(self, key: Key, symbol: Symbol) -> Key | None:
        """The state after one more character, None if it is DEAD.

        First what ends before `symbol`, then what goes on through it, then what starts with it.
        """
        excused = self._excused(key, symbol)
        nodes: list[int] = []
        covering = 0
        for i, node in enumerate(key.nodes):
            following = self.children[node].get(symbol.char)
            if following is not None:
                nodes.append(following)
                if i < excused:
                    covering += 1
        if excused and not any(self.covers[node] for node in nodes[:covering]):
            return None
        if not key.closed:
            blocked = symbol.kind != Kind.OTHER and symbol.kind == key.kind
            for root in (2, 3) if blocked else (0, 1):  # the exclusion first, so that it may excuse a form of the same start
                started = self.children[root].get(symbol.char)
                if started is not None:
                    nodes.append(started)
        return Key(symbol.kind, tuple(nodes), covering if excused else 0, key.closed)

    def _excused(self, key: Key, symbol: Symbol) -> int:
        """How many of the oldest nodes may excuse what is complete before `symbol`; 0 if nothing is, or all is covered."""
        if key.forgiven:
            return 0
        ended = [i for i, node in enumerate(key.nodes) if _ends(self.end[node], symbol)]
        cover = next((i for i in ended if self.covers[key.nodes[i]]), len(key.nodes))
        hit = next((i for i in ended if not self.covers[key.nodes[i]]), None)
        waiting = [n for n in (key.excused, 0 if hit is None else hit + 1) if n]
        return min((n for n in waiting if cover >= n), default=0)


@final
class Alphabet:
    """Folded characters as symbols: one for each character in `chars`, and one for each class of all others."""

    def __init__(self, chars: Sequence[str]) -> None:
        self.symbols: list[Symbol] = [Symbol("", k, e) for e in (False, True) for k in Kind]
        self.classes = {(s.kind, s.extends): i for i, s in enumerate(self.symbols)}
        self.of_char = {char: len(self.symbols) + i for i, char in enumerate(chars)}
        self.symbols += [Symbol(char, kind(char), extends(char)) for char in chars]

    def symbol(self, char: str) -> int:
        """The symbol of a folded character."""
        found = self.of_char.get(char)
        return self.classes[kind(char), extends(char)] if found is None else found


@final
class Automaton:
    """States are integers, found as they are first reached; DEAD stays DEAD.

    Args:
        forms: forms to look for, and exclusions (tier "innocent").
    """

    def __init__(self, forms: Iterable[Form]) -> None:
        self._tries = Tries(forms)
        self.alphabet = Alphabet(self._tries.chars)
        self.keys: list[Key | None] = [None]
        self._numbers: dict[Key, int] = {}
        self._table = np.full((64, len(self.alphabet.symbols)), -1, dtype=np.int32)
        self._table[DEAD] = DEAD
        self.roots = tuple(self.number(Key(k)) for k in Kind)

    def number(self, key: Key) -> int:
        """The number of a state."""
        if key not in self._numbers:
            self._numbers[key] = len(self.keys)
            self.keys.append(key)
            if len(self.keys) > len(self._table):
                more = np.full_like(self._table, -1)
                self._table = np.concatenate([self._table, more])
        return self._numbers[key]

    def key(self, state: int) -> Key:
        """What a state remembers. Not for DEAD."""
        key = self.keys[state]
        assert key is not None, "DEAD remembers nothing"
        return key

    def step(self, state: int, symbol: int) -> int:
        """The state after one more character."""
        if self._table[state, symbol] < 0:
            self._expand(state)
        return int(self._table[state, symbol])

    def run(self, state: int, symbols: Iterable[int]) -> int:
        """The state after some more characters."""
        for symbol in symbols:
            state = self.step(state, symbol)
        return state

    def step_many(self, states: States, symbols: npt.NDArray[np.int16]) -> States:
        """`step`, elementwise."""
        reached = np.zeros(len(self.keys), dtype=bool)
        reached[states] = True
        for state in np.flatnonzero(reached & (self._table[:len(self.keys), BREAK] < 0)):
            self._expand(int(state))
        return self._table[states, symbols]

    def row(self, state: int) -> States:
        """The states after each symbol."""
        self.step(state, BREAK)
        return self._table[state]

    def clean(self, state: int) -> bool:
        """True if a text that ends here holds no form."""
        return state != DEAD and self.step(state, BREAK) != DEAD

    def viable(self, state: int) -> bool:
        """True if some continuation makes the text clean: it is, or one more letter or the rest of an exclusion does it."""
        if state == DEAD:
            return False
        if self.clean(state) or any(self.clean(int(after)) for after in set(self.row(state).tolist())):
            return True
        key = self.key(state)
        return any(self.clean(self.run(state, (self.alphabet.of_char[char] for char in rest)))
                   for node in key.nodes if self._tries.covers[node] for rest in self._tries.completions(node))

    def closed(self, state: int) -> int:
        """The same state, but no form may start any more: only those under way count."""
        if state == DEAD:
            return DEAD
        return self.number(self.key(state)._replace(closed=True))

    def idle(self, state: int) -> bool:
        """True for a closed state in which no form is under way, so that nothing can come of it."""
        key = self.keys[state]
        return key is not None and key.closed and not key.excused and all(self._tries.covers[node] for node in key.nodes)

    def forgiven(self, state: int) -> int:
        """The same state, but what is complete here counts as said: only what goes on from here is looked at."""
        return state if state == DEAD else self.number(self.key(state)._replace(forgiven=True))

    def after_special(self, state: int) -> int:
        """The state after a token without text, which may be shown or not: a form may go on across it or start after it."""
        if not self.clean(state):
            return DEAD
        key = self.key(state)
        nodes = tuple(node for node in key.nodes if not self._tries.covers[node])  # an exclusion does not go on across it
        return self.number(Key(Kind.OTHER, nodes, 0, key.closed))

    def _expand(self, state: int) -> None:
        key = self.key(state)

        def reached(symbol: Symbol) -> int:
            after = self._tries.after(key, symbol)
            return DEAD if after is None else self.number(after)

        row = np.empty(len(self.alphabet.symbols), dtype=np.int32)
        plain = {pair: reached(self.alphabet.symbols[i]) for pair, i in self.alphabet.classes.items()}
        for i, symbol in enumerate(self.alphabet.symbols):
            row[i] = plain[symbol.kind, symbol.extends]
        special = {char for node in key.nodes for char in self._tries.children[node]}
        for char in special if key.closed else special | self._tries.starts:
            row[self.alphabet.of_char[char]] = reached(self.alphabet.symbols[self.alphabet.of_char[char]])
        self._table[state] = row


def _ends(end: int, symbol: Symbol) -> bool:
    """True if a form may end before `symbol`."""
    return not symbol.extends and (end == _FREE or (end == _BOUND and symbol.kind != Kind.ALPHABETIC))


def symbols_of(automaton: Automaton, folded: str) -> Sequence[int]:
    """Folded text as symbols."""
    return [automaton.alphabet.symbol(char) for char in folded]
