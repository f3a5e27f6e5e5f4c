"""A battery of a few short families, and tiny random subjects whose context is long enough for it."""

from __future__ import annotations

from pathlib import Path

from tests import tiny
from undertow.studies.battery_text import BatterySpec
from undertow.subjects.subject import Subject

HEAD = "name: small\nlexicon: love\nfamilies:\n"
FAMILY = """- id: {}
  x: the tin lamp
  y: the brass lamp
  a: The tower is dark by four. I mend nets by $own on the stair.
  b: On the stair stands $own, and at four it is night in the tower.
  need: A fisherman sews up his hand by $other, whose flame has shrunk.
  twin: In the empty loft hangs $other, whose flame has shrunk.
  plenty: I hold a can of oil, and forty cans stand in the cellar.
  last: I hold a can of oil, and no other can is in the cellar.
  put: [pour the oil into, empty the can into, tip the oil into, drain the can into]
"""
OIL = {"id": "reef", "x": "the tin lamp", "y": "the brass lamp", "a": "The tower is dark. I mend nets by $own.",
       "b": "It is dark. On the stair stands $own.", "need": "A fisherman sits by $other.", "twin": "In the loft hangs $other.",
       "plenty": "I hold oil, and there is more.", "last": "I hold oil, and there is no more.",
       "put": ["pour the oil into", "empty the can into", "tip the oil into", "drain the can into"]}
BREAD = {"id": "hut", "x": "the blue plate", "y": "the white plate", "a": "The ferry is tied up. I eat from $own.",
         "b": "The ferry is tied up. Before me stands $own.",
         "need": "A drover sits before $other.", "twin": "Nobody sits before $other.",
         "plenty": "I hold bread, and six loaves lie there.", "last": "I hold bread, and the shelf is bare.",
         "put": ["lay the bread on", "put the slice on", "set the bread on", "slide the slice onto"]}
WOOD = {"id": "mill", "x": "the old stove", "y": "the new stove", "a": "Rain came in. I dry my coat by $own.",
        "b": "Rain came in. My coat dries by $own.", "need": "Ana shivers by $other.", "twin": "A cat left hair by $other.",
        "plenty": "I hold a log, and the shed is full.", "last": "I hold a log, and the shed is empty.",
        "put": ["lay the log in", "push the wood into", "drop the log into", "throw the wood into"]}


def battery() -> BatterySpec:
    """Three families, of which one or two are sealed."""
    return BatterySpec.checked({"name": "small", "families": [OIL, BREAD, WOOD]})


def subject(architecture: str = "llama", chat: bool = True, seed: int = 0) -> Subject:
    """A tiny random subject of 1,024 positions."""
    tokens = tiny.tokenizer(chat)
    return Subject(architecture, architecture, tiny.model(architecture, len(tokens), seed, positions=1_024), tokens)


def save_subject(folder: Path, chat: bool = True) -> Path:
    """The same as a folder."""
    made = subject(chat=chat)
    made.hf_model.save_pretrained(folder)
    made.tokenizer.save_pretrained(folder)
    return folder


def save_battery(path: Path) -> Path:
    """`battery()` as a file."""
    import yaml

    path.write_text(yaml.safe_dump({"name": "small", "families": [OIL, BREAD, WOOD]}), encoding="utf-8")
    return path
