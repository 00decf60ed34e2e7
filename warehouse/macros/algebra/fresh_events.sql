{# What an event-fresh reader knows beyond the blocks of its tick: the CTEs event_arrivals, event_withdrawn, event_opened and
   event_known, one row per row of the spine and event that counts. `lasting`: the measures with session windows. DuckDB. #}
{% macro fresh_events(features, family, lasting, events, shadowed, retractions) -%}
{%- set keys = features['keys'] -%}
{%- set windows = [] -%}
{%- for measure in family.measures -%}{%- do windows.extend(measure.windows) -%}{%- endfor %}
event_arrivals as (
    select *, null as shadowed_by from {{ with_calendar(features, events, 'event_ts') }} as staged_events
    union all by name
    select * exclude (retracts) from {{ with_calendar(features, shadowed, 'event_ts') }} as shadowed_events
    where event_type <> 'retraction'
),

{# per row of the spine, the events that a retraction takes out which is known at its K -#}
event_withdrawn as (
    select
        spine.row_id,
        arrived.log_partition,
        arrived.log_offset,
        bool_or(arrived.known_at <= spine.feature_watermark and retraction.known_at > spine.feature_watermark) as is_in_blocks
    from (
        select retracts, landed_at, log_partition, log_offset, known_at, null as shadowed_by from {{ retractions }}
        union all by name
        select retracts, landed_at, log_partition, log_offset, {{ arrival_tick('landed_at') }} as known_at, shadowed_by
        from {{ shadowed }}
        where event_type = 'retraction' and retracts is not null
    ) as retraction
    inner join event_arrivals as arrived
        on
            retraction.retracts = arrived.event_id
            and arrived.landed_at <= retraction.landed_at + {{ seconds(var('duplicate_memory_seconds')) }}
    inner join spine
        on {% for key in keys %}arrived.{{ key }} = spine.{{ key }} and {% endfor -%}
        arrived.event_ts < spine.request_ts
        and arrived.event_ts >= spine.request_tick - greatest({% for window in windows %}{{ seconds(window_seconds(window)) }}{{ ', ' if not loop.last }}{% endfor %})
        and {{ is_known_at_position('retraction') | indent(8) }}
    group by spine.row_id, arrived.log_partition, arrived.log_offset
),

event_opened as (
    select distinct row_id
    from event_withdrawn
    where is_in_blocks
),

event_known as (
    select
        known_events.*
        {%- if lasting %},
        {{ floor_minutes('known_events.event_ts', 5) }} as block_start
        {%- endif %}
    from (
        select
            spine.row_id as spine_row_id,
            spine.request_tick,
            head.*
        from spine
        inner join event_arrivals as head
            on {% for key in keys %}spine.{{ key }} = head.{{ key }} and {% endfor -%}
            head.known_at > spine.feature_watermark
            and head.event_ts < spine.request_ts
            and {{ is_known_at_position('head') | indent(12) }}
        union all
        select
            spine.row_id as spine_row_id,
            spine.request_tick,
            opened.*
        from event_opened
        inner join spine on event_opened.row_id = spine.row_id
        inner join event_arrivals as opened
            on {% for key in keys %}spine.{{ key }} = opened.{{ key }} and {% endfor -%}
            opened.known_at <= spine.feature_watermark
            and opened.event_ts < spine.request_ts
            and {{ is_known_at_position('opened') | indent(12) }}
    ) as known_events
    anti join event_withdrawn
        on
            known_events.spine_row_id = event_withdrawn.row_id
            and known_events.log_partition = event_withdrawn.log_partition
            and known_events.log_offset = event_withdrawn.log_offset
),
{%- endmacro %}

{# Where a window of the head begins. #}
{% macro head_edge(measure, window) -%}
    {%- if is_session(window) == 'yes' -%}event_starts.{{ measure.name }}_{{ window }}
    {%- else -%}event_known.request_tick - {{ seconds(window_seconds(window)) }}
    {%- endif -%}
{%- endmacro %}

{# Whether a row of the spine knows an arrival; a duplicate counts only while no earlier arrival of its id is known. DuckDB. #}
{% macro is_known_at_position(arrival) -%}
case
    when spine.known_position is null then {{ arrival }}.landed_at < spine.request_ts
    else {{ arrival }}.log_offset < spine.known_position[{{ arrival }}.log_partition + 1]
end
and (
    {{ arrival }}.shadowed_by is null
    or spine.known_position is not null
    and not list_contains(
        list_transform(list_zip({{ arrival }}.shadowed_by, spine.known_position), lambda pair: pair[1] < pair[2]), true
    )
)
{%- endmacro %}
