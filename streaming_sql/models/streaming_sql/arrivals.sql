{# One row per record of the log, in the columns of lake.events, so that the staging SQL is the same text here and there.
   Dead letters are left out, as landing leaves them out of the lake.
   What landed so long ago that no window reaches it leaves too, here, before any view keeps state of it: RisingWave forgets what a
   temporal filter lets go. #}
{{ config(materialized='view') }}

select
    event_id,
    event_type,
    user_id,
    note_id,
    author_id,
    surface,
    request_id,
    impression_id,
    event_ts,
    kafka_timestamp as landed_at,
    cast(kafka_partition as integer) as log_partition,
    cast(kafka_offset as bigint) as log_offset,
    'log' as landing,
    retracts,
    cast(properties as varchar) as properties
from {{ ref('log_events') }}
where
    {{ is_no_dead_letter() }}
    and kafka_timestamp > now() - {{ kept_in_stream() }}
