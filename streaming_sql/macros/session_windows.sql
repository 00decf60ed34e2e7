{# Sessions of every measure that declares some: one row per (keys, measure, session_gap, session_start), with session_end and the value over the
   events of the measure's set that stand now. Cut on the grid of 5-minute blocks, as everywhere (`time_algebra.session_start`): a
   session is over where at least the gap holds none. It is on at E while floor_5m(E) - session_end is less than the gap. A reader
   looks back a day at most; here a session has no end but its gap. Counts, sums, averages, minima and maxima. RisingWave, PostgreSQL. #}
{% macro session_windows(features, events, retracted) -%}
{%- set keys = features['keys'] | join(', ') -%}
{%- set found = [] -%}
{%- for measure in features['measures'] -%}
    {%- for window in measure.windows if is_session(window) == 'yes' -%}{%- do found.append((measure, window)) -%}{%- endfor -%}
{%- endfor -%}
{%- if execute and not found -%}
    {{ exceptions.raise_compiler_error("session_windows: no measure of the group declares {kind: session, gap: …}") }}
{%- endif -%}
with standing_events as (
    select
        standing.*,
        {{ floor_minutes('standing.event_ts', 5) }} as block_start
    from ({{ standing_events(with_calendar(features, events, 'event_ts'), retracted, features['keys']) }}) as standing
)
{% for measure, window in found %}
select
    {{ keys }},
    '{{ measure.name }}' as measure,
    {{ seconds(session_gap_seconds(window) | int) }} as session_gap,
    min(block_start) as session_start,
    max(block_start) + {{ seconds(300) }} as session_end,
    cast({{ session_value(measure) }} as {{ sql_type('double') }}) as value
from (
    select
        *,
        sum(case when block_start - previous_start >= {{ seconds(session_gap_seconds(window) | int + 300) }} then 1 else 0 end) over (
            partition by {{ keys }}
            order by event_ts, event_id
            rows between unbounded preceding and current row
        ) as session_number
    from (
        select
            *,
            lag(block_start) over (partition by {{ keys }} order by event_ts, event_id) as previous_start
        from standing_events
        {%- if event_condition(measure) %}
        where {{ event_condition(measure) }}
        {%- endif %}
    ) as in_order
) as numbered
group by {{ keys }}, session_number
{%- if not loop.last %}

union all
{% endif %}
{%- endfor %}
{%- endmacro %}

{% macro session_value(measure) -%}
    {%- if measure.bucket_by or measure.aggregation not in ('count', 'sum', 'avg', 'min', 'max') -%}
        {{ exceptions.raise_compiler_error(
            "session_windows: " ~ measure.name ~ " is " ~ measure.aggregation ~ ("of buckets" if measure.bucket_by else "")
            ~ "; sessions of count, sum, avg, min and max are kept in the stream, others are read from the lake"
        ) }}
    {%- elif measure.aggregation == 'count' -%}count(*)
    {%- elif measure.aggregation == 'avg' -%}avg(cast({{ measure.of }} as {{ sql_type('double') }}))
    {%- else -%}{{ measure.aggregation }}({{ measure.of }})
    {%- endif -%}
{%- endmacro %}
