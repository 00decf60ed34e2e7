{# One row, or none while a partition is silent: the last closed 5-minute boundary. A tick T is closed when every partition has been
   read past landed_at >= T + grace. Nothing here looks at event_ts: one phone a year ahead must not make everybody else late.
   A server reads this and its rows in one statement, so that both come from one checkpoint. #}
{{ config(materialized='materialized_view') }}

with read_through as (
    select
        log_partition,
        max(landed_at) as landed_at
    from {{ ref('arrivals') }}
    group by log_partition
)

select
    {{ newest_tick('min(landed_at)') }} as closed_tick
from read_through
having count(*) = {{ var('log_partitions') }}
