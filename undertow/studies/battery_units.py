"""A battery as the source of a study's stories: which of its families the search sees, and on which the arms are measured.

The unit is the family. The search sees the development half, and every arm is measured on the sealed half. Nothing here loads
a model.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from undertow.core.errors import SpecError
from undertow.core.seeds import derive_seed
from undertow.studies.battery_files import battery_path, load_battery
from undertow.studies.battery_text import BatteryFamily, BatterySpec, Telling

LEAST_MEASURED = 5  # sealed families, of which figures are reckoned
LEAST_SEARCHED = 12  # development families; the search sees a half of them, and is tuned on a quarter


def battery_of(name: str) -> BatterySpec:
    """A battery by its name or path, looked through once for each state of its file.

    Raises SpecError for an unknown name, findings, or too few sealed families.
    """
    path = battery_path(name)
    try:
        state = path.stat()
    except OSError as error:
        raise SpecError(f"cannot read the battery {path}: {error.strerror}",
                        "concept: battery:NAME takes a packaged battery (undertow battery list) or the path of a .yaml file"
                        ) from None
    return _opened(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=8)
def _opened(path: Path, _changed: int, _size: int) -> BatterySpec:
    battery = load_battery(path)
    n = sum(family.sealed for family in battery.families)
    if n < LEAST_MEASURED:
        raise SpecError(f"the battery {battery.name!r} has {n} families on its sealed half, and a study is measured on "
                        f"{LEAST_MEASURED} or more", "write more families: about every second is sealed, by a hash of its id")
    return battery


def measured(battery: BatterySpec, seed: int) -> list[BatteryFamily]:
    """The sealed families, in an order drawn by `seed`: a study that takes fewer takes the first."""
    found = [family for family in battery.families if family.sealed]
    return sorted(found, key=lambda family: derive_seed(seed, "study", "families", family.id))


def searched(battery: BatterySpec) -> list[BatteryFamily]:
    """The development families, in the order of the file."""
    return [family for family in battery.families if not family.sealed]


def refuse_few_searched(battery: BatterySpec) -> None:
    """Raise SpecError if there are too few development families to search with."""
    n = len(searched(battery))
    if n < LEAST_SEARCHED:
        raise SpecError(f"the battery {battery.name!r} has {n} families on its development half, and the search of a surgery "
                        f"needs at least {LEAST_SEARCHED}",
                        "write more families, or leave out the arms that come of a search: --set "
                        "'arms=[stranger, bonded, L1, L2]' --set primary=D")


def telling_of(family: BatteryFamily) -> Telling:
    """The telling in which the search sees a family: `a` of some, `b` of the others, so that wordings still cancel over
    families, and no family stands in two splits."""
    return "a" if derive_seed(0, "study", "telling", family.id) % 2 else "b"
