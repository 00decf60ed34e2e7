"""The dbt project as a manifest: which models there are, what they read, and what each of them means at the moment.

Parses the project as dbt does and runs nothing. `definition_of` is the Python form of the macro of the same name in
`macros/lake/lake_incremental.sql`; `tests/warehouse/test_plan.py` holds the two together.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import yaml

from warehouse.errors import HeadraceError
from warehouse.features.render import macros_digest
from warehouse.home import REPOSITORY, Home

MATERIALIZED = "lake_incremental"
_MEANINGFUL_VARIABLES = (
    "grace_seconds",
    "duplicate_memory_seconds",
    "furthest_ahead_seconds",
    "attribution_seconds",
    "log_partitions",
)


class Project:
    """The parsed project. nodes: dbt's own dictionaries by unique_id."""

    def __init__(self, nodes: dict[str, dict[str, Any]], variables: dict[str, Any]):
        self.nodes, self._variables = nodes, variables
        self._definitions: dict[str, str] = {}

    @classmethod
    def parse(cls, home: Home) -> "Project":
        """Parses the project of this checkout; its scratch is `<home>/tmp/parsed`. Raises HeadraceError with dbt's message."""
        from dbt.cli.main import dbtRunner

        folders = {"project-dir": REPOSITORY, "profiles-dir": REPOSITORY, "target-path": home.tmp / "parsed"}
        options = [word for name, folder in folders.items() for word in (f"--{name}", str(folder))]
        result = dbtRunner().invoke(["--quiet", "--log-level-file", "none", "parse", *options])
        if not result.success:
            raise HeadraceError(f"dbt cannot parse the project: {result.exception}")
        manifest: Any = result.result
        variables = yaml.safe_load((REPOSITORY / "dbt_project.yml").read_text())["vars"]
        return cls({name: node.to_dict(omit_none=False) for name, node in manifest.nodes.items()}, variables)

    def models(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(unique_id, node) of every table of the lake that dbt builds; what a model reads comes before it."""
        done: set[str] = set()

        def visit(unique_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
            node = self.nodes.get(unique_id)
            if node is None or unique_id in done:
                return
            done.add(unique_id)
            for read in node["depends_on"]["nodes"]:
                yield from visit(read)
            if node["config"]["materialized"] == MATERIALIZED:
                yield unique_id, node

        for unique_id, node in self.nodes.items():
            if node["resource_type"] == "model":
                yield from visit(unique_id)

    def inputs(self, unique_id: str) -> list[str]:
        """The tables of the lake that dbt builds and that this model reads, by unique_id."""
        reads = self.nodes[unique_id]["depends_on"]["nodes"]
        return [name for name in reads if self.nodes.get(name, {}).get("config", {}).get("materialized") == MATERIALIZED]

    def definition_of(self, unique_id: str) -> str:
        """A hash of what a table means: its code, its declaration, the algebra, and the same of every table it reads."""
        node = self.nodes.get(unique_id)
        if node is None:
            return ""
        if unique_id not in self._definitions:
            config = node["config"]
            declared = config["meta"].get("features")
            meaning = [pair for pair in declared.items() if pair[0] != "tests"] if isinstance(declared, dict) else declared
            parts = [node["raw_code"], json.dumps(meaning), json.dumps(config["meta"].get("attributes"))]
            parts += [json.dumps(config.get("partition_by")), macros_digest()]
            parts += [str(self._variables[name]) for name in _MEANINGFUL_VARIABLES]
            parts += [self.definition_of(read) for read in node["depends_on"]["nodes"]]
            self._definitions[unique_id] = hashlib.md5("|".join(parts).encode(), usedforsecurity=False).hexdigest()
        return self._definitions[unique_id]


def table_of(node: dict[str, Any]) -> str:
    """`namespace.table` of a model."""
    return f"{node['schema']}.{node['alias']}"
