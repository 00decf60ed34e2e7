"""Keeps the lake small: many small files into few sorted ones, old snapshots away, files that no snapshot names found.

No row changes. Compaction writes the new files first and swaps them for the old ones in one commit of metadata, so that writers
beside it lose nothing: their appends stay, and where one replaced the very files that were compacted, the new ones are thrown
away and the user is told. What a newest snapshot says beside its rows (how far the log has landed) is said again by the commit.
"""

import contextlib
import fcntl
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pyiceberg.exceptions import CommitFailedException, ValidationException
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.io.pyarrow import ArrowScan, _dataframe_to_data_files
from pyiceberg.manifest import DataFile
from pyiceberg.table import FileScanTask, Table

from warehouse.builds import BUILD_SECONDS
from warehouse.errors import HeadraceError
from warehouse.features.declarations import FeatureGroup
from warehouse.features.meanings import block_tables
from warehouse.home import Home
from warehouse.lake import BUILT_UNTIL, Lake
from warehouse.landing import EVENTS, POSITION, landed_position_of, only_writer

SMALL_BYTES = 32 << 20
"""A file below this is worth merging with its neighbours in the partition."""
ATTEMPTS = 5
BUILD_WAIT_S = 30.0


@dataclass(frozen=True)
class Compacted:
    """What compaction did to one table; files_before == files_after: nothing was worth doing."""

    table: str
    rows: int
    files_before: int
    files_after: int


@dataclass(frozen=True)
class Expired:
    """Snapshots that a table no longer keeps, and the files that only those named."""

    table: str
    snapshots: int
    files: int
    bytes: int


@dataclass(frozen=True)
class Orphan:
    """A file under the warehouse that no snapshot of any table names. modified: UTC."""

    path: Path
    bytes: int
    modified: datetime


def compact(lake: Lake, home: Home, name: str, groups: Mapping[str, FeatureGroup]) -> Compacted:
    """Rewrites the small files of each partition as few, sorted so that one key range (blocks) or one stretch of the log
    (events) lies together; rows of equal sort key keep their order. One commit.

    Raises HeadraceError if a writer replaced the same files meanwhile, or a dbt build holds a table that dbt builds.
    """
    table = lake.table(name)
    tasks = [task for task in table.scan().plan_files()]
    worth = [files for files in _by_partition(table, tasks).values() if len(files) > 1]
    if not worth:
        return Compacted(name, 0, len(tasks), len(tasks))
    schema, order = table.schema(), _order(name, groups)
    added: list[DataFile] = []
    rows = 0
    try:
        for files in worth:
            scan = ArrowScan(table.metadata, table.io, schema, AlwaysTrue())
            merged = scan.to_table(sorted(files, key=lambda task: task.file.partition[0] if task.file.partition else 0))
            rows += merged.num_rows
            if order:
                merged = merged.sort_by([(column, "ascending") for column in order])
            added.extend(_dataframe_to_data_files(table.metadata, merged, table.io))
        _swap(lake, home, name, [task.file for files in worth for task in files], added)
    except BaseException:
        _remove(file.file_path for file in added)
        raise
    return Compacted(name, rows, len(tasks), len(tasks) - sum(map(len, worth)) + len(added))


def expire(lake: Lake, name: str, before: datetime, dry_run: bool = False) -> Expired:
    """Forgets snapshots older than `before`, and removes the files that only those named. The current snapshot stays, and so do
    those that say how far the log has landed. Readers that are pinned to an older snapshot break: leave them time."""
    table = lake.table(name)
    kept = _needed(table)
    old = [
        s.snapshot_id
        for s in table.metadata.snapshots
        if s.timestamp_ms < before.timestamp() * 1000 and s.snapshot_id not in kept
    ]
    going = _files_of(table, old)
    going -= _files_of(table, [s.snapshot_id for s in table.metadata.snapshots if s.snapshot_id not in old])
    going |= _old_metadata(table, before)
    size = sum(path.stat().st_size for path in going if path.exists())
    if not dry_run:
        if old:
            table.maintenance.expire_snapshots().by_ids(old).commit()
            table = lake.table(name)
            going -= _files_of(table, [s.snapshot_id for s in table.metadata.snapshots])
        _remove(str(path) for path in going)
    return Expired(name, len(old), len(going), size)


def orphans(lake: Lake, older_than: timedelta = timedelta(days=1), now: datetime | None = None) -> list[Orphan]:
    """Files under the warehouse folder that no snapshot of any table names: what an interrupted or failed write left. Younger
    ones may belong to a write under way and are not listed."""
    latest = (now or datetime.now(UTC)) - older_than
    named: set[Path] = set()
    for name in lake.tables():
        table = lake.table(name)
        named |= _files_of(table, [snapshot.snapshot_id for snapshot in table.metadata.snapshots])
        named |= {_local(table.metadata_location), *(_local(entry.metadata_file) for entry in table.metadata.metadata_log)}
        named |= {_local(statistics.statistics_path) for statistics in table.metadata.statistics}
    found = []
    for path in sorted((lake.folder / "warehouse").rglob("*")):
        if path.is_file() and path not in named:
            stat = path.stat()
            modified = datetime.fromtimestamp(stat.st_mtime, UTC)
            if modified < latest:
                found.append(Orphan(path, stat.st_size, modified))
    return found


