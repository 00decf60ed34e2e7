{# First arrivals: rows of the event log, typed, each event_id once, with the tick that first knows them. Retractions are no rows
   here (`accepted_retractions` has them), but an id that one of them took is taken.

   An arrival is a duplicate if the same event_id arrived before it within the duplicate memory H, in the order (landed_at,
   log_partition, log_offset); the first wins with its whole row, before any filter. `arrived_from` and `arrived_until` (SQL
   expressions, optional) narrow the arrivals that are read: give H and F of room before the first row wanted. `attributes`: what tables
   of the lake add to each row (attributes.sql). #}
{% macro first_arrivals(events, arrived_from=none, arrived_until=none, attributes=[]) -%}
with arrivals as (
{{ arrivals(events, arrived_from, arrived_until) }}
),

remembered as (
{{ with_previous_landing() }}
),

typed as (
    select
        {{ typed_columns() }}
    from remembered
    where
        event_type <> 'retraction'
        and {{ is_first_arrival() }}
)
{{- attribute_ctes(attributes, 'typed') }}

select * from {{ hydrated_name(attributes, 'typed') }}
{%- endmacro %}

{# The same from arrivals that are known to be first, without looking again: for a reader that remembers ids itself. #}
{% macro admitted_arrivals(events, attributes=[]) -%}
with typed as (
    select
        {{ typed_columns() }}
    from {{ events }}
    where event_type not in ('heartbeat', 'retraction')
)
{{- attribute_ctes(attributes, 'typed') }}

select * from {{ hydrated_name(attributes, 'typed') }}
{%- endmacro %}

{# Retractions, each event_id once like any event: which event they retract, and the tick that first knows them. #}
{% macro accepted_retractions(events, arrived_from=none, arrived_until=none) -%}
with arrivals as (
{{ arrivals(events, arrived_from, arrived_until) }}
),

remembered as (
{{ with_previous_landing() }}
    where event_id in (select event_id from arrivals where event_type = 'retraction')
),

accepted as (
    select
        event_id,
        retracts,
        event_ts,
        landed_at,
        log_partition,
        log_offset,
        {{ arrival_tick('landed_at') }} as known_at
    from remembered
    where
        event_type = 'retraction'
        and retracts is not null
        and {{ is_first_arrival() }}
)

select * from accepted
{%- endmacro %}

{# Staged events that were retracted: the staged row and `retracted_at`, the tick from which it no longer counts, the same as its
   known_at if it never counted. The first of several retractions decides. A retraction holds for every arrival of its target's id
   that lands up to H after it, however old. #}
{% macro retracted_rows(events, retractions) -%}
with earliest as (
    select
        events.log_partition,
        events.log_offset,
        min(greatest(events.known_at, retractions.known_at)) as retracted_at
    from {{ events }} as events
    inner join {{ retractions }} as retractions
        on
            events.event_id = retractions.retracts
            and events.landed_at <= retractions.landed_at + {{ seconds(var('duplicate_memory_seconds')) }}
    group by events.log_partition, events.log_offset
)

select
    events.*,
    earliest.retracted_at
from {{ events }} as events
inner join earliest
    on
        events.log_partition = earliest.log_partition
        and events.log_offset = earliest.log_offset
{%- endmacro %}

{# Duplicates that a reader whose position lags in another partition still takes for the first: the rows that are first in their own
   log partition but not in the whole log, retractions among them. `shadowed_by` holds, per partition, the smallest offset of an earlier
   arrival of the id within the duplicate memory; the row counts at K exactly where none of those is below K. DuckDB; empty on a log
   that refuses duplicates itself. #}
{% macro shadowed_arrivals(events, arrived_from=none, arrived_until=none, attributes=[]) -%}
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
        retracts,
        shadowed_by
    from repeated
    inner join shadows using (log_partition, log_offset)
)
{{- attribute_ctes(attributes, 'typed', 'retracts,shadowed_by') }}

select * from {{ hydrated_name(attributes, 'typed') }}
{%- endmacro %}

{% macro is_first_arrival() -%}
(
            previous_landed_at is null
            or landed_at > previous_landed_at + {{ seconds(var('duplicate_memory_seconds')) }}
        )
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

{# Their names. #}
{% macro staged_columns() -%}
event_id,event_type,user_id,note_id,author_id,surface,request_id,impression_id,event_ts,landed_at,log_partition,log_offset,known_at,watch_ms
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

{# Arrivals, each with the landing of the one before it of its event_id: what `is_first_arrival` decides by. #}
{% macro with_previous_landing() %}
    select
        *,
        lag(landed_at) over (partition by event_id order by landed_at, log_partition, log_offset) as previous_landed_at
    from arrivals
{%- endmacro %}
