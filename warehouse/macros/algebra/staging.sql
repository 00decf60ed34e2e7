{# First arrivals: rows of the event log, typed, each event_id once, with the tick that first knows them.

   An arrival is a duplicate if the same event_id arrived before it within the duplicate memory H, in the order (landed_at,
   log_partition, log_offset); the first wins with its whole row, before any filter. `arrived_from` and `arrived_until` (SQL
   expressions, optional) narrow the arrivals that are read: give H and F of room before the first row wanted. #}
{% macro first_arrivals(events, arrived_from=none, arrived_until=none) -%}
with arrivals as (
{{ arrivals(events, arrived_from, arrived_until) }}
),

remembered as (
    select
        *,
        lag(landed_at) over (partition by event_id order by landed_at, log_partition, log_offset) as previous_landed_at
    from arrivals
),

typed as (
    select
        {{ typed_columns() }}
    from remembered
    where
        previous_landed_at is null
        or landed_at > previous_landed_at + {{ seconds(var('duplicate_memory_seconds')) }}
)

select * from typed
{%- endmacro %}

{# Duplicates that a reader whose position lags in another partition still takes for the first: the rows that are first in their own
   log partition but not in the whole log. `shadowed_by` holds, per partition, the smallest offset of an earlier arrival of the id
   within the duplicate memory; the row counts at K exactly where none of those is below K. DuckDB; empty on a log that refuses
   duplicates itself. #}
{% macro shadowed_arrivals(events, arrived_from=none, arrived_until=none) -%}
with arrivals as (
{{ arrivals(events, arrived_from, arrived_until) }}
),

repeated as (
    select *
    from arrivals
    qualify count(*) over (partition by event_id) > 1
),

shadows as (
    select
        later.log_partition,
        later.log_offset,
        [
            {%- for partition in range(var('log_partitions')) %}
            min(earlier.log_offset) filter (where earlier.log_partition = {{ partition }}),
            {%- endfor %}
        ] as shadowed_by
    from repeated as later
    inner join repeated as earlier
        on
            later.event_id = earlier.event_id
            and (earlier.landed_at, earlier.log_partition, earlier.log_offset)
            < (later.landed_at, later.log_partition, later.log_offset)
            and later.landed_at <= earlier.landed_at + {{ seconds(var('duplicate_memory_seconds')) }}
    group by later.log_partition, later.log_offset
    having count(*) filter (where earlier.log_partition = later.log_partition) = 0
),

typed as (
    select
        {{ typed_columns() }},
        shadowed_by
    from repeated
    inner join shadows using (log_partition, log_offset)
)

select * from typed
{%- endmacro %}

{% macro arrivals(events, arrived_from, arrived_until) %}    select *
    from {{ events }}
    where
        event_type <> 'heartbeat'
        {%- if arrived_from %}
        and landed_at >= {{ arrived_from }}
        {%- endif %}
        {%- if arrived_until %}
        and landed_at < {{ arrived_until }}
        {%- endif %}
{%- endmacro %}

{# The staging model's columns: the log's, typed, and `known_at`. #}
{% macro typed_columns() -%}
event_id,
        event_type,
        user_id,
        note_id,
        author_id,
        surface,
        request_id,
        impression_id,
        event_ts,
        landed_at,
        log_partition,
        log_offset,
        {{ known_at('event_ts', 'landed_at') }} as known_at,
        {{ json_bigint('properties', 'watch_ms') }} as watch_ms
{%- endmacro %}

{# An integer property of a JSON object held as text; null where it is missing or not plainly an integer of at most 18 digits, in
   every engine alike (a lenient cast reads '7.5' as 8 in one and fails in another). #}
{% macro json_bigint(column, property) -%}
    {%- if target.type == 'duckdb' -%}
        case
            when regexp_full_match(json_extract_string({{ column }}, '$.{{ property }}'), '-?[0-9]{1,18}')
                then cast(json_extract_string({{ column }}, '$.{{ property }}') as bigint)
        end
    {%- elif target.type == 'spark' -%}
        case
            when get_json_object({{ column }}, '$.{{ property }}') rlike '^-?[0-9]{1,18}$'
                then cast(get_json_object({{ column }}, '$.{{ property }}') as bigint)
        end
    {%- else -%}
        case
            when cast({{ column }} as jsonb) ->> '{{ property }}' ~ '^-?[0-9]{1,18}$'
                then cast(cast({{ column }} as jsonb) ->> '{{ property }}' as bigint)
        end
    {%- endif -%}
{%- endmacro %}