def remove_orphans(found: Iterable[Orphan]) -> None:
    _remove(str(orphan.path) for orphan in found)


def _by_partition(table: Table, tasks: Iterable[FileScanTask]) -> dict[tuple, list[FileScanTask]]:
    groups: dict[tuple, list[FileScanTask]] = defaultdict(list)
    for task in tasks:
        if task.delete_files:
            raise HeadraceError(
                f"{'.'.join(table.name())} has delete files, which compaction cannot apply; no table here makes any"
            )
        if task.file.spec_id == table.spec().spec_id and task.file.file_size_in_bytes < SMALL_BYTES:
            groups[tuple(task.file.partition[i] for i in range(len(task.file.partition)))].append(task)
    return groups


def _order(name: str, groups: Mapping[str, FeatureGroup]) -> tuple[str, ...]:
    """The columns that a table's files are sorted by; none keeps the order in which rows were written."""
    if name == EVENTS:
        return ("landed_at", "log_partition", "log_offset")
    for group in groups.values():
        if name.rpartition(".")[2] in block_tables(group.name):
            return (*group.keys, "block_start", "known_at")
    return ()


def _swap(lake: Lake, home: Home, name: str, old: list[DataFile], new: list[DataFile]) -> None:
    """The old files for the new ones, in one commit, however many appends come between."""
    with _no_other_writer(lake, home, name):
        for attempt in range(ATTEMPTS):
            table = lake.table(name)
            live = {task.file.file_path for task in table.scan().plan_files()}
            if gone := [file for file in old if file.file_path not in live]:
                raise HeadraceError(
                    f"{name}: {len(gone)} of {len(old)} files were replaced while they were compacted; "
                    "nothing was lost and nothing changed: run the same command again"
                )
            try:
                with (
                    table.transaction() as transaction,
                    transaction.update_snapshot(snapshot_properties=_said_again(table)).overwrite() as overwrite,
                ):
                    for file in old:
                        overwrite.delete_data_file(file)
                    for file in new:
                        overwrite.append_data_file(file)
                return
            except (CommitFailedException, ValidationException):
                time.sleep(0.1 * 2**attempt)
    raise HeadraceError(f"{name}: other writers were faster {ATTEMPTS} times; nothing changed: run the same command again")


@contextlib.contextmanager
def _no_other_writer(lake: Lake, home: Home, name: str) -> Iterator[None]:
    """While metadata is swapped, which takes no longer than any commit, nobody else replaces files or moves the position."""
    if name == EVENTS:
        with only_writer(lake):
            yield
    elif BUILT_UNTIL in lake.table(name).properties:
        with open(home.dbt / "build.lock", "a") as handle:
            _wait_for_build(handle.fileno(), name)
            yield
    else:
        yield


def _wait_for_build(handle: int, name: str) -> None:
    deadline = time.monotonic() + BUILD_WAIT_S
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise HeadraceError(
                    f"a dbt command runs and may write {name}; nothing changed: try again when it is done"
                ) from None
            time.sleep(0.1)


def _said_again(table: Table) -> dict[str, str]:
    """What the current snapshot says beside its rows, and the position of the log, which may be said further back."""
    snapshot = table.current_snapshot()
    beside = snapshot.summary.additional_properties if snapshot and snapshot.summary else {}
    kept = {key: value for key, value in beside.items() if key.startswith("headrace.") and key != BUILD_SECONDS}
    position = landed_position_of(table)
    return kept | ({POSITION: position} if position else {})


def _needed(table: Table) -> set[int]:
    """Snapshots that must stay: heads, and those from the current one back to the one that holds the log's position."""
    kept = {reference.snapshot_id for reference in table.metadata.refs.values()}
    if landed_position_of(table):
        snapshot = table.current_snapshot()
        while snapshot is not None:
            kept.add(snapshot.snapshot_id)
            if snapshot.summary and POSITION in snapshot.summary.additional_properties:
                break
            snapshot = table.snapshot_by_id(snapshot.parent_snapshot_id) if snapshot.parent_snapshot_id else None
    return kept


def _files_of(table: Table, snapshot_ids: Iterable[int]) -> set[Path]:
    """Manifest lists, manifests and live data files that these snapshots name."""
    files: set[Path] = set()
    read: set[str] = set()
    for snapshot_id in snapshot_ids:
        snapshot = table.snapshot_by_id(snapshot_id)
        if snapshot is None:
            continue
        files.add(_local(snapshot.manifest_list))
        for manifest in snapshot.manifests(table.io):
            if manifest.manifest_path not in read:
                read.add(manifest.manifest_path)
                files.add(_local(manifest.manifest_path))
                entries = manifest.fetch_manifest_entry(table.io, discard_deleted=True)
                files |= {_local(entry.data_file.file_path) for entry in entries}
    return files


def _old_metadata(table: Table, before: datetime) -> set[Path]:
    """Metadata files older than `before` that are not the current one: each commit leaves one behind."""
    current = _local(table.metadata_location)
    return {
        path for path in current.parent.glob("*.metadata.json") if path != current and path.stat().st_mtime < before.timestamp()
    }


def _local(location: str) -> Path:
    return Path(location.removeprefix("file://"))


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path.removeprefix("file://"))
