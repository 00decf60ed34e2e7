"""Data files of a table, of rows that come part by part: each part is a row group, encoded at once, so that none waits in
memory for the others. No snapshot names the files before they are added (`Lake.add_files`).

Texts may come as Arrow's dictionaries, at any depth: they are written as they are, as Parquet's, and never made. Who reads the
file sees texts.
"""

import contextlib
import io
import itertools
import uuid

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.io import FileIO, OutputFile
from pyiceberg.io.fileformat import FileFormatFactory, FileFormatWriter
from pyiceberg.io.pyarrow import (
    PYARROW_PARQUET_FIELD_ID_KEY,
    _check_pyarrow_schema_compatible,
    _dataframe_to_data_files,
    _to_requested_schema,
    pyarrow_to_schema,
)
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.partitioning import PartitionFieldValue, PartitionKey
from pyiceberg.schema import Schema, sanitize_column_names
from pyiceberg.table import TableProperties, WriteTask
from pyiceberg.table.locations import load_location_provider
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.types import IcebergType, ListType, MapType, NestedField, StructType

_PARQUET = FileFormatFactory.get(FileFormat.PARQUET)
_LARGE = TableProperties.WRITE_TARGET_FILE_SIZE_BYTES_DEFAULT
"""Bytes of rows in memory; a file has fewer."""


class FileWriter:
    """Use `close` or `discard` once. Parts of one partition that follow each other share a file until it is large."""

    def __init__(self, metadata: TableMetadata, io: FileIO):
        self._metadata, self._io = metadata, io
        self._write_uuid, self._numbers = uuid.uuid4(), itertools.count()
        self._done: list[DataFile] = []
        self._open: _OpenFile | None = None

    def write(self, rows: pa.Table) -> None:
        """One part. Raises ValueError if its columns are not the table's; what was written before stays."""
        plain = _without_dictionaries(rows.schema)
        _check_pyarrow_schema_compatible(self._metadata.schema(), plain, format_version=self._metadata.format_version)
        if rows.num_rows == 0:
            return
        key = _only_partition(self._metadata, rows)
        if key is None or rows.nbytes >= _LARGE:  # of several partitions, or of a table without: files of their own
            rows = rows.cast(plain)
            self._done += _dataframe_to_data_files(self._metadata, rows, self._io, self._write_uuid, self._numbers)
            return
        if self._open is not None and (not self._open.takes(key, rows.schema) or self._open.num_bytes >= _LARGE):
            self._finish()
        if self._open is None:
            self._open = _OpenFile(self._metadata, self._io, key, self._write_uuid, next(self._numbers), rows.schema)
        self._open.write(rows)

    def close(self) -> list[DataFile]:
        """The files of all parts."""
        self._finish()
        return self._done

    def discard(self) -> None:
        """Leaves no file."""
        with contextlib.suppress(Exception):  # what cannot be ended can be deleted
            self._finish()
        for path in [*(file.file_path for file in self._done), *([self._open.path] if self._open else [])]:
            with contextlib.suppress(OSError):
                self._io.delete(path)
        self._done, self._open = [], None

    def _finish(self) -> None:
        if self._open is not None:
            self._done.append(self._open.finished())
            self._open = None


