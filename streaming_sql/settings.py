"""The stream's dials: one frozen dataclass, read from `settings.yml` and, over it, from the file HEADRACE_STREAM names."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from streaming_sql.lander import LanderSettings
from streaming_sql.runner import RunnerSettings
from warehouse.errors import HeadraceError
from warehouse.time_algebra import SECOND_US

DEFAULTS = Path(__file__).with_name("settings.yml")


@dataclass(frozen=True)
class StreamSettings:
    """Meanings and units stand beside the values in `settings.yml`."""

    event_log: str
    read_limit: int
    heartbeat_idle_s: float
    land_rows: int
    land_age_s: float
    land_heartbeats_age_s: float
    keep_log_s: float
    keep_log_bytes: int

    @classmethod
    def from_env(cls) -> "StreamSettings":
        """The defaults, with what the file in `$HEADRACE_STREAM` says instead, and the log that `$HEADRACE_EVENT_LOG` names.
        Raises HeadraceError for a name or value that is not a setting."""
        override = os.environ.get("HEADRACE_STREAM", "")
        values = _read(DEFAULTS)
        if override:
            values |= _checked(Path(override), values)
        if event_log := os.environ.get("HEADRACE_EVENT_LOG", "").strip():
            values["event_log"] = event_log
        return cls(**values)

    def runner(self) -> RunnerSettings:
        lander = LanderSettings(
            self.land_rows,
            round(self.land_age_s * SECOND_US),
            round(self.land_heartbeats_age_s * SECOND_US),
            round(self.keep_log_s * SECOND_US),
            self.keep_log_bytes,
        )
        return RunnerSettings(self.read_limit, heartbeat_idle_us=round(self.heartbeat_idle_s * SECOND_US), lander=lander)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise HeadraceError(f"cannot read stream settings {path}: {error}") from error
    if not isinstance(values, dict):
        raise HeadraceError(f"{path} must hold `name: value` lines, got {type(values).__name__}")
    return values


def _checked(path: Path, defaults: dict[str, Any]) -> dict[str, Any]:
    values = _read(path)
    known = [field.name for field in fields(StreamSettings)]
    for name, value in values.items():
        if name not in known:
            raise HeadraceError(f"{path}: {name} is not a stream setting; settings are {', '.join(known)}")
        default = defaults[name]
        if isinstance(default, str):
            if not isinstance(value, str):
                raise HeadraceError(f"{path}: {name} must be text, got {value!r}")
        elif (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or value <= 0
            or isinstance(value, float) > isinstance(default, float)
        ):
            kind = "whole number" if isinstance(default, int) else "number"
            raise HeadraceError(f"{path}: {name} must be a {kind} above 0, got {value!r}")
    return values
