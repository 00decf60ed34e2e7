{# One row per partition that has events: its newest one, by which a server knows whether the views read the log that it reads. Not of
   `arrivals`, which forgets: of a table that only grows, one row per partition is all the state there is. Dead letters are left out
   as there. #}
{{ config(materialized='materialized_view') }}

with placed as (
    select
        event_id,
        kafka_timestamp as landed_at,
        cast(kafka_partition as integer) as log_partition,
        cast(kafka_offset as bigint) as log_offset,
        row_number() over (partition by kafka_partition order by cast(kafka_offset as bigint) desc) as place
    from {{ ref('log_events') }}
    where
        {{ is_no_dead_letter() }}
        and event_type <> 'heartbeat'
)

select
    log_partition,
    log_offset,
    event_id,
    landed_at
from placed
where place <= 1
