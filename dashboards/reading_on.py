"""One token after another: a model that keeps what it has read, and the text of tokens that share characters."""

from __future__ import annotations

import codecs
import copy
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor

from features.wording import printable
from undertow.core.errors import UndertowError
from undertow.lexicon.hazard import Continuation
from undertow.lexicon.vocabulary import Vocabulary
from undertow.subjects.sampling import empty_cache
from undertow.subjects.subject import Subject

_AT_ONCE = 16  # continuations a pass: each carries a copy of the cache


class StoppedError(UndertowError):
    """What was under way was asked to stop."""


@final
class ReadOn:
    """A subject with a key-value cache; reads as `undertow.subjects.sampling.generate` does, one sequence at a time.

    `stopped` is asked between two passes of `ahead`.
    """

    def __init__(self, subject: Subject, stopped: Callable[[], bool] = lambda: False) -> None:
        self._subject, self._stopped = subject, stopped
        self._cache: Any = empty_cache()
        self._n = 0

    def read(self, ids: Sequence[int]) -> Float[Tensor, "vocab"]:
        """Logits of what follows after `ids` were read too; an active splice acts on them."""
        logits, self._cache = self._pass([list(ids)], self._cache)
        self._n += len(ids)
        return logits[0]

    def ahead(self, continuations: list[Continuation]) -> Float[Tensor, "n vocab"]:
        """Logits after each of some continuations of equal length, as `hazard_exact` asks for them; nothing of them is kept.

        Raises StoppedError between two passes, since there may be thousands.
        """
        rows = [list(continuation.tokens) for continuation in continuations]
        return torch.cat([self._aside(rows[at:at + _AT_ONCE]) for at in range(0, len(rows), _AT_ONCE)])

    def _aside(self, rows: list[list[int]]) -> Float[Tensor, "n vocab"]:
        if self._stopped():
            raise StoppedError
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(len(rows))
        return self._pass(rows, cache)[0].float()

    def _pass(self, rows: list[list[int]], cache: Any) -> tuple[Float[Tensor, "n vocab"], Any]:
        device, stop = self._subject.device, self._n + len(rows[0])
        with torch.inference_mode():
            out = self._subject.hf_model(
                input_ids=torch.tensor(rows, device=device), past_key_values=cache, use_cache=True, logits_to_keep=1,
                attention_mask=torch.ones(len(rows), stop, dtype=torch.long, device=device),
                position_ids=torch.arange(self._n, stop, device=device).expand(len(rows), -1))
        return out.logits[:, -1], out.past_key_values


@final
class Voice:
    """The text that each token adds, once its characters are whole; what is no UTF-8 becomes U+FFFD."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def say(self, token: int) -> str:
        """What can be shown after one more token; "" inside a character and for special tokens."""
        return safe(self._decoder.decode(self._vocabulary.spell([token])))

    def end(self) -> str:
        """What is left of a character that was begun."""
        return safe(self._decoder.decode(b"", final=True))


def safe(text: str) -> str:
    """`text` with its line breaks, and no other character that a terminal or a page obeys."""
    return "\n".join(printable(line) for line in text.split("\n"))


def spelling(vocabulary: Vocabulary, token: int) -> str:
    """A token on its own for a table: its text, or its bytes in hexadecimal where they are no whole characters."""
    data = vocabulary.spell([token])
    try:
        return printable(data.decode("utf-8")) if data else f"[token {token}]"
    except UnicodeDecodeError:
        return " ".join(f"{byte:02X}" for byte in data)
