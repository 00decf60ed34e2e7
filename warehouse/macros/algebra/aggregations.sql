{# One place for what each aggregation stores, how stored values combine and what a reader gets: design table "Aggregations".
   A representation has an associative, commutative combine; an event whose `of` is null is not in the set. #}

{# The columns that a measure stores in a block. #}
{% macro representation_columns(measure) -%}
    {%- if measure.aggregation == 'avg' -%}{{ measure.name }}__sum,{{ measure.name }}__n{%- else -%}{{ measure.name }}{%- endif -%}
{%- endmacro %}

{# `filter (where …)` of a measure over events, with a further condition. #}
{% macro event_filter(measure, condition='') -%}
    {%- set conditions = [] -%}
    {%- if measure.where -%}{%- do conditions.append('(' ~ measure.where ~ ')') -%}{%- endif -%}
    {%- if measure.of -%}{%- do conditions.append('(' ~ measure.of ~ ') is not null') -%}{%- endif -%}
    {%- if condition -%}{%- do conditions.append(condition) -%}{%- endif -%}
    {%- if conditions %} filter (where {{ conditions | join(' and ') }}){%- endif -%}
{%- endmacro %}

{# Events → representation: the select items of one measure, `condition` narrowing the events, `suffix` ending the names. #}
{% macro mapped(measure, condition='', suffix='') -%}
    {%- set matching = event_filter(measure, condition) -%}
    {%- if measure.aggregation == 'count' -%}
        count(*){{ matching }} as {{ measure.name }}{{ suffix }}
    {%- elif measure.aggregation == 'sum' -%}
        cast(coalesce(sum({{ measure.of }}){{ matching }}, 0) as {{ sql_type(measure.type) }}) as {{ measure.name }}{{ suffix }}
    {%- elif measure.aggregation == 'avg' -%}
        cast(coalesce(sum({{ measure.of }}){{ matching }}, 0) as {{ sql_type(measure.type) }}) as {{ measure.name }}__sum{{ suffix }},
        count(*){{ matching }} as {{ measure.name }}__n{{ suffix }}
    {%- elif measure.aggregation in ('min', 'max') -%}
        cast({{ measure.aggregation }}({{ measure.of }}){{ matching }} as {{ sql_type(measure.type) }}) as {{ measure.name }}{{ suffix }}
    {%- elif measure.aggregation == 'last_n' and target.type == 'duckdb' -%}
        {#- newest first, cut, then oldest first: lists are kept ascending in the total order (event_ts, event_id) -#}
        list_sort(
            list_slice(
                list(
                    {event_ts: event_ts, event_id: event_id, value: cast({{ measure.of }} as varchar)}
                    order by event_ts desc, event_id desc
                ){{ matching }},
                1, {{ measure.n }}
            )
        ) as {{ measure.name }}{{ suffix }}
    {%- elif measure.aggregation == 'last_n' -%}
        {#- newest first on engines without structs in lists: readers take the first n -#}
        (
            array_agg(
                jsonb_build_object('event_ts', event_ts, 'event_id', event_id, 'value', cast({{ measure.of }} as varchar))
                order by event_ts desc, event_id desc
            ){{ matching }}
        )[1:{{ measure.n }}] as {{ measure.name }}{{ suffix }}
    {%- else -%}
        {{ exceptions.raise_compiler_error("measure " ~ measure.name ~ ": no aggregation " ~ measure.aggregation) }}
    {%- endif -%}
{%- endmacro %}

{# Representations → representation: the select items of one measure over block rows. #}
{% macro combined(measure, condition='', suffix='') -%}
    {%- set matching = ' filter (where ' ~ condition ~ ')' if condition else '' -%}
    {%- if measure.aggregation in ('count', 'sum') -%}
        cast(coalesce(sum({{ measure.name }}){{ matching }}, 0) as {{ sql_type(measure.type) }}) as {{ measure.name }}{{ suffix }}
    {%- elif measure.aggregation == 'avg' -%}
        cast(coalesce(sum({{ measure.name }}__sum){{ matching }}, 0) as {{ sql_type(measure.type) }}) as {{ measure.name }}__sum{{ suffix }},
        cast(coalesce(sum({{ measure.name }}__n){{ matching }}, 0) as bigint) as {{ measure.name }}__n{{ suffix }}
    {%- elif measure.aggregation in ('min', 'max') -%}
        {{ measure.aggregation }}({{ measure.name }}){{ matching }} as {{ measure.name }}{{ suffix }}
    {%- elif measure.aggregation == 'last_n' -%}
        {{ newest('flatten(list(' ~ measure.name ~ ')' ~ (matching or ' filter (where ' ~ measure.name ~ ' is not null)') ~ ')', measure.n) }} as {{ measure.name }}{{ suffix }}
    {%- endif -%}
{%- endmacro %}

{# The newest n entries of a list of {event_ts, event_id, value}, ascending. DuckDB. #}
{% macro newest(entries, n) -%}
    list_sort(list_slice(list_reverse_sort({{ entries }}), 1, {{ n }}))
{%- endmacro %}

{# The value of a feature from the representations named in `parts` (SQL expressions; a list, most often one). #}
{% macro finalized(measure, window, parts) -%}
    {%- set end = '_' ~ window -%}
    {%- if measure.aggregation in ('count', 'sum') -%}
        {{ added(measure.name ~ end, parts) }}
    {%- elif measure.aggregation == 'avg' -%}
        cast({{ added(measure.name ~ '__sum' ~ end, parts) }} as double)
            / nullif(cast({{ added(measure.name ~ '__n' ~ end, parts) }} as double), 0)
    {%- elif measure.aggregation == 'min' -%}
        least({% for part in parts %}{{ part }}.{{ measure.name }}{{ end }}{{ ', ' if not loop.last }}{% endfor %})
    {%- elif measure.aggregation == 'max' -%}
        greatest({% for part in parts %}{{ part }}.{{ measure.name }}{{ end }}{{ ', ' if not loop.last }}{% endfor %})
    {%- elif measure.aggregation == 'last_n' -%}
        list_transform(
            {{ newest('list_concat(' ~ listed(measure.name ~ end, parts) ~ ')', measure.n) }},
            lambda entry: entry.value
        )
    {%- endif -%}
{%- endmacro %}

{% macro added(column, parts) -%}
    {%- for part in parts -%}coalesce({{ part }}.{{ column }}, 0){{ ' + ' if not loop.last }}{%- endfor -%}
{%- endmacro %}

{% macro listed(column, parts) -%}
    {%- for part in parts -%}coalesce({{ part }}.{{ column }}, []){{ ', ' if not loop.last }}{%- endfor -%}
{%- endmacro %}

{# A declared type in this engine's words. #}
{% macro sql_type(type) -%}
    {{- 'double precision' if type == 'double' and target.type != 'duckdb' and target.type != 'spark' else type -}}
{%- endmacro %}
