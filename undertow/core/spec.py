"""Specs: one small frozen value a stage, from which a run can be rebuilt."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from undertow.core.errors import SpecError


class Spec(BaseModel):
    """Base of every spec: immutable, unknown keys refused, NaN and infinity refused.

    Validators of a subclass only check; they never mutate, log, draw random numbers or touch the disk.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def digest(self) -> str:
        """Hex digest (16 characters) of the canonical JSON form; independent of the order of keys."""
        return digest_json(self.model_dump(mode="json"))

    @classmethod
    def checked(cls, values: dict[str, Any], origin: str = "") -> Self:
        """Validate `values`; a refusal names the field, the value and the `origin` (a file or a command)."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SpecError(_describe(error, cls.__name__, origin)) from None

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Read a YAML mapping. Raises SpecError that names the file and the field."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise SpecError(f"cannot read {path}: {error}") from None
        if not isinstance(values, dict):
            raise SpecError(f"{path} holds {type(values).__name__}, not a mapping of settings")
        return cls.checked(values, str(path))


def _describe(error: ValidationError, name: str, origin: str) -> str:
    lines = [f"{name} refused{' (' + origin + ')' if origin else ''}:"]
    for item in error.errors(include_url=False):
        where = ".".join(str(part) for part in item["loc"]) or "spec"
        lines.append(f"  {where} = {item['input']!r}: {item['msg']}")
    return "\n".join(lines)


def digest_json(value: Any) -> str:
    """Hex digest (16 characters) of a JSON value in canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
