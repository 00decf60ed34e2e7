{# Features from a batch table with an event time of its own: for each row of `spine`, of the key's rows with event_time < t that are
   known at K, the last one. DuckDB.

   features   keys, event_time, available_at, order, columns ({column, name, type, empty})
   spine      row_id (unique), the keys, request_ts (t), known_at (K, a tick; T for block freshness)
   placed, last_known   relations that hold `placed_table_rows` and `last_known_rows` already, for who reads spine after spine

   A row is known from the tick on that an event of that time which landed at available_at would be known from. Which row is the last is
   decided by event_time, then available_at, then the tie columns, then the values, so that no two executions differ. One ASOF join
   (plain equalities and one inequality) finds what was the last row at K. It can lie at or after t only where K is later than t, as
   corrected; those few look at all rows of their key. A key without such a row has the empty values; a NULL in the last row stays NULL. #}
{% macro table_features_at(features, spine, relation, placed=none, last_known=none) -%}
{%- set keys = features['keys'] -%}
with spine as (
    select
        row_id,
        {%- for key in keys %}
        cast({{ key }} as varchar) as {{ key }},
        {%- endfor %}
        request_ts,
        known_at
    from {{ spine }}
),

table_rows as (
{% if placed %}    select * from {{ placed }}{% else %}{{ placed_table_rows(features, relation) }}{% endif %}
),

last_known as (
{% if last_known %}    select * from {{ last_known }}{% else %}{{ last_known_rows(features, 'table_rows') }}{% endif %}
),

found as (
    select
        spine.row_id,
        spine.request_ts,
        spine.known_at,
        {%- for key in keys %}
        spine.{{ key }},
        {%- endfor %}
        last_known.place
    from spine
    asof left join last_known
        on
            {%- for key in keys %}
            spine.{{ key }} = last_known.{{ key }} and
            {%- endfor %}
            spine.known_at >= last_known.known_at
),

at_or_after_the_request as (
    select found.*
    from found
    inner join table_rows
        on
            {%- for key in keys %}
            found.{{ key }} = table_rows.{{ key }} and
            {%- endfor %}
            found.place = table_rows.place
    where table_rows.event_ts >= found.request_ts
),

before_the_request as (
    select
        late.row_id,
        max(table_rows.place) as place
    from at_or_after_the_request as late
    left join table_rows
        on
            {%- for key in keys %}
            late.{{ key }} = table_rows.{{ key }} and
            {%- endfor %}
            table_rows.event_ts < late.request_ts
            and table_rows.known_at <= late.known_at
    group by late.row_id
),

chosen as (
    select
        found.row_id,
        {%- for key in keys %}
        found.{{ key }},
        {%- endfor %}
        case when before_the_request.row_id is null then found.place else before_the_request.place end as place
    from found
    left join before_the_request on found.row_id = before_the_request.row_id
)

select
    chosen.row_id,
    {%- for column in features['columns'] %}
    case when chosen.place is null then {{ table_feature_empty(column) }} else table_rows.{{ column.name }} end as {{ column.name }},
    {%- endfor %}
from chosen
left join table_rows
    on
        {%- for key in keys %}
        chosen.{{ key }} = table_rows.{{ key }} and
        {%- endfor %}
        chosen.place = table_rows.place
{%- endmacro %}

{# The table's rows in order: `place` counts each key's rows from 1, and the last of any set of them is the one with the largest. #}
{% macro placed_table_rows(features, relation) %}
    select
        {%- for key in features['keys'] %}
        cast("{{ key }}" as varchar) as {{ key }},
        {%- endfor %}
        "{{ features['event_time'] }}" as event_ts,
        {{ known_at('"' ~ features['event_time'] ~ '"', table_available_at(features)) }} as known_at,
        {%- for column in features['columns'] %}
        cast("{{ column.column }}" as {{ column.type }}) as {{ column.name }},
        {%- endfor %}
        row_number() over (
            partition by "{{ features['keys'] | join('", "') }}"
            order by
                "{{ features['event_time'] }}",
                {{ table_available_at(features) }}
                {%- for column in features['order'] %},
                "{{ column }}" nulls first
                {%- endfor %}
        ) as place
    from {{ relation }}
    where
        "{{ features['event_time'] }}" is not null
        {%- for key in features['keys'] %}
        and "{{ key }}" is not null
        {%- endfor %}
{%- endmacro %}

{# Per key and tick at which one of its rows became known: the place of the last row known from then on. #}
{% macro last_known_rows(features, placed) %}
    select
        {%- for key in features['keys'] %}
        {{ key }},
        {%- endfor %}
        known_at,
        max(max(place)) over (
            partition by {{ features['keys'] | join(', ') }}
            order by known_at
            rows between unbounded preceding and current row
        ) as place
    from {{ placed }}
    group by {{ features['keys'] | join(', ') }}, known_at
{%- endmacro %}

{# A row without the column that says when it was available was available when it happened. #}
{% macro table_available_at(features) -%}
    coalesce("{{ features['available_at'] }}", "{{ features['event_time'] }}")
{%- endmacro %}

{% macro table_feature_empty(column) -%}
    cast({% if column.empty is none %}null{% else %}{{ column.empty | string | lower }}{% endif %} as {{ column.type }})
{%- endmacro %}
