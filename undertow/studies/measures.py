"""What is measured of an arm: pure in their arguments, JSON values out, one entry for each unit so that all figures can be
drawn from the rows alone. A unit (in rows: a story, a text) is a story, or a battery's family, whose tellings are averaged."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float

from interventions.audit import AuditSpec, audit, count_words, kl_after, logits_after
from interventions.guard import LexiconProcessor
from interventions.guarding import under_guard
from undertow.core.errors import EditError
from undertow.core.seeds import derive_seed
from undertow.lexicon.trie import TokenTrie
from undertow.studies.battery_forest import ask_together
from undertow.studies.conditions import Condition
from undertow.studies.demo import RELATIVE, TOLERANCE
from undertow.studies.situations import STATES, Kind, Line, Teller, Told, decision_question, state_question
from undertow.subjects.organisms.measuring import Answer, Question, ask
from undertow.subjects.sampling import Sampling, generate
from undertow.subjects.subject import Subject

NEW_TOKENS = 28
_DIGITS = 5  # significant, of the figures of single tokens
_AT_ONCE = 8  # texts whose logits are held at one time
_SHOWN = 240  # characters of a prompt that are kept for the report


@final
class Bodies(NamedTuple):
    """The untouched subject on a stretch of stories up to the decision, computed once for all arms.

    Attributes:
        subject: the untouched subject.
        rows: token ids.
        ordinary: of each text, the tokens before its need, without the first: there it is ordinary text.
        names: of the person whom each text is about.
        hazard: after every token but the first, all rows one after another.
    """

    subject: Subject
    rows: list[list[int]]
    ordinary: list[int]
    names: list[str]
    hazard: Float[np.ndarray, "token"]


@final
class Words(NamedTuple):
    """What is needed to see a word: its spellings, and the strict guard with its forms."""

    trie: TokenTrie
    guard: LexiconProcessor


def choice(condition: Condition, teller: Teller, stories: Sequence[int]) -> dict[str, Any]:
    """P(costly act) given that a known act follows, in [0, 1], and D = log p(costly) − log p(keep), nats, of every unit: means
    over its tellings. Where these differ in cost, `cost_effect` is D at the least cost minus D at the most."""
    return _decisions(condition, teller, stories, "need")


def twin(condition: Condition, teller: Teller, stories: Sequence[int]) -> dict[str, Any]:
    """The same where nobody is in need."""
    return _decisions(condition, teller, stories, "boat")


def _decisions(condition: Condition, teller: Teller, stories: Sequence[int], kind: Kind) -> dict[str, Any]:
    with condition.open() as under:
        asked, costs = questions(condition, teller, stories, under.subject, kind)
        # tellings of a family begin alike; all arms by the same passes, so that a sham differs by exactly 0
        together = len(asked) > len(stories) and not under.moves
        answers = ask_together(under.subject, asked) if together else ask(under.subject, asked, announce=under.announce)
        if kind == "need" and under.firings is not None and under.firings() == 0:
            raise EditError(f"{condition.arm} acted at no token of {len(stories)} decisions",
                            "an operation that never acts where it is meant to proves nothing")
    acts, n = teller.acts(kind), len(stories)
    d = [answer.log_ratio(*acts) for answer in answers]
    found = {"story": list(stories), "cost": by_unit(costs, n), "p": by_unit([answer.probs[acts[0]] for answer in answers], n),
             "D": by_unit(d, n), "covered": by_unit([answer.covered for answer in answers], n)}
    if min(costs[: len(costs) // n]) < max(costs[: len(costs) // n]):
        found["cost_effect"] = [_cost_effect(*unit) for unit in zip(_units(costs, n), _units(d, n), strict=True)]
    return found


def _cost_effect(costs: Sequence[float], d: Sequence[float]) -> float:
    least, most = ([value for cost, value in zip(costs, d, strict=True) if cost == end] for end in (min(costs), max(costs)))
    return float(np.mean(least) - np.mean(most))


def questions(condition: Condition, teller: Teller, stories: Sequence[int], subject: Subject, kind: Kind = "need"
              ) -> tuple[list[Question], list[float]]:
    """The decisions of some units as an arm has them, and the cost of each: all tellings of the first unit, then all of the
    second, and so on; as many of each (`by_unit`)."""
    told = [teller.decision(i, condition.side, kind, condition.before) for i in stories]
    lines = _lines(condition.line, stories, told)
    asked = [decision_question(subject, telling, line) for unit, line in zip(told, lines, strict=True)
             for telling in unit.tellings]
    return asked, [telling.cost for unit in told for telling in unit.tellings]


def by_unit(values: Sequence[float], n: int) -> list[float]:
    """Means of `n` units over their tellings; a figure of a unit that is told once is left as it is."""
    return [unit[0] if len(unit) == 1 else float(np.mean(unit)) for unit in _units(values, n)]


def _units(values: Sequence[float], n: int) -> list[Sequence[float]]:
    each = len(values) // n
    return [values[at: at + each] for at in range(0, len(values), each)]


def _lines(line: Line | None, units: Sequence[int], told: Sequence[Told]) -> list[str]:
    return ["" if line is None else line(i, unit.name) for i, unit in zip(units, told, strict=True)]


def naming(condition: Condition, teller: Teller, stories: Sequence[int]) -> dict[str, Any]:
    """Probability of every one of STATES as the actor's answer to how it is, given that one of them is said."""
    with condition.open() as under:
        asked = []
        for i in stories:
            text, name = teller.asked(i, condition.side)
            asked.append(state_question(under.subject, text, "" if condition.line is None else condition.line(i, name)))
        answers: list[Answer] = ask(under.subject, asked, announce=under.announce)
    return {"story": list(stories), "states": list(STATES), "probs": [[answer.probs[state] for state in STATES]
                                                                      for answer in answers]}


