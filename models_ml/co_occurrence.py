"""Directed item-to-item counts with decay, as one SQL statement on DuckDB, over any relation of sequences.

Whenever b comes after a within `window` places of one sequence, the pair (a, b) gains decay ** (places between - 1): directed,
so b is a neighbour of a and not the reverse. A pair's score is

    weight(a, b) / (support(a) ** normalise_from * support(b) ** normalise_to)

with support(x) = how often x occurs in the sequences. Source of the idea: Linden, Smith and York, IEEE Internet Computing 2003;
directed and decayed as in session-based kNN (Ludewig and Jannach, UMUAI 2018).
"""

from collections.abc import Mapping

import duckdb
import pyarrow as pa

_NEIGHBOURS = """
support as (
    select note_id, count(*) as num_occurrences
    from occurrences
    group by note_id
),

pairs as (
    select
        earlier.note_id,
        later.note_id as neighbour_id,
        -- sums of doubles depend on their order; rounded to whole millionths they do not
        sum(round(1e6 * pow($decay, later.place - earlier.place - 1))::bigint) / 1e6 as weight
    from occurrences as earlier
    inner join occurrences as later
        on later.user_id = earlier.user_id and later.place > earlier.place and later.place <= earlier.place + $window
    where later.note_id != earlier.note_id
    group by earlier.note_id, later.note_id
),

scored as (
    select
        pairs.note_id,
        pairs.neighbour_id,
        pairs.weight / (
            pow(source.num_occurrences, $normalise_from) * pow(target.num_occurrences, $normalise_to)
        ) as score
    from pairs
    inner join support as source on pairs.note_id = source.note_id
    inner join support as target on pairs.neighbour_id = target.note_id
),

ranked as (
    select note_id, neighbour_id, score, row_number() over (partition by note_id order by score desc, neighbour_id) as place
    from scored
)

select note_id, neighbour_id, score::float as score
from ranked
where place <= $neighbours
order by note_id, place
"""


def neighbours(connection: duckdb.DuckDBPyConnection, occurrences_ctes: str, parameters: Mapping[str, float | int]) -> pa.Table:
    """One row per (note_id, neighbour_id): `score` (float32), best first within a note; ties by neighbour_id.

    occurrences_ctes: `name as (…)` expressions, the last of them `occurrences` with user_id, note_id and place (ascending in
    a user). parameters: window, decay, normalise_from, normalise_to and neighbours (kept per note).
    """
    return connection.execute(f"with {occurrences_ctes},\n{_NEIGHBOURS}", dict(parameters)).to_arrow_table()
