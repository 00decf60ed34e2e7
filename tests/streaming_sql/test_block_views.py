"""Views of other rows than these declarations' blocks are told apart."""

import contextlib

import pytest

from streaming_sql.block_views import BlockViews
from streaming_sql.postgres_reader import PostgresReader
from tests.streaming_sql.postgres import postgres
from tests.streaming_sql.test_risingwave_models import GROUPS
from warehouse.errors import HeadraceError


def test_a_view_of_other_rows_is_said_by_its_name():
    with postgres("dev") as connection:
        views = BlockViews(GROUPS)
        columns = views.columns("note_engagement") | {"num_clicks": "varchar"}
        connection.execute(f"create table note_engagement ({', '.join(f'{name} {kind}' for name, kind in columns.items())})")
        connection.execute(
            "insert into note_engagement (note_id, block_start, known_at, num_clicks) values ('n', now(), now(), 'many')"
        )
        address = f"host={connection.info.host} user=postgres dbname=dev"
        with (
            contextlib.closing(PostgresReader(address)) as reader,
            pytest.raises(HeadraceError, match="the view note_engagement holds other rows than blocks"),
        ):
            views.rows(reader, "note_engagement", 0, 4 * 10**15, 0)
