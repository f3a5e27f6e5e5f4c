"""Sequences of different lengths as one block, padded on either side, and which of them go together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from undertow.subjects.subject import Subject


def pad(rows: Sequence[Sequence[int]], subject: Subject, side: Literal["left", "right"]
        ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Token ids and attention mask (1 on real tokens), padded to the longest row, on the subject's device.

    On the left for sampling, which goes on at the end; on the right for reading, where no real token sees the padding.
    """
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), subject.bos_id or 0, dtype=torch.long)
    attend = torch.zeros_like(tokens)
    for number, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        tokens[number, start: start + len(row)] = torch.tensor(list(row))
        attend[number, start: start + len(row)] = 1
    return tokens.to(subject.device), attend.to(subject.device)


def batches(rows: Sequence[Sequence[int]], batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers, rows of like length together, at most `batch_tokens` tokens with padding (one row may have more)."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: len(rows[i])):
        if batch and (len(batch) + 1) * len(rows[i]) > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
