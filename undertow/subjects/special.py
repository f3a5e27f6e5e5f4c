"""Which tokens are special, for any tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class HasSpecialTokens(Protocol):
    """What is needed of a tokenizer here."""

    @property
    def all_special_ids(self) -> list[int]: ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, Any]: ...


def special_ids(tokenizer: HasSpecialTokens) -> frozenset[int]:
    """Ids with a role (BOS, EOS, ...), and ids that the tokenizer's file marks as special without giving them one."""
    marked = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return frozenset(marked | set(tokenizer.all_special_ids))
