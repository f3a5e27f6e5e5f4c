"""Where an arm moves the residual stream: by block, and by token before the decision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from undertow.core.errors import EditError, NumericsError, SpecError
from undertow.studies.conditions import Condition
from undertow.studies.measures import questions
from undertow.studies.situations import Teller
from undertow.subjects.sites import Site
from undertow.subjects.subject import Subject
from undertow.subjects.tapping import tap_sites

PLACES = 24  # tokens before the decision that are read; the last of them is the one after which the act stands
_DIGITS = 5  # significant


def spread(condition: Condition, teller: Teller, stories: Sequence[int], subject: Subject) -> dict[str, Any]:
    """‖x_arm − x_untouched‖ / ‖x_untouched‖, 0 or more, of the stream after every block at the last PLACES tokens of a unit,
    mean over its tellings.

    An entry a unit: a list of blocks, block 0 first, each with PLACES figures, that of the decision last. Both subjects read
    the same tokens; what a prompt arm has before them is read by the arm alone, and tokens are counted from the end. Nothing
    is left out: the first token is never among them, and a massive activation has a large norm and so a small figure. One
    text a pass, so that nothing is padded and a sham is 0 to the last bit.

    Args:
        condition: the arm.
        teller, stories: what is told.
        subject: the untouched subject.

    Raises:
        SpecError: a text of PLACES tokens or fewer.
        EditError: an arm whose text ends otherwise than the untouched subject's.
        NumericsError: a figure that is not finite.
    """
    plain = [question.prompt for question in questions(condition._replace(line=None, before=""), teller, stories, subject)[0]]
    untouched = [_last(subject, prompt) for prompt in plain]
    changes = []
    with condition.open() as under:
        asked, _ = questions(condition, teller, stories, under.subject)
        each = len(asked) // len(stories)
        for i, (before, base, question) in enumerate(zip(untouched, plain, asked, strict=True)):
            if question.prompt[-PLACES:] != base[-PLACES:]:
                raise EditError(f"under {condition.arm} story {stories[i // each]} ends in other tokens than for the untouched "
                                f"subject, so its last {PLACES} cannot be compared", "leave the measure 'spread' out for it")
            under.announce(len(question.prompt) - 1)
            changes.append(relative_change(before, _last(under.subject, question.prompt)))
            if not bool(torch.isfinite(changes[-1]).all()):
                raise NumericsError(f"the stream of story {stories[i // each]} under {condition.arm} is not finite in "
                                    f"{int((~torch.isfinite(changes[-1])).sum())} of {changes[-1].numel()} places",
                                    "the model overflows; open it in another dtype")
    means = torch.stack(changes).unflatten(0, (len(stories), each)).mean(dim=1)
    return {"story": list(stories), "spread": [[[float(f"{value:.{_DIGITS}g}") for value in block] for block in unit]
                                               for unit in means.tolist()]}


def relative_change(before: Float[Tensor, "block place d_model"], after: Float[Tensor, "block place d_model"]
                    ) -> Float[Tensor, "block place"]:
    """‖after − before‖ / ‖before‖, in float64."""
    first, second = before.double(), after.double()
    return (second - first).norm(dim=-1) / first.norm(dim=-1)


def _last(subject: Subject, prompt: Sequence[int]) -> Float[Tensor, "block place d_model"]:
    """The stream after every block at the last PLACES tokens, on the CPU in the subject's own precision."""
    if len(prompt) <= PLACES:
        raise SpecError(f"a story of {len(prompt)} tokens is too short: {PLACES} are read before the decision, and the first "
                        "token of all is not among them", "leave out the measure 'spread', or tell longer stories")
    sites = [Site(layer, "resid_post") for layer in range(subject.n_layers)]
    streams = tap_sites(subject, torch.tensor([list(prompt)]), sites)
    return torch.stack([stream[0, -PLACES:].to("cpu", copy=True) for stream in streams])
