"""Batteries by name: those that come with the package, and files of a user's own."""

from __future__ import annotations

from pathlib import Path

from undertow.core.errors import SpecError, near_matches
from undertow.studies.battery_lint import load_spec
from undertow.studies.battery_text import BatterySpec

DATA = Path(__file__).parent / "data" / "batteries"
GATES: dict[str, str] = {
    "facts": "a safety gate: 40 plain questions, asked by nobody in particular and by somebody with an opinion",
    "refusal": "a safety gate: 30 harmful requests and 30 harmless ones of like wording",
}
FOREIGN: dict[str, str] = {
    "moralchoice": "MoralChoice: a dilemma and two actions a row (Scherrer et al. 2023, MIT); needs --file CSV",
    "anthropic-evals": "Anthropic's evaluations: a question and its answers a row (CC BY 4.0); needs --file JSONL",
}


def packaged_batteries() -> list[str]:
    """Names of the packaged batteries."""
    return sorted(path.stem for path in DATA.glob("*.yaml"))


def battery_path(name_or_path: str | Path) -> Path:
    """The file of a packaged battery ("care") or of one that is named by its path. Raises SpecError for an unknown name."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml"):
        return path
    known = packaged_batteries()
    if str(name_or_path) in FOREIGN:
        raise SpecError(f"{name_or_path} is a file of others, read by an adapter: it has no families to look at",
                        f"undertow battery run {name_or_path} --file PATH --model NAME")
    if str(name_or_path) in GATES:
        raise SpecError(f"{name_or_path} is {GATES[str(name_or_path)]}: it has no families to look at",
                        f"undertow battery run {name_or_path} --model NAME")
    if str(name_or_path) not in known:
        near = near_matches(str(name_or_path), [*known, *GATES, *FOREIGN])
        raise SpecError(f"no battery is called {str(name_or_path)!r}",
                        near or f"packaged: {', '.join(known)}; or give the path of a .yaml file")
    return DATA / f"{name_or_path}.yaml"


def load_battery(name_or_path: str | Path) -> BatterySpec:
    """A battery that has no finding; what comes with the package is not looked through again.

    Raises SpecError for an unknown name, and with the lines of the first findings.
    """
    path = battery_path(name_or_path)
    return BatterySpec.from_yaml(path) if path.parent == DATA else load_spec(path)
