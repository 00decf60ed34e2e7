"""The cascade's dials: one frozen dataclass, read from `settings.yml` and, over it, from the file HEADRACE_SERVING names."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from serving.placing import METHODS
from serving.policy import COLD_START, EXPLORATION, PROMOTED, Rules
from serving.retrieve import GENERATORS
from warehouse.errors import HeadraceError

DEFAULTS = Path(__file__).with_name("settings.yml")
EMBEDDED, RISINGWAVE = "embedded", "risingwave"


@dataclass(frozen=True)
class Settings:
    """Meanings and units stand beside the values in `settings.yml`."""

    features: str
    features_timeout_ms: float
    features_look_s: float
    features_head_events: int
    generators: Mapping[str, int]
    l1_top_k: int
    page_size: int
    max_notes_per_author: int
    max_notes_per_topic: int
    diversity: str
    diversity_strength: float
    diversity_window: int
    max_displacement: int
    promoted_notes: Sequence[str]
    promoted_positions: Sequence[int]
    cold_start_hours: float
    cold_start_positions: Sequence[int]
    exploration_positions: Sequence[int]
    exploration_share: float
    blocked_notes: Sequence[str]
    blocked_authors: Sequence[str]
    blocked_topics: Sequence[str]
    head_weights: Mapping[str, float]
    deadline_ms: float
    last_pages: int
    last_page_minutes: float
    seen_per_user: int
    item_to_item_seeds: int
    trending_feature: str
    topic_seeds: int
    vector_shards: int
    hnsw_from: int
    logged_share: float
    forward_log_queue: int
    forward_log_rows: int
    forward_log_age_s: float
    cached_readers: int
    candidate_cache_s: float
    l1_cache_s: float
    user_cache_s: float
    recent_requests: int
    inference_threads: int
    side_by_side: int
    waiting_requests: int
    max_candidates: int
    max_body_bytes: int
    waiting_events: int
    max_log_bytes: int

    @classmethod
    def from_env(cls) -> "Settings":
        """The defaults, with what the file in `$HEADRACE_SERVING` says instead, and `features` of `$HEADRACE_FEATURES`.
        Raises HeadraceError for a name or value that is not a setting."""
        override = os.environ.get("HEADRACE_SERVING", "")
        settings = cls.load(Path(override) if override else None)
        features = os.environ.get("HEADRACE_FEATURES", "").strip()
        return replace(settings, features=features) if features else settings

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.generators) - set(GENERATORS)):
            raise HeadraceError(f"serving settings: {', '.join(unknown)} is no generator; there are {', '.join(GENERATORS)}")
        if self.features not in (EMBEDDED, RISINGWAVE):
            raise HeadraceError(
                f"serving settings: features (or HEADRACE_FEATURES) must be {EMBEDDED} or {RISINGWAVE}, got {self.features!r}"
            )
        if self.diversity not in METHODS:
            raise HeadraceError(f"serving settings: diversity must be one of {', '.join(METHODS)}, got {self.diversity!r}")
        if self.vector_shards < 1:
            raise HeadraceError(f"serving settings: vector_shards must be at least 1, got {self.vector_shards}")
        if self.exploration_share > 1:
            raise HeadraceError(f"serving settings: exploration_share is a probability, got {self.exploration_share}")

    @cached_property
    def rules(self) -> Rules:
        """The part of the settings that the policy goes by."""
        slots = dict.fromkeys(self.exploration_positions, EXPLORATION)
        slots |= dict.fromkeys(self.cold_start_positions, COLD_START)
        slots |= dict.fromkeys(self.promoted_positions, PROMOTED)
        return Rules(
            self.max_notes_per_author,
            self.max_notes_per_topic,
            self.diversity,
            self.diversity_strength,
            self.diversity_window,
            self.max_displacement,
            slots,
            self.exploration_share,
        )

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
        elif isinstance(defaults[name], str):
            if not isinstance(value, str):
                raise HeadraceError(f"{path}: {name} must be a word, got {value!r}")
        elif isinstance(defaults[name], list):
            is_position = name.endswith("_positions")
            kind = "positions of the page, counted from 0" if is_position else "ids"
            if not isinstance(value, list) or not all((_is_position if is_position else _is_text)(part) for part in value):
                raise HeadraceError(f"{path}: {name} must be a list of {kind}, got {value!r}")
        elif not _is_number(value) or value < 0 or (isinstance(defaults[name], int) and int(value) != value):
            kind = "whole number" if isinstance(defaults[name], int) else "number"
            raise HeadraceError(f"{path}: {name} must be a {kind} of at least 0, got {value!r}")
    return values


def _is_position(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
