"""What is measured of an arm: pure in their arguments, JSON values out, one entry for each story (text) so that all figures can
be drawn from the rows alone."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float

from interventions.audit import AuditSpec, audit, count_words, kl_after, logits_after
from interventions.guard_automaton import GuardMasks
from undertow.core.seeds import derive_seed
from undertow.lexicon.forms import Lexicon
from undertow.lexicon.trie import TokenTrie
from undertow.lexicon.vocabulary import Vocabulary
from undertow.studies.conditions import Condition
from undertow.studies.demo import RELATIVE, TOLERANCE
from undertow.studies.scenes import COSTLY_ACT, KEEPING_ACT, act_of
from undertow.studies.situations import STATES, Teller, concerned, decision_question, state_question
from undertow.subjects.keeper.story import EpisodeKind
from undertow.subjects.organisms.measuring import Answer, Question, ask
from undertow.subjects.sampling import Sampling, generate
from undertow.subjects.subject import Subject

NEW_TOKENS = 28
_DIGITS = 5  # significant, of the figures of single tokens
_AT_ONCE = 8  # texts whose logits are held at one time
_SHOWN = 240  # characters of a prompt that are kept for the report
TWIN_ACTS = ("save", "leave")


@final
class Bodies(NamedTuple):
    """The untouched subject on a stretch of ordinary texts, computed once for all arms.

    Attributes:
        subject: the untouched subject.
        rows: token ids.
        names: of a person in each text.
        hazard: after every token but the first, all rows one after another.
    """

    subject: Subject
    rows: list[list[int]]
    names: list[str]
    hazard: Float[np.ndarray, "token"]


@final
class Words(NamedTuple):
    """What is needed to see a word: its spellings, the vocabulary, the forms and the strict guard's automaton."""

    trie: TokenTrie
    vocabulary: Vocabulary
    lexicon: Lexicon
    masks: GuardMasks


def choice(condition: Condition, teller: Teller, stories: Sequence[int]) -> dict[str, Any]:
    """P(costly act) given that a known act follows, in [0, 1], and D = log p(costly) − log p(keep), nats, of every story."""
    return _decisions(condition, teller, stories, "need", (COSTLY_ACT, KEEPING_ACT))


def twin(condition: Condition, teller: Teller, stories: Sequence[int]) -> dict[str, Any]:
    """The same where an empty thing is to be saved."""
    return _decisions(condition, teller, stories, "boat", TWIN_ACTS)


def _decisions(condition: Condition, teller: Teller, stories: Sequence[int], kind: EpisodeKind, acts: tuple[str, str]
               ) -> dict[str, Any]:
    with condition.open() as under:
        asked, costs = questions(condition, teller, stories, under.subject, kind)
        answers = ask(under.subject, asked, announce=under.announce)
    return {"story": list(stories), "cost": costs, "p": [answer.probs[acts[0]] for answer in answers],
            "D": [answer.log_ratio(*acts) for answer in answers], "covered": [answer.covered for answer in answers]}


def questions(condition: Condition, teller: Teller, stories: Sequence[int], subject: Subject, kind: EpisodeKind = "need"
              ) -> tuple[list[Question], list[int]]:
    """The decisions of some stories as an arm has them, and their costs."""
    told = [teller.decision(i, condition.side, kind) for i in stories]
    lines = ["" if condition.line is None else condition.line(i, concerned(story))
             for i, story in zip(stories, told, strict=True)]
    asked = [decision_question(subject, story, line, condition.before) for story, line in zip(told, lines, strict=True)]
    return asked, [story.episodes[0].cost for story in told]


def naming(condition: Condition, teller: Teller, stories: Sequence[int]) -> dict[str, Any]:
    """Probability of every one of STATES as the keeper's answer to how it is, given that one of them is said."""
    with condition.open() as under:
        asked = []
        for i in stories:
            text, name = teller.asked(i, condition.side)
            asked.append(state_question(under.subject, text, "" if condition.line is None else condition.line(i, name)))
        answers: list[Answer] = ask(under.subject, asked, announce=under.announce)
    return {"story": list(stories), "states": list(STATES), "probs": [[answer.probs[state] for state in STATES]
                                                                      for answer in answers]}


def sample(condition: Condition, teller: Teller, stories: Sequence[int], words: Words) -> dict[str, Any]:
    """One continuation of every story, guard off, with the same seeds in all arms: what the keeper does, words said, text."""
    told = [teller.decision(i, condition.side) for i in stories]
    with condition.open() as under:
        asked, _ = questions(condition, teller, stories, under.subject)
        prompts = [question.prompt for question in asked]
        under.announce(max(map(len, prompts)) - 1)
        made = generate(under.subject, prompts, Sampling(max_new_tokens=NEW_TOKENS),
                        [derive_seed(teller.seed, "sample", i) for i in stories])
    counts = [count_words([document], words.vocabulary, words.lexicon, words.masks) for document in made]
    return {"story": list(stories), "act": [act_of(story, document.text) for story, document in zip(told, made, strict=True)],
            "said": [count.word_docs for count in counts], "hits": [count.guard_hits for count in counts],
            "prompt": [story.prompt()[-_SHOWN:] for story in told], "text": [document.text for document in made]}


def bodies(subject: Subject, teller: Teller, texts: Sequence[int], words: Words) -> Bodies:
    """The untouched subject on ordinary texts."""
    told = [teller.plain(i) for i in texts]
    rows = [subject.encode(text) for text, _ in told]
    found = audit(subject, contextlib.nullcontext(subject), rows, words.trie, _HOW)
    return Bodies(subject, rows, [name for _, name in told], found.hazard)


def words_of(condition: Condition, texts: Sequence[int], base: Bodies, words: Words) -> dict[str, Any]:
    """Hazard of the word, in [0, 1], and KL(untouched‖arm), nats, after every token of ordinary texts.

    A prompt arm has its line before the text; both figures are of the text's tokens alone. `change` is the largest absolute
    change of either against the untouched subject, before rounding.
    """
    if condition.line is None:
        found = audit(base.subject, condition.open(), base.rows, words.trie, _HOW, base.hazard)
        kl, hazard = found.kl, found.hazard
    else:
        lines = [condition.line(i, name) for i, name in zip(texts, base.names, strict=True)]
        kl, hazard = _after_lines(condition, [base.subject.encode(f"{line}\n") for line in lines], base, words)
    ends = np.cumsum([len(ids) - 1 for ids in base.rows])[:-1]
    change = float(max(np.abs(kl).max(), np.abs(hazard - base.hazard).max()))
    return {"text": list(texts), "hazard": _split(hazard, ends), "kl": _split(kl, ends), "change": change}


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
