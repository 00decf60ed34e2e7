"""The cascade's dials: one frozen dataclass, read from `settings.yml` and, over it, from the file HEADRACE_SERVING names."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from serving.retrieve import GENERATORS
from warehouse.errors import HeadraceError

DEFAULTS = Path(__file__).with_name("settings.yml")


@dataclass(frozen=True)
class Settings:
    """Meanings and units stand beside the values in `settings.yml`."""

    generators: Mapping[str, int]
    l1_top_k: int
    page_size: int
    max_notes_per_author: int
    head_weights: Mapping[str, float]
    seen_per_user: int
    item_to_item_seeds: int
    logged_share: float
    forward_log_queue: int
    forward_log_rows: int
    forward_log_age_s: float
    recent_requests: int
    inference_threads: int
    waiting_requests: int
    max_candidates: int
    max_body_bytes: int
    waiting_events: int
    max_log_bytes: int

    @classmethod
    def from_env(cls) -> "Settings":
        """The defaults, with what the file in `$HEADRACE_SERVING` says instead. Raises HeadraceError for a name or value that
        is not a setting."""
        override = os.environ.get("HEADRACE_SERVING", "")
        return cls.load(Path(override) if override else None)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.generators) - set(GENERATORS)):
            raise HeadraceError(f"serving settings: {', '.join(unknown)} is no generator; there are {', '.join(GENERATORS)}")

    @property
    def most_candidates(self) -> int:
        """Of one request to L1, however it comes."""
        return max(self.max_candidates, sum(int(limit) for limit in self.generators.values()))

    @classmethod
    def load(cls, override: Path | None = None) -> "Settings":
        values = _read(DEFAULTS)
        if override is not None:
            values |= _checked(override, _read(override), values)
        return cls(**values)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise HeadraceError(f"cannot read serving settings {path}: {error}") from error
    if not isinstance(values, dict):
        raise HeadraceError(f"{path} must hold `name: value` lines, got {type(values).__name__}")
    return values


def _checked(path: Path, values: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    known = [field.name for field in fields(Settings)]
    for name, value in values.items():
        if name not in known:
            raise HeadraceError(f"{path}: {name} is not a serving setting; settings are {', '.join(known)}")
        if isinstance(defaults[name], dict):
            if not isinstance(value, dict) or not all(_is_number(part) for part in value.values()):
                raise HeadraceError(f"{path}: {name} must map names to numbers, got {value!r}")
        elif not _is_number(value) or value < 0 or (isinstance(defaults[name], int) and int(value) != value):
            kind = "whole number" if isinstance(defaults[name], int) else "number"
            raise HeadraceError(f"{path}: {name} must be a {kind} of at least 0, got {value!r}")
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
