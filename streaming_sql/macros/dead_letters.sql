{# What landing takes of the rows of `log_events` into the lake. The rest are dead letters: later than the duplicate memory, too far
   ahead, or no event. #}
{% macro is_no_dead_letter() -%}
    event_ts >= kafka_timestamp - {{ seconds(var('duplicate_memory_seconds')) }}
    and event_ts <= kafka_timestamp + {{ seconds(var('furthest_ahead_seconds')) }}
    and event_type <> 'dead_letter'
{%- endmacro %}
