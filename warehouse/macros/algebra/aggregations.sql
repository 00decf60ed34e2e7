{# One place for what each aggregation stores, how stored values combine and what a reader gets: design table "Aggregations".
   A representation has an associative, commutative combine; an event whose `of` is null is not in the set.

   stored                      aggregations                                  columns of a measure m
   number                      count, sum, avg                               m (of a sum with sessions also m__n); m__sum, m__n
   moments                     var, stddev                                   m__n, m__mean, m__m2; all 0 where there is nothing
   least or largest value      min, max                                      m
   events, ascending, cut      first, last, first_n, last_n, last_distinct_n m: list of {event_ts, event_id, value}
   map, ascending by entry     top_k, approx_quantile, approx_count_distinct m: list of {entry, value}
                               and any that is bucketed                      as many as the measure has without buckets

   Maps take a row per entry before they are a list: `sketches.sql`. #}

{# The columns that a measure stores in a block. #}
{% macro representation_columns(measure) -%}
    {%- set name = measure.name -%}
    {%- if measure.aggregation == 'avg' -%}{{ name }}__sum,{{ name }}__n
    {%- elif measure.aggregation in ('var', 'stddev') -%}{{ name }}__n,{{ name }}__mean,{{ name }}__m2
    {%- elif measure.aggregation == 'sum' and not measure.bucket_by and sessions_of(measure) -%}{{ name }},{{ name }}__n
    {%- else -%}{{ name }}
    {%- endif -%}
{%- endmacro %}

{# 'yes' where the representation is a map. #}
{% macro is_map(measure) -%}
    {{- 'yes' if measure.bucket_by or measure.aggregation in ('top_k', 'approx_quantile', 'approx_count_distinct') else 'no' -}}
{%- endmacro %}

{# 'yes' where the representation is a list of events. #}
{% macro is_events(measure) -%}
    {{- 'yes' if measure.aggregation in ('first', 'last', 'first_n', 'last_n', 'last_distinct_n') else 'no' -}}
{%- endmacro %}

{# A measure's windows that are sessions, and those that are not; comma-separated. #}
{% macro sessions_of(measure) -%}
    {%- set found = [] -%}
    {%- for window in measure.windows -%}{%- if is_session(window) == 'yes' -%}{%- do found.append(window) -%}{%- endif -%}{%- endfor -%}
    {{- found | join(',') -}}
{%- endmacro %}

{% macro fixed_windows_of(measure) -%}
    {%- set found = [] -%}
    {%- for window in measure.windows -%}{%- if is_session(window) == 'no' -%}{%- do found.append(window) -%}{%- endif -%}{%- endfor -%}
    {{- found | join(',') -}}
{%- endmacro %}

{# The condition of a measure's set over events, with a further one; empty where every event is in it. #}
{% macro event_condition(measure, condition='') -%}
    {%- set conditions = [] -%}
    {%- if measure.where -%}{%- do conditions.append('(' ~ measure.where ~ ')') -%}{%- endif -%}
    {%- if measure.of -%}{%- do conditions.append('(' ~ measure.of ~ ') is not null') -%}{%- endif -%}
    {%- if measure.bucket_by -%}{%- do conditions.append('(' ~ measure.bucket_by ~ ') is not null') -%}{%- endif -%}
    {%- if condition -%}{%- do conditions.append(condition) -%}{%- endif -%}
    {{- conditions | join(' and ') -}}
{%- endmacro %}

{# `filter (where …)` of a measure over events, with a further condition. #}
{% macro event_filter(measure, condition='') -%}
    {%- set conditions = event_condition(measure, condition) -%}
    {%- if conditions %} filter (where {{ conditions }}){%- endif -%}
{%- endmacro %}

{# Events → representation: the select items of one measure, `condition` narrowing the events, `suffix` ending the names. On DuckDB
   not of maps (`stored_maps`). #}
{% macro mapped(measure, condition='', suffix='') -%}
    {%- set matching = event_filter(measure, condition) -%}
    {%- if is_map(measure) == 'yes' -%}
        {%- for column in representation_columns(measure).split(',') -%}
        array_agg(
            jsonb_build_object('entry', {{ map_entry(measure) }}, 'value', {{ map_value(measure, column) }})
            order by {{ map_entry(measure) }}
        ){{ matching }} as {{ column }}{{ suffix }}{{ ',' if not loop.last }}
        {%- endfor -%}
    {%- elif measure.aggregation == 'count' -%}
        count(*){{ matching }} as {{ measure.name }}{{ suffix }}
    {%- elif measure.aggregation == 'sum' -%}
        cast(coalesce(sum({{ measure.of }}){{ matching }}, 0) as {{ sql_type(measure.type) }}) as {{ measure.name }}{{ suffix }}
        {%- if sessions_of(measure) -%},
        count(*){{ matching }} as {{ measure.name }}__n{{ suffix }}
        {%- endif -%}
    {%- elif measure.aggregation == 'avg' -%}
        cast(coalesce(sum({{ measure.of }}){{ matching }}, 0) as {{ sql_type(measure.type) }}) as {{ measure.name }}__sum{{ suffix }},
        count(*){{ matching }} as {{ measure.name }}__n{{ suffix }}
    {%- elif measure.aggregation in ('var', 'stddev') -%}
        {%- set number = 'cast(' ~ measure.of ~ ' as ' ~ sql_type('double') ~ ')' -%}
        count(*){{ matching }} as {{ measure.name }}__n{{ suffix }},
        coalesce(avg({{ number }}){{ matching }}, 0) as {{ measure.name }}__mean{{ suffix }},
        coalesce(var_pop({{ number }}){{ matching }} * count(*){{ matching }}, 0) as {{ measure.name }}__m2{{ suffix }}
    {%- elif measure.aggregation in ('min', 'max') -%}
        cast({{ measure.aggregation }}({{ measure.of }}){{ matching }} as {{ sql_type(measure.type) }}) as {{ measure.name }}{{ suffix }}
    {%- elif is_events(measure) == 'yes' and target.type == 'duckdb' -%}
        {%- set direction = '' if measure.aggregation in ('first', 'first_n') else ' desc' -%}
        {%- set entries -%}
            list(
                {event_ts: event_ts, event_id: event_id, value: {{ event_value(measure) }}}
                order by event_ts{{ direction }}, event_id{{ direction }}
            ){{ matching }}
        {%- endset -%}
        {%- if measure.aggregation == 'last_distinct_n' -%}
        {{ cut(measure, entries) }} as {{ measure.name }}{{ suffix }}
        {%- else -%}
        list_sort(list_slice({{ entries }}, 1, {{ events_kept(measure) }})) as {{ measure.name }}{{ suffix }}
        {%- endif -%}
    {%- elif is_events(measure) == 'yes' -%}
        {#- in the order of the cut on engines without structs in lists; readers drop repeated values of last_distinct_n -#}
        {%- set direction = '' if measure.aggregation in ('first', 'first_n') else ' desc' -%}
        (
            array_agg(
                jsonb_build_object('event_ts', event_ts, 'event_id', event_id, 'value', {{ event_value(measure) }})
                order by event_ts{{ direction }}, event_id{{ direction }}
            ){{ matching }}
        ){{ '' if measure.aggregation == 'last_distinct_n' else '[1:' ~ events_kept(measure) ~ ']' }} as {{ measure.name }}{{ suffix }}
    {%- else -%}
        {{ exceptions.raise_compiler_error("measure " ~ measure.name ~ ": no aggregation " ~ measure.aggregation) }}
    {%- endif -%}
{%- endmacro %}

{# Representations → representation: the select items of one measure over block rows; not of maps (`stored_maps`). DuckDB. #}
{% macro combined(measure, condition='', suffix='') -%}
    {%- set matching = ' filter (where ' ~ condition ~ ')' if condition else '' -%}
    {%- if measure.aggregation in ('count', 'sum', 'avg') -%}
        {%- for column in representation_columns(measure).split(',') -%}
        cast(coalesce(sum({{ column }}){{ matching }}, 0) as {{ 'bigint' if column[-3:] == '__n' else sql_type(measure.type) }}) as {{ column }}{{ suffix }}{{ ',' if not loop.last }}
        {% endfor -%}
    {%- elif measure.aggregation in ('var', 'stddev') -%}
        {%- set n, mean, m2 = measure.name ~ '__n', measure.name ~ '__mean', measure.name ~ '__m2' -%}
        cast(coalesce(sum({{ n }}){{ matching }}, 0) as bigint) as {{ n }}{{ suffix }},
        coalesce(sum({{ mean }} * {{ n }}){{ matching }} / nullif(sum({{ n }}){{ matching }}, 0), 0) as {{ mean }}{{ suffix }},
        coalesce(
            list_reduce(
                list({n: cast({{ n }} as double), mean: {{ mean }}, m2: {{ m2 }}}){{ matching }},
                lambda one, other: {{ merged_moments('one', 'other') }}
            ).m2,
            0
        ) as {{ m2 }}{{ suffix }}
    {%- elif measure.aggregation in ('min', 'max') -%}
        {{ measure.aggregation }}({{ measure.name }}){{ matching }} as {{ measure.name }}{{ suffix }}
    {%- else -%}
        {%- set present = (condition ~ ' and ' if condition else '') ~ measure.name ~ ' is not null' -%}
        {{ cut(measure, 'flatten(list(' ~ measure.name ~ ') filter (where ' ~ present ~ '))') }} as {{ measure.name }}{{ suffix }}
    {%- endif -%}
{%- endmacro %}

{# 'true' in SQL where a row of blocks holds an event of the measure's set. #}
{% macro is_not_empty(measure) -%}
    {%- if is_map(measure) == 'yes' or is_events(measure) == 'yes' -%}
        len({{ representation_columns(measure).split(',')[0] }}) > 0
    {%- elif measure.aggregation == 'count' -%}
        {{ measure.name }} > 0
    {%- elif measure.aggregation in ('min', 'max') -%}
        {{ measure.name }} is not null
    {%- else -%}
        {{ measure.name }}__n > 0
    {%- endif -%}
{%- endmacro %}

{# Two moments {n, mean, m2} as one (Chan, Golub, LeVeque: parallel variance): nothing is squared before the mean is off it. #}
{% macro merged_moments(one, other) -%}
    {
        n: {{ one }}.n + {{ other }}.n,
        mean: {{ one }}.mean + ({{ other }}.mean - {{ one }}.mean) * coalesce({{ other }}.n / nullif({{ one }}.n + {{ other }}.n, 0), 0),
        m2: {{ one }}.m2 + {{ other }}.m2
        + ({{ other }}.mean - {{ one }}.mean) * ({{ other }}.mean - {{ one }}.mean)
        * coalesce({{ one }}.n / nullif({{ one }}.n + {{ other }}.n, 0) * {{ other }}.n, 0)
    }
{%- endmacro %}

{# The value of one event as lists hold it: of the declared type, as text. #}
{% macro event_value(measure) -%}
    {%- if measure.type == 'varchar' -%}
        cast({{ measure.of }} as varchar)
    {%- else -%}
        cast(cast({{ measure.of }} as {{ sql_type(measure.type) }}) as varchar)
    {%- endif -%}
{%- endmacro %}

{% macro events_kept(measure) -%}
    {{- 1 if measure.aggregation in ('first', 'last') else measure.n -}}
{%- endmacro %}

{# What a measure keeps of a list of {event_ts, event_id, value}, ascending. DuckDB. #}
{% macro cut(measure, entries) -%}
    {%- if measure.aggregation in ('first', 'first_n') -%}
        list_slice(list_sort({{ entries }}), 1, {{ events_kept(measure) }})
    {%- elif measure.aggregation == 'last_distinct_n' -%}
        {#- by value, so that of equal ones only the last is kept -#}
        list_transform(
            [list_sort(list_transform({{ entries }}, lambda event: {value: event.value, event_ts: event.event_ts, event_id: event.event_id}))],
            lambda sorted: {{ newest(
                'list_transform(list_filter(sorted, lambda event, place: place = len(sorted) or sorted[place + 1].value <> event.value), '
                ~ 'lambda event: {event_ts: event.event_ts, event_id: event.event_id, value: event.value})',
                measure.n
            ) }}
        )[1]
    {%- else -%}
        {{ newest(entries, events_kept(measure)) }}
    {%- endif -%}
{%- endmacro %}

{# The newest n entries of a list of {event_ts, event_id, value}, ascending. DuckDB. #}
{% macro newest(entries, n) -%}
    list_sort(list_slice(list_reverse_sort({{ entries }}), 1, {{ n }}))
{%- endmacro %}

{# The value of a feature from the representations named in `parts` (SQL expressions; a list, most often one). #}
{% macro finalized(measure, window, parts) -%}
    {%- set end = '_' ~ window -%}
    {%- if is_map(measure) == 'yes' -%}
        {{ or_empty(measure, finalized_map(measure, parts[0] ~ '.' ~ measure.name ~ end)) }}
    {%- elif measure.aggregation in ('count', 'sum') -%}
        {{ added(measure.name ~ end, parts) }}
    {%- elif measure.aggregation == 'avg' -%}
        {%- set average -%}
        cast({{ added(measure.name ~ '__sum' ~ end, parts) }} as double)
            / nullif(cast({{ added(measure.name ~ '__n' ~ end, parts) }} as double), 0)
        {%- endset -%}
        {{ or_empty(measure, average) }}
    {%- elif measure.aggregation in ('var', 'stddev') -%}
        {%- set moments = [] -%}
        {%- for part in parts -%}
            {%- do moments.append(
                '{n: cast(coalesce(' ~ part ~ '.' ~ measure.name ~ '__n' ~ end ~ ', 0) as double), mean: coalesce(' ~ part ~ '.' ~ measure.name
                ~ '__mean' ~ end ~ ', 0), m2: coalesce(' ~ part ~ '.' ~ measure.name ~ '__m2' ~ end ~ ', 0)}'
            ) -%}
        {%- endfor -%}
        {%- set variance -%}
        list_transform(
            [list_reduce([{{ moments | join(', ') }}], lambda one, other: {{ merged_moments('one', 'other') }})],
            lambda all_of: case when all_of.n > 1 then {{ 'sqrt(all_of.m2 / (all_of.n - 1))' if measure.aggregation == 'stddev' else 'all_of.m2 / (all_of.n - 1)' }} end
        )[1]
        {%- endset -%}
        {{ or_empty(measure, variance) }}
    {%- elif measure.aggregation in ('min', 'max') -%}
        {%- set extreme -%}
        {{ 'least' if measure.aggregation == 'min' else 'greatest' }}({% for part in parts %}{{ part }}.{{ measure.name }}{{ end }}{{ ', ' if not loop.last }}{% endfor %})
        {%- endset -%}
        {{ or_empty(measure, extreme) }}
    {%- else -%}
        {%- set kept = cut(measure, 'list_concat(' ~ listed(measure.name ~ end, parts) ~ ')') -%}
        {%- if measure.aggregation in ('first', 'last') -%}
        {{ or_empty(measure, 'cast((' ~ kept ~ ')[1].value as ' ~ measure.type ~ ')') }}
        {%- else -%}
        list_transform({{ kept }}, lambda entry: entry.value)
        {%- endif -%}
    {%- endif -%}
{%- endmacro %}

{# A number, and the declared one where it is NULL. #}
{% macro or_empty(measure, value) -%}
    {%- if measure.empty is none or measure.empty is not defined -%}
        {{ value }}
    {%- elif measure.type == 'bigint' and measure.aggregation != 'avg' and measure.empty == measure.empty | int -%}
        coalesce({{ value }}, {{ measure.empty | int }})
    {%- else -%}
        coalesce({{ value }}, cast('{{ measure.empty }}' as double))
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
