{# Ticks and arrival in SQL: the twin of `warehouse/time_algebra.py`. DuckDB, PostgreSQL, RisingWave and Spark. #}

{# floor_minutes('event_ts', 5) sends 10:04:59.999 to 10:00. Integer arithmetic on microseconds (or date_bin), so that every engine
   agrees on every edge. #}
{% macro floor_minutes(column, minutes) -%}
    {%- if 1440 % minutes != 0 -%}
        {{ exceptions.raise_compiler_error("floor_minutes: minutes must divide 1440 so that blocks line up across days, got " ~ minutes) }}
    {%- endif -%}
    {%- set width = minutes * 60000000 -%}
    {%- if target.type == 'duckdb' -%}
        make_timestamptz(epoch_us({{ column }}) // {{ width }} * {{ width }})
    {%- elif target.type == 'spark' -%}
        timestamp_micros(cast(floor(unix_micros({{ column }}) / {{ width }}) as bigint) * {{ width }})
    {%- else -%}
        date_bin(interval '{{ minutes }} minutes', {{ column }}, timestamp with time zone '1970-01-01 00:00:00+00')
    {%- endif -%}
{%- endmacro %}

{# seconds(300) is an interval of that length. #}
{% macro seconds(number) -%}
    interval '{{ number }}' second
{%- endmacro %}

{# The first tick that can know an event which landed then. #}
{% macro arrival_tick(landed_at) -%}
    {{ floor_minutes('(' ~ landed_at ~ ' - ' ~ seconds(var('grace_seconds')) ~ ')', 5) }} + {{ seconds(300) }}
{%- endmacro %}

{# The first tick whose block-fresh values hold the event: its block has ended and it has arrived. #}
{% macro known_at(event_ts, landed_at) -%}
    greatest({{ floor_minutes(event_ts, 5) }} + {{ seconds(300) }}, {{ arrival_tick(landed_at) }})
{%- endmacro %}

{# The newest tick that a request at t may read. #}
{% macro newest_tick(request_ts) -%}
    {{ floor_minutes('(' ~ request_ts ~ ' - ' ~ seconds(var('grace_seconds')) ~ ')', 5) }}
{%- endmacro %}

{# window_seconds('6h') is 21600; of `lifetime` 150 years, of a session the longest that it can be. #}
{% macro window_seconds(window) -%}
    {%- set units = {'m': 60, 'h': 3600, 'd': 86400} -%}
    {%- if window == 'lifetime' -%}{{ 54750 * 86400 }}
    {%- elif is_session(window) == 'yes' -%}86400
    {%- else -%}{{ window[:-1] | int * units[window[-1]] }}
    {%- endif -%}
{%- endmacro %}

{# 'yes' of `session_30m`. #}
{% macro is_session(window) -%}
    {{- 'yes' if window[:8] == 'session_' else 'no' -}}
{%- endmacro %}

{# How long nothing happens before `session_30m` is over: 1800. #}
{% macro session_gap_seconds(window) -%}
    {{- window_seconds(window[8:]) -}}
{%- endmacro %}

{# A relation with the calendar keys of a group: parts of an instant in a zone, as text. #}
{% macro with_calendar(features, relation, instant) -%}
    {%- if features['calendar'] -%}
(
        select
            *,
            {%- for key in features['calendar'] %}
            {{ calendar_part(key, instant) }} as {{ key.name }}{{ ',' if not loop.last }}
            {%- endfor %}
        from {{ relation }}
    )
    {%- else -%}
{{ relation }}
    {%- endif -%}
{%- endmacro %}

{% macro calendar_part(key, instant) -%}
    cast(extract({{ key.field }} from {{ instant }} at time zone '{{ key.zone }}') as varchar)
{%- endmacro %}