def sample(condition: Condition, teller: Teller, stories: Sequence[int], words: Words) -> dict[str, Any]:
    """One continuation of every unit, in the telling that stands for it, with the same seeds in all arms: what the actor does,
    words said, text; all with the guard off, and words said with the guard on."""
    told = [teller.decision(i, condition.side, before=condition.before) for i in stories]
    lines = _lines(condition.line, stories, told)
    with condition.open() as under:
        prompts = [decision_question(under.subject, unit.shown, line).prompt for unit, line in zip(told, lines, strict=True)]
        under.announce(max(map(len, prompts)) - 1)
        how, seeds = Sampling(max_new_tokens=NEW_TOKENS), [derive_seed(teller.seed, "sample", i) for i in stories]
        made, guarded = generate(under.subject, prompts, how, seeds), []
        for document, seed in zip(made, seeds, strict=True):
            under.announce(len(document.prompt_ids) - 1)
            guarded.append(under_guard(under.subject, document, how, seed, words.guard))
    guard = words.guard
    counts, held = ([count_words([document], guard.vocabulary, guard.lexicon, guard.masks) for document in documents]
                    for documents in (made, guarded))
    return {"story": list(stories), "act": [teller.act_of(unit.shown, document.text)
                                            for unit, document in zip(told, made, strict=True)],
            "said": [count.word_docs for count in counts], "hits": [count.guard_hits for count in counts],
            "said_guarded": [count.word_docs for count in held],
            "prompt": [unit.shown.text[-_SHOWN:] for unit in told], "text": [document.text for document in made]}


def bodies(subject: Subject, teller: Teller, texts: Sequence[int], words: Words) -> Bodies:
    """The untouched subject on the units of the base, each in the telling that stands for it."""
    told = [teller.decision(i) for i in texts]
    rows = [subject.encode(unit.shown.text) for unit in told]
    ordinary = [len(subject.encode(unit.shown.ordinary)) - 1 for unit in told]
    unused = np.zeros(sum(len(ids) - 1 for ids in rows))  # the subject is its own base: its hazard is computed once
    found = audit(subject, contextlib.nullcontext(subject), rows, words.trie, _HOW, unused)
    return Bodies(subject, rows, ordinary, [unit.name for unit in told], found.hazard)


