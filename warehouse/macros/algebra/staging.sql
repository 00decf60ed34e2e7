{# First arrivals: rows of the event log, typed, each event_id once, with the tick that first knows them.

   An arrival is a duplicate if the same event_id arrived before it within the duplicate memory H, in the order (landed_at,
   log_partition, log_offset); the first wins with its whole row, before any filter. `arrived_from` and `arrived_until` (SQL
   expressions, optional) narrow the arrivals that are read: give H and F of room before the first row wanted. #}
{% macro first_arrivals(events, arrived_from=none, arrived_until=none) -%}
with arrivals as (
    select *
    from {{ events }}
    where
        event_type <> 'heartbeat'
        {%- if arrived_from %}
        and landed_at >= {{ arrived_from }}
        {%- endif %}
        {%- if arrived_until %}
        and landed_at < {{ arrived_until }}
        {%- endif %}
),

remembered as (
    select
        *,
        lag(landed_at) over (partition by event_id order by landed_at, log_partition, log_offset) as previous_landed_at
    from arrivals
),

typed as (
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
        landed_at,
        log_partition,
        log_offset,
        {{ known_at('event_ts', 'landed_at') }} as known_at,
        {{ json_bigint('properties', 'watch_ms') }} as watch_ms
    from remembered
    where
        previous_landed_at is null
        or landed_at > previous_landed_at + {{ seconds(var('duplicate_memory_seconds')) }}
)

select * from typed
{%- endmacro %}

{# An integer property of a JSON object held as text; null where it is missing or no integer. #}
{% macro json_bigint(column, property) -%}
    {%- if target.type == 'duckdb' -%}
        try_cast(json_extract_string({{ column }}, '$.{{ property }}') as bigint)
    {%- elif target.type == 'spark' -%}
        try_cast(get_json_object({{ column }}, '$.{{ property }}') as bigint)
    {%- else -%}
        case
            when cast({{ column }} as jsonb) ->> '{{ property }}' ~ '^-?[0-9]{1,18}$'
                then cast(cast({{ column }} as jsonb) ->> '{{ property }}' as bigint)
        end
    {%- endif -%}
{%- endmacro %}
