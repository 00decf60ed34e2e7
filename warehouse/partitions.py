"""Which partition of an Iceberg table rows are of."""

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.partitioning import PartitionFieldValue, PartitionKey
from pyiceberg.table.metadata import TableMetadata


def only_partition(metadata: TableMetadata, rows: pa.Table) -> PartitionKey | None:
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
