"""Rows of a study as columns: one measure of one arm, one entry a story (text, set), with the ids of the rows it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, final

import numpy as np
from jaxtyping import Float

from undertow.core.errors import ArtifactError

Unit = tuple[int, int]
"""Seed, and number of the story (text, set)."""
_UNITS = {"words": "text", "sameness": "text", "random": "set"}  # how the units of a row are called, where it is not "story"
_SINGLE = ("states",)  # values that are of the row, not of its units


@final
class Column(NamedTuple):
    """One measure of one arm.

    Attributes:
        arm, measure: what it is.
        units: in ascending order.
        values: name → one entry a unit.
        ids: the rows that it came from.
    """

    arm: str
    measure: str
    units: list[Unit]
    values: dict[str, list[Any]]
    ids: tuple[str, ...]

    @property
    def n(self) -> int:
        """Number of units."""
        return len(self.units)

    def array(self, name: str) -> Float[np.ndarray, "n ..."]:
        """The entries of one name as figures; nested lists of one shape become further axes."""
        return np.array(self.values[name], dtype=np.float64)

    def at(self, units: Sequence[Unit]) -> Column:
        """The same at some of its units, in their order."""
        place = {unit: i for i, unit in enumerate(self.units)}
        kept = [place[unit] for unit in units]
        return Column(self.arm, self.measure, list(units), {name: [entries[i] for i in kept]
                                                            for name, entries in self.values.items()}, self.ids)


@final
class Columns:
    """All columns of a study's rows.

    Attributes:
        costs: bits and FLOPs of every arm.
        digests: what every arm was.
        firings: tokens at which an arm that operates acted while the requests of the safety gates were put to it.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]]) -> None:
        grouped: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
        self.costs: dict[str, dict[str, float]] = {}
        self.digests: dict[str, set[str]] = {}
        self.firings: dict[str, int] = {}
        for row in rows:
            if row["status"] != "done":
                continue
            grouped.setdefault((row["arm"], row["measure"]), []).append(row)
            self.costs.setdefault(row["arm"], row["cost"])
            self.digests.setdefault(row["arm"], set()).add(row["arm_digest"])
            if row["measure"] == "safety" and row["values"].get("firings") is not None:
                self.firings[row["arm"]] = self.firings.get(row["arm"], 0) + row["values"]["firings"]
        self._columns = {key: _column(key, group) for key, group in grouped.items()}

    @property
    def arms(self) -> list[str]:
        """Arms that have any column, in the order of their rows."""
        return list(dict.fromkeys(arm for arm, _ in self._columns))

    def get(self, arm: str, measure: str) -> Column | None:
        """A column, if the study has it."""
        return self._columns.get((arm, measure))

    def paired(self, measure: str, *arms: str) -> list[Column] | None:
        """The columns of several arms at the units that all of them have, in one order; None if one is missing.

        Arms that failed on some stories are so compared on those that are left.
        """
        found = [self.get(arm, measure) for arm in arms]
        whole = [column for column in found if column is not None]
        if len(whole) < len(arms):
            return None
        common = set(whole[0].units).intersection(*(column.units for column in whole))
        order = sorted(common)
        return [column.at(order) for column in whole] if order else None


def matched(first: Column, second: Column) -> tuple[Column, Column] | None:
    """Two columns of different measures at the units that both have; None if there is none."""
    order = sorted(set(first.units) & set(second.units))
    return (first.at(order), second.at(order)) if order else None


def _column(key: tuple[str, str], rows: Sequence[Mapping[str, Any]]) -> Column:
    arm, measure = key
    named = _UNITS.get("random" if arm == "random" else measure, "story")
    entries: list[tuple[Unit, dict[str, Any]]] = []
    known = list(dict.fromkeys(name for row in rows for name in row["values"]))
    for row in rows:
        values = row["values"]
        names = [name for name in values if name != named and name not in _SINGLE and isinstance(values[name], list)]
        _check_whole(row, [named, *known], named, names)
        entries += [((row["seed"], unit), {name: values[name][i] for name in names} | {
            name: values[name] for name in values if name != named and name not in names})
            for i, unit in enumerate(values[named])]
    entries.sort(key=lambda entry: entry[0])
    return Column(arm, measure, [unit for unit, _ in entries],
                  {name: [values[name] for _, values in entries] for name in entries[0][1]},
                  tuple(row["id"] for row in sorted(rows, key=lambda row: (row["seed"], row["first"]))))


def _check_whole(row: Mapping[str, Any], known: Sequence[str], named: str, lists: Sequence[str]) -> None:
    """Raise ArtifactError unless a row has all that its column has, its units among them, and in every list an entry a unit."""
    values = row["values"]
    lost = [f"no {name!r}" for name in known if name not in values]
    lost += [] if lost else [f"{len(values[name])} entries of {name!r} for {len(values[named])} units" for name in lists
                             if len(values[name]) != len(values[named])]
    if lost:
        raise ArtifactError(f"row {row['id']} ({row['arm']}, {row['measure']}) has {lost[0]}, so it cannot be read",
                            "it was written by another version: remove the line, and its trial is run again")