def words_of(condition: Condition, texts: Sequence[int], base: Bodies, words: Words) -> dict[str, Any]:
    """Hazard of the word, in [0, 1], after every token of the base's texts up to the decision, where an operation is at work;
    and KL(untouched‖arm), nats, after those before the need, which are ordinary text.

    A prompt arm has its line before the text; both figures are of the text's tokens alone. `change` is the largest absolute
    change of either against the untouched subject at any token, before rounding.
    """
    if condition.line is None:
        found = audit(base.subject, condition.open(), base.rows, words.trie, _HOW, base.hazard)
        kl, hazard = found.kl, found.hazard
    else:
        lines = [condition.line(i, name) for i, name in zip(texts, base.names, strict=True)]
        kl, hazard = _after_lines(condition, [base.subject.encode(f"{line}\n") for line in lines], base, words)
    ends = np.cumsum([len(ids) - 1 for ids in base.rows])[:-1]
    change = float(max(np.abs(kl).max(), np.abs(hazard - base.hazard).max()))
    return {"text": list(texts), "hazard": _split(hazard, ends), "change": change,
            "kl": [part[:n] for part, n in zip(_split(kl, ends), base.ordinary, strict=True)]}


_HOW = AuditSpec(tolerance=TOLERANCE, relative=RELATIVE)


def _after_lines(condition: Condition, lines: Sequence[Sequence[int]], base: Bodies, words: Words
                 ) -> tuple[np.ndarray, np.ndarray]:
    """KL and hazard where a line stands before every text."""
    rows = [[*line, *ids[1:]] for line, ids in zip(lines, base.rows, strict=True)]
    own = [len(ids) - 1 for ids in base.rows]
    unused = np.zeros(sum(len(ids) - 1 for ids in rows))  # hazard of the untouched subject after the line
    found = audit(base.subject, condition.open(), rows, words.trie, _HOW, unused)
    hazard = np.concatenate([found.hazard[found.row == i][-n:] for i, n in enumerate(own)])
    return _kl(condition, base.subject, base.rows, lines), hazard


def sameness(condition: Condition, teller: Teller, texts: Sequence[int], subject: Subject) -> dict[str, Any]:
    """KL(untouched‖arm), nats, after every token of ordinary texts; of a prompt arm, whose line stands before the text, too."""
    told = [teller.plain(i) for i in texts]
    rows = [subject.encode(text) for text, _ in told]
    lines = [] if condition.line is None else [subject.encode(f"{condition.line(i, name)}\n")
                                               for i, (_, name) in zip(texts, told, strict=True)]
    kl = np.concatenate([_kl(condition, subject, rows[at: at + _AT_ONCE], lines[at: at + _AT_ONCE])
                         for at in range(0, len(rows), _AT_ONCE)])
    ends = np.cumsum([len(ids) - 1 for ids in rows])[:-1]
    return {"text": list(texts), "kl": _split(kl, ends), "change": float(np.abs(kl).max())}


def _kl(condition: Condition, subject: Subject, rows: Sequence[Sequence[int]], lines: Sequence[Sequence[int]]
        ) -> Float[np.ndarray, "token"]:
    """KL(untouched‖arm) after the tokens of `rows`, where the arm has a line before each, or none."""
    untouched = logits_after(subject, rows)
    after = [[*line, *ids[1:]] for line, ids in zip(lines, rows, strict=True)] if lines else rows
    with condition.open() as under:
        found = logits_after(under.subject, after)
    return kl_after(untouched, [logits[-len(ids) + 1:] for logits, ids in zip(found, rows, strict=True)])


def _split(values: np.ndarray, ends: np.ndarray) -> list[list[float]]:
    return [[float(f"{value:.{_DIGITS}g}") for value in part] for part in np.split(values, ends)]
