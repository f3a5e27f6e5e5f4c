"""Chat form: roles, a system prompt, and which tokens are the assistant's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from undertow.core.errors import TextError
from undertow.subjects.special import special_ids

ROLES = ("system", "user", "assistant")


class Rendered(NamedTuple):
    """A chat as tokens. `assistant[i]` is True where the assistant writes token i (its end-of-turn mark included)."""

    ids: list[int]
    assistant: list[bool]


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]], reply: bool = False) -> Rendered:
    """Render (role, content) messages by the tokenizer's chat template.

    Content is data: a template's special marks inside it are refused, since they would forge a turn. With `reply` the
    opening of an assistant turn is appended.

    Raises TextError: no chat template, unknown role, a special mark in a content, or a template that rewrites earlier
    turns when later ones are added (then the assistant's tokens cannot be told).
    """
    _check(tokenizer, messages)
    turns = [{"role": role, "content": content} for role, content in messages]
    text = _apply(tokenizer, turns, reply)
    spans: list[tuple[int, int]] = []
    for index, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        before, after = _apply(tokenizer, turns[:index], True), _apply(tokenizer, turns[: index + 1], False).rstrip("\n")
        if not (after.startswith(before) and text.startswith(after)):
            raise TextError("this tokenizer's chat template rewrites earlier turns; assistant tokens cannot be told")
        spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    owned = [any(low <= start and end <= high and start < end for low, high in spans)
             for start, end in encoded["offset_mapping"]]
    return Rendered(list(encoded["input_ids"]), owned)


def _apply(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], reply: bool) -> str:
    if not turns:
        return ""
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=reply))


def _check(tokenizer: PreTrainedTokenizerBase, messages: Sequence[tuple[str, str]]) -> None:
    if not tokenizer.chat_template:
        raise TextError("this tokenizer has no chat template", "leave --chat away, or choose a chat model")
    if not messages:
        raise TextError("a chat needs at least one message")
    marks = [str(mark) for mark in tokenizer.convert_ids_to_tokens(sorted(special_ids(tokenizer)))]
    for role, content in messages:
        if role not in ROLES:
            raise TextError(f"unknown role {role!r}", f"roles are {', '.join(ROLES)}")
        forged = next((token for token in marks if token in content), None)
        if forged is not None:
            raise TextError(f"a {role} message contains the special mark {forged!r}", "remove it from the text")
