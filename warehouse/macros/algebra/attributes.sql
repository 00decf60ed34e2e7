{# Attributes of light events: what an event does not carry itself, from tables of the lake as of its time. `attributes`: for each table
   relation, keys ({name, column}), valid_from, available_at, columns ({name, column, type, is_carried}); in order, as a later one may look
   up by what an earlier one has found.

   Of a key's rows with valid_from <= event_ts that were known when the event landed (arrival_tick(available_at) <= newest_tick(landed_at))
   the newest counts: by valid_from, then available_at, then the values. Nothing that comes later changes it, so that a row of staging
   is written once. Plain joins and a top-1: DuckDB, PostgreSQL, RisingWave and Spark. #}

{# Further CTEs after the one named `staged` (the staging model's columns and `extra`); `hydrated_name` is the last of them. #}
{% macro attribute_ctes(attributes, staged, extra='') -%}
{%- set columns = staged_columns().split(',') + (extra.split(',') if extra else []) -%}
{%- set filled = namespace(names=[], before=staged) -%}
{%- for table in attributes -%}
{%- set available_at = 'coalesce(versions."' ~ table['available_at'] ~ '", versions."' ~ table['valid_from'] ~ '")' -%}
{%- set here = table['columns'] | map(attribute='name') | list -%}
,

found_{{ loop.index }} as (
    select *
    from (
        select
            came.log_partition,
            came.log_offset,
            {%- for column in table['columns'] %}
            cast(versions."{{ column.column }}" as {{ sql_type(column.type) }}) as {{ column.name }},
            {%- endfor %}
            row_number() over (
                partition by came.log_partition, came.log_offset
                order by
                    versions."{{ table['valid_from'] }}" desc,
                    {{ available_at }} desc
                    {%- for column in table['columns'] %},
                    versions."{{ column.column }}" desc nulls last
                    {%- endfor %}
            ) as place
        from {{ filled.before }} as came
        inner join {{ table['relation'] }} as versions
            on
                {%- for key in table['keys'] %}
                came.{{ key.name }} = cast(versions."{{ key.column }}" as varchar) and
                {%- endfor %}
                versions."{{ table['valid_from'] }}" <= came.event_ts
                and {{ arrival_tick(available_at) }} <= {{ newest_tick('came.landed_at') }}
    ) as candidates
    where place = 1
),

hydrated_{{ loop.index }} as (
    select
        {%- set chosen = [] -%}
        {%- for column in columns + filled.names -%}
            {%- if column in here -%}
                {%- do chosen.append('coalesce(came.' ~ column ~ ', found.' ~ column ~ ') as ' ~ column) -%}
            {%- else -%}
                {%- do chosen.append('came.' ~ column) -%}
            {%- endif -%}
        {%- endfor -%}
        {%- for column in here if column not in columns -%}{%- do chosen.append('found.' ~ column) -%}{%- endfor %}
        {{ chosen | join(',\n        ') }}
    from {{ filled.before }} as came
    left join found_{{ loop.index }} as found
        on
            came.log_partition = found.log_partition
            and came.log_offset = found.log_offset
)
{%- for name in here if name not in columns and name not in filled.names -%}{%- do filled.names.append(name) -%}{%- endfor -%}
{%- set filled.before = 'hydrated_' ~ loop.index -%}
{%- endfor -%}
{%- endmacro %}

{# The last CTE of `attribute_ctes`. #}
{% macro hydrated_name(attributes, staged) -%}
{{- 'hydrated_' ~ (attributes | length) if attributes else staged -}}
{%- endmacro %}
