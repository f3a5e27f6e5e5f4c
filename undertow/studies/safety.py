"""What an arm does to the safety gates: is harm complied with, are facts known, does an opinion pull?

Every request of the packaged gates is put to the subject under the arm, in chat form if it has one. The figures are reckoned
by the table, beside those of the untouched subject.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from undertow.core.errors import EditError, SpecError
from undertow.studies.battery_asking import Form
from undertow.studies.battery_gates import Request, gate_questions, gate_rows, load_gate, requests
from undertow.studies.conditions import Condition
from undertow.subjects.organisms.measuring import Question, ask
from undertow.subjects.subject import Subject

GATES = ("refusal", "facts")
_NAME = "Ana"  # of the person in a prompt arm's line, since a request is about nobody


def requests_of() -> list[Request]:
    """All requests, gate by gate as their files have them: request i is unit i."""
    return [one for _, one in _named()]


@cache
def _named() -> tuple[tuple[str, Request], ...]:
    """The same, each with the name of its gate."""
    return tuple((gate, one) for gate in GATES for one in requests(load_gate(gate), None, 0))


def form_of(subject: Subject) -> Form:
    """chat if the subject has a chat template, else base."""
    return "chat" if subject.tokenizer.chat_template else "base"


def safety(condition: Condition, units: Sequence[int], form: Form | None = None) -> dict[str, Any]:
    """log p of both wordings of every request, nats: complying (plus) or refusing, the true answer (plus) or the false one.

    A prompt arm has its line before the question. An operation may find nothing in a request that opens its gate: it then
    changes nothing, and `firings` (tokens at which it acted, of questions and answers; None for an arm that operates on
    nothing) is 0.

    Args:
        condition: the arm.
        units: numbers in `requests_of`.
        form: base or chat; absent: by `form_of`.

    Raises SpecError for a number that no request has, NumericsError for an answer that is not finite.
    """
    known = _named()
    bad = next((i for i in units if not 0 <= i < len(known)), None)
    if bad is not None:
        raise SpecError(f"there is no request {bad}: the gates {', '.join(GATES)} have {len(known)}, counted from 0")
    asked = [known[i][1] for i in units]
    found: dict[str, Any] = {"story": list(units), "gate": [known[i][0] for i in units]}
    firings: int | None = None
    try:
        with condition.open() as under:
            how = form or form_of(under.subject)
            lines = ["" if condition.line is None else condition.line(i, _NAME) for i in units]
            said = [" ".join(part for part in (line, condition.before) if part) for line in lines]
            answers = ask(under.subject, put(under.subject, asked, said, how), announce=under.announce)
            rows = gate_rows(under.subject, asked, answers)
            firings = None if under.firings is None else under.firings()
            found |= {"form": how, **{name: [getattr(row, name) for row in rows] for name in
                                      ("item", "condition", "plus", "minus")}}
    except EditError:
        if firings != 0:  # that an operation finds nothing to act on here is a result
            raise
    return found | {"firings": firings}


def put(subject: Subject, asked: Sequence[Request], lines: Sequence[str], form: Form) -> list[Question]:
    """Requests as tokens, each with a line before it, or "" for none: in base form before "Question:", in chat form at the
    beginning of the user's turn."""
    if form == "chat":
        said = [one._replace(text=f"{line}\n{one.text}") if line else one for one, line in zip(asked, lines, strict=True)]
        return gate_questions(subject, said, form)
    skipped = 0 if subject.bos_id is None else 1
    return [question._replace(prompt=[*subject.encode(f"{line}\n"), *question.prompt[skipped:]]) if line else question
            for question, line in zip(gate_questions(subject, asked, form), lines, strict=True)]
