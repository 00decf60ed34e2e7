{# Maps from an entry to a value: counts per text (top_k), per bucket of a quantile sketch, largest rank per register of a distinct
   count, one aggregate per bucket of a column. Their twin is `warehouse/features/sketches.py`.

   A map is stored as a list of {entry, value}, ascending by entry. It is made of rows, one per entry: `entries` below are relations
   with the columns of a group, `entry`, and one column per stored column of the measure. Engines other than DuckDB store the
   entries one by one, not yet combined (`mapped`). #}

{# Which entry an event adds to. #}
{% macro map_entry(measure) -%}
    {%- if measure.bucket_by -%}
        cast({{ measure.bucket_by }} as varchar)
    {%- elif measure.aggregation == 'top_k' -%}
        cast({{ measure.of }} as varchar)
    {%- elif measure.aggregation == 'approx_quantile' -%}
        {{ sketch_bucket('cast(' ~ measure.of ~ ' as ' ~ sql_type('double') ~ ')', measure.relative_error) }}
    {%- else -%}
        {%- set digest = 'md5(cast(' ~ measure.of ~ ' as varchar))' -%}
        cast({{ hex_digit(digest, 1) }} * 256 + {{ hex_digit(digest, 2) }} * 16 + {{ hex_digit(digest, 3) }} as bigint)
    {%- endif -%}
{%- endmacro %}

{# What an event adds to it in one of the measure's stored columns. #}
{% macro map_value(measure, column) -%}
    {%- if measure.aggregation == 'approx_count_distinct' -%}
        {#- the place of the first 1 in the 13 digits after the register's: four bits for each 0, then those of the digit -#}
        {%- set rest = 'ltrim(substr(md5(cast(' ~ measure.of ~ " as varchar)), 4, 13), '0')" -%}
        {%- set digit = 'substr(' ~ rest ~ ', 1, 1)' -%}
        cast(
            (13 - length({{ rest }})) * 4
            + case
                when {{ digit }} in ('', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f') then 1
                when {{ digit }} in ('4', '5', '6', '7') then 2
                when {{ digit }} in ('2', '3') then 3
                else 4
            end as bigint
        )
    {%- elif measure.bucket_by and measure.aggregation != 'count' and column[-3:] != '__n' -%}
        cast({{ measure.of }} as {{ sql_type(measure.type) }})
    {%- else -%}
        cast(1 as bigint)
    {%- endif -%}
{%- endmacro %}

{# How values of one entry combine. #}
{% macro map_combined(measure, column) -%}
    {%- if measure.aggregation == 'approx_count_distinct' -%}
        max({{ column }})
    {%- elif measure.aggregation in ('min', 'max') -%}
        {{ measure.aggregation }}({{ column }})
    {%- else -%}
        cast(sum({{ column }}) as {{ map_type(measure, column) }})
    {%- endif -%}
{%- endmacro %}

{% macro map_type(measure, column) -%}
    {{- 'double' if measure.bucket_by and measure.type == 'double' and column[-3:] != '__n' else 'bigint' -}}
{%- endmacro %}

{# Select items: an event's entry and what it adds to each stored column. #}
{% macro mapped_entry(measure) -%}
    {{ map_entry(measure) }} as entry
    {%- for column in representation_columns(measure).split(',') %},
        {{ map_value(measure, column) }} as {{ column }}
    {%- endfor %}
{%- endmacro %}

{# Rows with stored columns of a measure → its entries; `items` are select items for the columns of a group. DuckDB. #}
{% macro stored_entries(measure, rows, items, condition) -%}
{%- set columns = representation_columns(measure).split(',') -%}
select
    * exclude ({% for column in columns %}stored_{{ column }}{{ ', ' if not loop.last }}{% endfor %}),
    stored_{{ columns[0] }}.entry as entry,
    {%- for column in columns %}
    stored_{{ column }}.value as {{ column }}{{ ',' if not loop.last }}
    {%- endfor %}
from (
    select
        {{ items }},
        {#- the lists of one row have the same entries in the same order -#}
        {%- for column in columns %}
        unnest({{ column }}) as stored_{{ column }}{{ ',' if not loop.last }}
        {%- endfor %}
    from {{ rows }}
    {%- if condition %}
    where {{ condition }}
    {%- endif %}
) as unnested
{%- endmacro %}

{# Entries → entries, one per group and entry. `group`: column names, comma-separated. #}
{% macro combined_entries(measure, entries, group) -%}
select
    {{ group }},
    entry,
    {%- for column in representation_columns(measure).split(',') %}
    {{ map_combined(measure, column) }} as {{ column }}{{ ',' if not loop.last }}
    {%- endfor %}
from (
{{ entries }}
) as entries
group by {{ group }}, entry
{%- endmacro %}

{# Entries → the stored columns of a measure, one row per group. DuckDB. #}
{% macro stored_maps(measure, entries, group) -%}
select
    {{ group }},
    {%- for column in representation_columns(measure).split(',') %}
    list({entry: entry, value: {{ column }}} order by entry) as {{ column }}{{ ',' if not loop.last }}
    {%- endfor %}
from (
{{ combined_entries(measure, entries, group) }}
) as combined_entries
group by {{ group }}
{%- endmacro %}

{# Entries of a measure, one per (row of `id`, look_back, entry) → one column a window, all but final: `finalized_map`. DuckDB. #}
{% macro read_maps(measure, entries, id) -%}
{%- set columns = representation_columns(measure).split(',') -%}
select
    {{ id }},
    {%- for window in measure.windows %}
    {%- set matching = "filter (where look_back = '" ~ window ~ "'" -%}
    {%- if measure.bucket_by %}
    map_from_entries(
        list({k: entry, v: {{ columns[0] ~ ' / ' ~ columns[1] if measure.aggregation == 'avg' else columns[0] }}} order by entry) {{ matching }})
    )
    {%- elif measure.aggregation == 'top_k' %}
    (list(entry order by {{ columns[0] }} desc, entry) {{ matching }}))[1:{{ measure.k }}]
    {%- elif measure.aggregation == 'approx_quantile' %}
    min(entry) {{ matching }} and running > position)
    {%- else %}
    {{ distinct_estimate('count(*) ' ~ matching ~ ')', 'sum(pow(2.0, -' ~ columns[0] ~ ')) ' ~ matching ~ ')') }}
    {%- endif %} as {{ measure.name }}_{{ window }}{{ ',' if not loop.last }}
    {%- endfor %}
{%- if measure.aggregation == 'approx_quantile' %}
from (
    select
        *,
        sum({{ columns[0] }}) over (partition by {{ id }}, look_back order by entry) as running,
        floor(cast('{{ measure.q }}' as double) * (sum({{ columns[0] }}) over (partition by {{ id }}, look_back) - 1)) as position
    from {{ entries }}
) as ranked
{%- else %}
from {{ entries }}
{%- endif %}
group by {{ id }}
{%- endmacro %}

{# The value of a feature from a column of `read_maps`. #}
{% macro finalized_map(measure, column) -%}
    {%- if measure.bucket_by -%}
        {%- set of = 'double' if measure.aggregation == 'avg' else ('bigint' if measure.aggregation == 'count' else measure.type) -%}
        coalesce({{ column }}, cast(map {} as map(varchar, {{ of }})))
    {%- elif measure.aggregation == 'top_k' -%}
        coalesce({{ column }}, [])
    {%- elif measure.aggregation == 'approx_quantile' -%}
        case
            when {{ column }} = 0 then 0
            else
                sign({{ column }}) * {{ sketch_edges(measure.relative_error) }}[abs({{ column }})]
                * cast('{{ 1 + measure.relative_error }}' as double)
        end
    {%- else -%}
        coalesce({{ column }}, 0)
    {%- endif -%}
{%- endmacro %}

{# The bucket of a double: 0 near zero, i from the i-th edge up to the next, and -i for its negative. A logarithm guesses, the table
   of edges decides. #}
{% macro sketch_bucket(number, relative_error) -%}
    {%- set size = 'abs(' ~ number ~ ')' -%}
    {%- set edges = sketch_edges(relative_error) -%}
    {%- set last = sketch_edges(relative_error, 'number') -%}
    {%- set gamma = (1 + relative_error) / (1 - relative_error) -%}
    {%- set guess -%}
        cast(greatest(1, least({{ last }}, floor(ln(greatest({{ size }}, cast('1e-09' as {{ sql_type('double') }})) / cast('1e-09' as {{ sql_type('double') }})) / ln(cast('{{ gamma }}' as {{ sql_type('double') }}))) + 1)) as integer)
    {%- endset -%}
    cast(
        case
            when {{ size }} < cast('1e-09' as {{ sql_type('double') }}) then 0
            else
                (case when {{ number }} < 0 then -1 else 1 end)
                * (
                    {{ guess }}
                    - (case when ({{ edges }})[{{ guess }}] > {{ size }} then 1 else 0 end)
                    + (case when ({{ edges }})[{{ guess }} + 1] <= {{ size }} then 1 else 0 end)
                )
        end as bigint
    )
{%- endmacro %}

{# Edges of the buckets, 1e-9 × gamma^i up to 1e18, as an array of doubles (`of` number: how many). #}
{% macro sketch_edges(relative_error, of='array') -%}
    {%- set gamma = (1 + relative_error) / (1 - relative_error) -%}
    {%- set found = [] -%}
    {%- for place in range(32000) if not found or found[-1] < 1e18 -%}
        {%- do found.append(1e-9 * gamma ** place) -%}
    {%- endfor -%}
    {%- if of == 'number' -%}
        {{- found | length -}}
    {%- elif target.type == 'duckdb' -%}
        {{- "cast('[" ~ found | join(',') ~ "]' as double[])" -}}
    {%- else -%}
        {{- "cast('{" ~ found | join(',') ~ "}' as double precision[])" -}}
    {%- endif -%}
{%- endmacro %}

{# HyperLogLog's estimate from the number of registers that hold a rank and the sum of 2^-rank over them; linear counting while
   it is small. #}
{% macro distinct_estimate(registers, powers) -%}
    cast(
        floor(
            case
                when {{ registers }} = 0 then 0
                when 0.7213 / (1 + 1.079 / 4096) * 4096 * 4096 / (4096 - {{ registers }} + {{ powers }}) <= 2.5 * 4096 and {{ registers }} < 4096
                    then 4096 * ln(4096.0 / (4096 - {{ registers }}))
                else 0.7213 / (1 + 1.079 / 4096) * 4096 * 4096 / (4096 - {{ registers }} + {{ powers }})
            end + 0.5
        ) as bigint
    )
{%- endmacro %}

{# The number that a hexadecimal digit of a text stands for. #}
{% macro hex_digit(text, place) -%}
    (strpos('0123456789abcdef', substr({{ text }}, {{ place }}, 1)) - 1)
{%- endmacro %}
