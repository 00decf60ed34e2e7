"""`--config FILE.yml`: sections named after models, `trainer`, and the seed; every key is checked against the settings it sets.

seed: 3
l2: {width: 32, heads: [click, long_view, like]}
trainer: {precision: bf16, accumulate: 2, validation_share: 0.05, patience: 4}
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from models_ml.distillation import DistillationConfig
from models_ml.floor import FloorConfig
from models_ml.item_to_item import ItemToItemConfig
from models_ml.l1 import L1Config
from models_ml.l2_network import L2Config
from models_ml.trainer.settings import TrainerSettings
from models_ml.two_tower import TwoTowerConfig
from warehouse.errors import HeadraceError


@dataclass(frozen=True)
class Configs:
    """One frozen setting per model, and how training is carried out."""

    item_to_item: ItemToItemConfig = field(default_factory=ItemToItemConfig)
    two_tower: TwoTowerConfig = field(default_factory=TwoTowerConfig)
    l1: L1Config = field(default_factory=L1Config)
    l2: L2Config = field(default_factory=L2Config)
    floor: FloorConfig = field(default_factory=FloorConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    trainer: TrainerSettings = field(default_factory=TrainerSettings)
    seed: int = 0

    def with_epochs(self, epochs: int) -> "Configs":
        """The same with another number of passes over the data for the networks."""
        changed = {name: replace(getattr(self, name), epochs=epochs) for name in ("two_tower", "l1", "l2")}
        return replace(self, **changed)


def read(path: Path) -> Configs:
    """Raises HeadraceError with the file and line of a section or key that is unknown, or a value of another type."""
    try:
        text = path.read_text()
        tree = yaml.compose(text, yaml.SafeLoader)
        values = yaml.safe_load(text) or {}
    except OSError as error:
        raise HeadraceError(f"configuration {path} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark else 1
        raise HeadraceError(f"{path}:{line}: not YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise HeadraceError(f"{path}:1: a configuration is sections such as `l2: {{width: 32}}`, got {type(values).__name__}")
    lines = _lines(tree)
    configs = Configs()
    known = {part.name for part in fields(Configs)}
    for name, given in values.items():
        if name not in known:
            raise HeadraceError(f"{path}:{lines[name,]}: unknown section {name!r}; there are {', '.join(sorted(known))}")
        value = given if name == "seed" else _changed(getattr(configs, name), given, name, path, lines)
        if name == "seed" and type(value) is not int:
            raise HeadraceError(f"{path}:{lines[name,]}: seed must be a whole number, got {value!r}")
        configs = replace(configs, **{name: value})
    return configs


def _changed(settings: Any, given: Any, section: str, path: Path, lines: Mapping[tuple, int]) -> Any:
    if not isinstance(given, dict):
        raise HeadraceError(f"{path}:{lines[section,]}: {section} must hold settings such as `epochs: 3`, got {given!r}")
    hints = get_type_hints(type(settings))
    changes = {}
    for name, value in given.items():
        where = f"{path}:{lines[section, name]}"
        if name not in hints:
            raise HeadraceError(f"{where}: {section} has no setting {name!r}; it has {', '.join(sorted(hints))}")
        now = getattr(settings, name)
        if isinstance(now, tuple):
            is_right = isinstance(value, list | dict)
            pairs = value.items() if isinstance(value, dict) else value if is_right else ()
            value = tuple(tuple(item) if isinstance(item, list | tuple) else item for item in pairs)
        elif isinstance(now, float):
            is_right = isinstance(value, int | float) and not isinstance(value, bool)
            value = float(value) if is_right else value
        else:
            is_right = type(value) is type(now)
        if not is_right:
            raise HeadraceError(f"{where}: {section}.{name} must be like {now!r}, got {value!r}")
        changes[name] = value
    try:
        return replace(settings, **changes)
    except ValueError as error:
        raise HeadraceError(f"{path}:{lines[section,]}: {section}: {error}") from error


def _lines(tree: Any) -> dict[tuple, int]:
    lines: dict[tuple, int] = {}
    for key, value in tree.value if isinstance(tree, yaml.MappingNode) else ():
        lines[key.value,] = key.start_mark.line + 1
        for inner, _ in value.value if isinstance(value, yaml.MappingNode) else ():
            lines[key.value, inner.value] = inner.start_mark.line + 1
    return lines
