{# Block rows of closed ticks only: a tick never goes back, so each row comes once and never changes, which is what an append-only sink
   needs. Lists are JSON text, as Iceberg has no JSON. max() says that there is one tick: RisingWave compares with one row only. #}
{% macro closed_rows(features, blocks, closed_tick) -%}
select
    {%- for key in features['keys'] %}
    {{ key }},
    {%- endfor %}
    block_start,
    known_at,
    is_rebuilt,
    {%- for measure in features['measures'] %}
    {%- set last = loop.last %}
    {%- for column in representation_columns(measure).split(',') %}
    {% if is_map(measure) == 'yes' or is_events(measure) == 'yes' %}cast(to_jsonb({{ column }}) as varchar) as {{ column }}
    {%- else %}{{ column }}{% endif %}{{ ',' if not (last and loop.last) }}
    {%- endfor %}
    {%- endfor %}
from {{ blocks }}
where known_at <= (select max(closed_tick) from {{ closed_tick }})
{%- endmacro %}

{# How to write a table of the Iceberg namespace `stream`: the parameters of RisingWave's connector. What the temporal filter forgets is
   deleted from the view, not from the lake: force_append_only leaves deletions out. #}
{% macro lake_sink_parameters(table) -%}
    {%- set parameters = {
        'type': 'append-only',
        'force_append_only': 'true',
        'database.name': 'stream',
        'table.name': table,
        'create_table_if_not_exists': 'true'
    } -%}
    {%- do parameters.update(lake_connection()) -%}
    {{ return(parameters) }}
{%- endmacro %}

{# The Iceberg catalogue as RisingWave reaches it. #}
{% macro lake_connection() -%}
    {{ return({
        'warehouse.path': var('iceberg_warehouse'),
        'catalog.type': 'rest',
        'catalog.uri': var('iceberg_catalog')
    }) }}
{%- endmacro %}

{# `create source` over an append-only table of the lake, for what adds to light events (`attributes`). Materialised as `source`. #}
{% macro lake_source(namespace, table) -%}
create source if not exists {{ this }}
with (
    connector = 'iceberg',
    {%- for name, value in lake_connection().items() %}
    {{ name }} = '{{ value }}',
    {%- endfor %}
    database.name = '{{ namespace }}',
    table.name = '{{ table }}'
)
{%- endmacro %}
