"""The Parquet files that an Iceberg table is made of, of which each manifest is read once: neither ever changes."""

from pyiceberg.manifest import ManifestContent
from pyiceberg.table import Table


class DataFiles:
    """Of one table. Not thread-safe."""

    def __init__(self) -> None:
        self._snapshot_id: int | None = None
        self._of_manifest: dict[str, list[str]] = {}
        self._paths: list[str] | None = []

    def of(self, table: Table) -> list[str] | None:
        """Paths of the current snapshot's files; None where they are not the table: rows deleted apart, changed columns."""
        if len(table.metadata.schemas) > 1:
            return None
        snapshot = table.current_snapshot()
        if snapshot is None:
            return []
        if snapshot.snapshot_id != self._snapshot_id:
            found, has_deletes = {}, False
            for manifest in snapshot.manifests(table.io):
                entries = self._of_manifest.get(manifest.manifest_path)
                if entries is None:
                    live = manifest.fetch_manifest_entry(table.io)
                    entries = [entry.data_file.file_path.removeprefix("file://") for entry in live]
                has_deletes |= manifest.content == ManifestContent.DELETES and bool(entries)
                found[manifest.manifest_path] = entries
            self._snapshot_id, self._of_manifest = snapshot.snapshot_id, found
            self._paths = None if has_deletes else [path for entries in found.values() for path in entries]
        return self._paths
