{# Bitemporal blocks: one row per (keys, block_start, known_at). A row is written once its tick is closed; a late event is a row of its
   own tick, never an edit. Readers combine the rows with known_at <= K. #}

{# Events → 5-minute block rows. `features` is the declaration, `events` a relation with the columns of its staging model;
   `condition` narrows the events. #}
{% macro block_rows(features, events, condition='') -%}
select
    {%- for key in features['keys'] %}
    {{ key }},
    {%- endfor %}
    {{ floor_minutes('event_ts', 5) }} as block_start,
    known_at,
    {%- for measure in features['measures'] %}
    {{ mapped(measure) }}{{ ',' if not loop.last }}
    {%- endfor %}
from {{ events }}
where
    {%- for key in features['keys'] %}
    {{ 'and ' if not loop.first }}{{ key }} is not null
    {%- endfor %}
    {%- if condition %}
    and {{ condition }}
    {%- endif %}
group by
    {%- for key in features['keys'] %}
    {{ key }},
    {%- endfor %}
    {{ floor_minutes('event_ts', 5) }},
    known_at
{%- endmacro %}

{# Block rows → rows of `minutes`, row by row: known_at = greatest(the child's, the end of the parent). #}
{% macro rolled_up_rows(features, child, minutes, condition='') -%}
with children as (
    select
        * exclude (block_start, known_at),
        {{ floor_minutes('block_start', minutes) }} as block_start,
        greatest(known_at, {{ floor_minutes('block_start', minutes) }} + {{ seconds(minutes * 60) }}) as known_at
    from {{ child }}
)

select
    {%- for key in features['keys'] %}
    {{ key }},
    {%- endfor %}
    block_start,
    known_at,
    {%- for measure in features['measures'] %}
    {{ combined(measure) }}{{ ',' if not loop.last }}
    {%- endfor %}
from children
{%- if condition %}
where {{ condition }}
{%- endif %}
group by
    {%- for key in features['keys'] %}
    {{ key }},
    {%- endfor %}
    block_start,
    known_at
{%- endmacro %}