class _OpenFile:
    """What pyiceberg's `write_file` does, which wants all rows at once, of rows of one partition: its way to them would filter
    them first, and a copy of rows that hold lists of structs costs as much as writing them."""

    def __init__(
        self, metadata: TableMetadata, io: FileIO, key: PartitionKey, write_uuid: uuid.UUID, number: int, of_rows: pa.Schema
    ):
        """of_rows: of all rows that will be written."""
        self._key, self._metadata, self._schema = key, metadata, sanitize_column_names(metadata.schema())
        name = WriteTask(write_uuid, number, self._schema, []).generate_data_file_filename(_PARQUET.file_extension())
        self.path = load_location_provider(metadata.location, metadata.properties).new_data_location(name, key)
        self.num_bytes = 0
        self._output: OutputFile = io.new_output(self.path)
        self._writer: FileFormatWriter = _PARQUET.create_writer(self._output, self._schema, metadata.properties)
        self._of_rows, self._of_file = of_rows, None
        if any(_holds_dictionaries(field.type) for field in of_rows):
            self._of_file = _with_ids(of_rows, metadata.schema())
            self._writer._parquet_writer_kwargs |= {  # type: ignore[attr-defined]
                "store_schema": False,  # else the file says that its texts are dictionaries, which pyiceberg does not read
                "use_dictionary": _columns_of_texts(self._of_file),  # numbers seldom repeat, and looking takes a sixth of all
            }

    def takes(self, key: PartitionKey, of_rows: pa.Schema) -> bool:
        return key == self._key and of_rows == self._of_rows

    def write(self, rows: pa.Table) -> None:
        batches = rows.combine_chunks().to_batches()
        if self._of_file is None:
            mapping, version = self._metadata.schema().name_mapping, self._metadata.format_version
            schema = pyarrow_to_schema(rows.schema, name_mapping=mapping, format_version=version)
            batches = [
                _to_requested_schema(self._schema, schema, batch, include_field_ids=True, format_model=_PARQUET)
                for batch in batches
            ]
        self._writer.write(pa.Table.from_batches(batches, self._of_file))
        self.num_bytes += rows.nbytes

    def finished(self) -> DataFile:
        statistics = self._writer.close()
        return DataFile.from_args(
            content=DataFileContent.DATA,
            file_path=self.path,
            file_format=FileFormat.PARQUET,
            partition=self._key.partition,
            file_size_in_bytes=len(self._output),
            sort_order_id=None,
            spec_id=self._metadata.default_spec_id,
            equality_ids=None,
            key_metadata=None,
            **statistics.to_serialized_dict(),
        )


def _only_partition(metadata: TableMetadata, rows: pa.Table) -> PartitionKey | None:
    """The partition that all rows are of; None for several, and for a table without partitions."""
    schema, spec, values = metadata.schema(), metadata.spec(), []
    for field in spec.fields:
        name = schema.find_column_name(field.source_id)
        if name not in rows.column_names:
            return None
        transform = field.transform.pyarrow_transform(schema.find_field(field.source_id).field_type)
        found = pc.unique(transform(rows[name]))
        if len(found) != 1:
            return None
        values.append(PartitionFieldValue(field, found[0].as_py()))
    return PartitionKey(values, spec, schema) if values else None


def _without_dictionaries(schema: pa.Schema) -> pa.Schema:
    """With texts where there are dictionaries of texts."""
    fields = [field.with_type(_plain(field.type)) if _holds_dictionaries(field.type) else field for field in schema]
    return pa.schema(fields, schema.metadata)


def _holds_dictionaries(kind: pa.DataType) -> bool:
    within = (kind.field(place).type for place in range(kind.num_fields))
    return pa.types.is_dictionary(kind) or any(map(_holds_dictionaries, within))


def _columns_of_texts(schema: pa.Schema) -> list[str]:
    """Their names in a Parquet file."""
    file = io.BytesIO()
    pq.write_table(schema.empty_table(), file)
    columns = pq.read_metadata(file).schema
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _plain(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return kind.value_type
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_plain(field.type)) for field in kind])
    if pa.types.is_map(kind):
        return pa.map_(*(field.with_type(_plain(field.type)) for field in (kind.key_field, kind.item_field)))
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _with_ids(schema: pa.Schema, of_table: Schema) -> pa.Schema:
    """With the number of each field, by which readers know it."""
    return pa.schema([_with_id(field, of_table.find_field(field.name)) for field in schema])


def _with_id(field: pa.Field, told: NestedField) -> pa.Field:
    kind = _with_ids_within(field.type, told.field_type)
    return field.with_type(kind).with_metadata({PYARROW_PARQUET_FIELD_ID_KEY: str(told.field_id)})


def _with_ids_within(kind: pa.DataType, told: IcebergType) -> pa.DataType:
    if isinstance(told, StructType):
        of_name = {field.name: field for field in told.fields}
        return pa.struct([_with_id(field, of_name[field.name]) for field in kind])
    if isinstance(told, MapType):
        return pa.map_(_with_id(kind.key_field, told.key_field), _with_id(kind.item_field, told.value_field))
    if isinstance(told, ListType):
        return pa.list_(_with_id(kind.value_field, told.element_field))
    return kind
