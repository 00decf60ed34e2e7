{# The newest n events of each last_n measure of a group, one row per key and measure, oldest first: the top-N pattern that
   RisingWave keeps incrementally. `retracted`: the events that no longer count, open ticks included. Runs on PostgreSQL and DuckDB
   too. #}
{% macro newest_events(features, events, retracted) -%}
{%- set keys = features['keys'] | join(', ') -%}
{%- set sequences = features['measures'] | selectattr('aggregation', 'equalto', 'last_n') | list -%}
{%- for measure in sequences %}
select
    {{ keys }},
    '{{ measure.name }}' as measure,
    array_agg(event_ts order by event_ts, event_id) as event_ts,
    array_agg(event_id order by event_ts, event_id) as event_ids,
    array_agg(item order by event_ts, event_id) as items
from (
    select
        {{ keys }},
        event_ts,
        event_id,
        cast({{ measure.of }} as varchar) as item,
        row_number() over (partition by {{ keys }} order by event_ts desc, event_id desc) as place
    from (
        {{ standing_events(events, retracted, features['keys']) }}
    ) as standing_events
    where
        ({{ measure.of }}) is not null
        {%- if measure.where %}
        and ({{ measure.where }})
        {%- endif %}
) as newest
where place <= {{ measure.n }}
group by {{ keys }}
{%- if not loop.last %}
union all
{%- endif %}
{%- endfor %}
{%- endmacro %}
