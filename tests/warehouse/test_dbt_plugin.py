"""What one commit of a model leaves: the rows of exactly its range, and no gap, whatever was there before."""

from collections.abc import Iterable
from datetime import UTC, datetime

import pyarrow as pa
import pytest

from warehouse.dbt_plugin import BUILT_UNTIL, Plugin
from warehouse.errors import HeadraceError
from warehouse.events import TIMESTAMP
from warehouse.features.declarations import load_groups
from warehouse.lake import Lake

NAME = "features.clicks"


def day(number: int) -> datetime:
    return datetime(2026, 1, number, tzinfo=UTC)


def rows(value: str, *days: int, column: str = "value") -> pa.Table:
    return pa.table(
        {"known_at": pa.array([day(number) for number in days], TIMESTAMP), column: pa.array([value] * len(days), pa.string())}
    )


@pytest.fixture
def plugin(home, lake) -> Plugin:
    """The plugin as it is once dbt has opened a connection; events landed from the second of January on."""
    plugin = Plugin.__new__(Plugin)
    plugin.lake = lake
    plugin.groups, plugin.first_arrival = load_groups(), day(2)
    return plugin


def commit(plugin: Plugin, built: pa.Table | Iterable[pa.Table], start: int, end: int, definition: str = "first") -> None:
    config = {
        "event_time": "known_at",
        "partition_by": {"known_at": "day"},
        "definition": definition,
        "start": day(start).isoformat(),
        "end": day(end).isoformat(),
    }
    plugin._commit(NAME, iter([built] if isinstance(built, pa.Table) else built), config)


def content(lake: Lake) -> list[tuple[int, str]]:
    return sorted((row["known_at"].day, row["value"]) for row in lake.scan(NAME).to_pylist())


def built_until(lake: Lake) -> datetime:
    return datetime.fromisoformat(lake.table(NAME).properties[BUILT_UNTIL])


def test_history_then_the_live_end_append(plugin, lake):
    commit(plugin, rows("a", 2, 3), 1, 4)
    commit(plugin, rows("b", 4), 4, 5)
    assert content(lake) == [(2, "a"), (3, "a"), (4, "b")]
    assert built_until(lake) == day(5)
    assert len(lake.table(NAME).metadata.snapshots) == 2


def test_a_repair_replaces_its_range_and_nothing_else(plugin, lake):
    commit(plugin, rows("a", 2, 3, 4), 1, 5)
    commit(plugin, rows("b", 3), 3, 4)
    commit(plugin, rows("b", 3), 3, 4)
    assert content(lake) == [(2, "a"), (3, "b"), (4, "a")]
    assert built_until(lake) == day(5)


def test_a_range_without_rows_is_built_all_the_same(plugin, lake):
    commit(plugin, rows("a", 2), 1, 3)
    commit(plugin, rows("a"), 3, 6)
    assert content(lake) == [(2, "a")]
    assert built_until(lake) == day(6)
    commit(plugin, rows("a"), 2, 3)
    assert content(lake) == []


def test_another_definition_replaces_rows_and_columns(plugin, lake):
    commit(plugin, rows("a", 2, 3), 1, 4)
    commit(plugin, rows("b", 2, column="other"), 1, 4, definition="second")
    assert lake.scan(NAME).to_pylist() == [{"known_at": day(2), "other": "b"}]
    assert lake.scan(NAME).column_names == ["known_at", "other"]


def test_a_build_that_would_leave_a_gap_is_refused_and_changes_nothing(plugin, lake):
    with pytest.raises(HeadraceError, match=r"not built by this definition yet.* would leave a gap: run dbt without"):
        commit(plugin, rows("a", 3), 3, 4)
    assert not lake.exists(NAME)
    commit(plugin, rows("a", 2), 2, 3)
    before = lake.table(NAME).metadata
    with pytest.raises(HeadraceError, match=r"is built until 2026-01-03.*a build from 2026-01-05.* would leave a gap"):
        commit(plugin, rows("a", 5), 5, 6)
    with pytest.raises(HeadraceError, match="not built by this definition yet"):
        commit(plugin, rows("b", 3), 3, 4, definition="second")
    assert lake.table(NAME).metadata == before


def test_chunks_are_one_commit_and_one_snapshot(plugin, lake):
    commit(plugin, [rows("a", 2, 3), rows("b", 3), rows("c"), rows("d", 4)], 1, 5)
    assert content(lake) == [(2, "a"), (3, "a"), (3, "b"), (4, "d")]
    table = lake.table(NAME)
    assert len(table.metadata.snapshots) == 1
    assert len({file["file_path"] for file in table.inspect.files().to_pylist()}) == 4


def test_a_chunk_that_cannot_be_computed_leaves_the_table_as_it_was(plugin, lake):
    def chunks():
        yield rows("b", 2)
        raise HeadraceError("no more")

    commit(plugin, rows("a", 2, 3), 1, 4)
    before = lake.table(NAME).metadata
    with pytest.raises(HeadraceError, match="no more"):
        commit(plugin, chunks(), 1, 4, definition="second")
    assert lake.table(NAME).metadata == before


def test_an_interrupted_commit_leaves_the_table_as_it_was(plugin, lake, monkeypatch):
    commit(plugin, rows("a", 2, 3), 1, 4)
    before = lake.table(NAME).metadata
    monkeypatch.setattr(
        "pyiceberg.table.Transaction.set_properties", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )  # the last step before the commit
    with pytest.raises(KeyboardInterrupt):
        commit(plugin, rows("b", 2), 1, 4, definition="second")
    assert lake.table(NAME).metadata == before
    assert content(lake) == [(2, "a"), (3, "a")]
