"""What dbt would supply while a model renders, for sqlfluff's jinja templater: variables with their real values.

sqlfluff puts the public names of this package into the context of every model (`library_path` in .sqlfluff). Its own
stand-ins for `ref`, `source`, `config` and `is_incremental` do; its `var` gives text, which no macro can calculate with.
"""

from pathlib import Path as _Path

import yaml as _yaml

_PROJECT = _Path(__file__).resolve().parents[3] / "dbt_project.yml"
_VARIABLES = _yaml.safe_load(_PROJECT.read_text())["vars"] if _PROJECT.exists() else {}


def var(name: str, default: object = None) -> object:
    """The value of a variable of dbt_project.yml, or `default`. Raises KeyError for a name that is neither."""
    if name not in _VARIABLES and default is None:
        raise KeyError(f"dbt_project.yml has no variable {name!r}")
    return _VARIABLES.get(name, default)
