{# Each whole UTC day between the model's first and last has at least `at_least` and at most `at_most` rows; returns the days that do not,
   those without a row among them. The first and the last day are not whole. #}
{% test volume_within(model, at_least=none, at_most=none, column='known_at') %}
{%- if at_least is none and at_most is none -%}
    {{ exceptions.raise_compiler_error("volume_within on " ~ model ~ ": give at_least, at_most or both, rows a day") }}
{%- endif %}
with span as (
    select
        min(cast({{ column }} as date)) as first_day,
        max(cast({{ column }} as date)) as last_day
    from {{ model }}
),

days as (
    select cast(unnest(generate_series(first_day + 1, last_day - 1, interval '1 day')) as date) as day
    from span
    where first_day is not null
),

counted as (
    select
        days.day,
        count(found.{{ column }}) as num_rows
    from days
    left join {{ model }} as found on days.day = cast(found.{{ column }} as date)
    group by days.day
)

select *
from counted
where
    false
    {%- if at_least is not none %}
    or num_rows < {{ at_least }}
    {%- endif %}
    {%- if at_most is not none %}
    or num_rows > {{ at_most }}
    {%- endif %}
{% endtest %}
