{# A roll-up holds exactly what its parts hold: every count and integer sum of the rows that stand, per key, agrees between two
   granularities over the parents that both have built. Returns the keys where one does not. #}
{% test adds_up_to(model, parts, keys, columns, minutes) %}
with parents as (
    select
        {{ keys | join(', ') }},
        block_start,
        {%- for column in columns %}
        sum({{ column }}) as {{ column }},
        {%- endfor %}
    from (
{{ with_replacement(keys, model) }}
    ) as rows_of_parents
    where replaced_at is null
    group by {{ keys | join(', ') }}, block_start
),

children as (
    select
        {{ keys | join(', ') }},
        {{ floor_minutes('block_start', minutes) }} as parent_start,
        {%- for column in columns %}
        sum({{ column }}) as {{ column }},
        {%- endfor %}
    from (
{{ with_replacement(keys, parts) }}
    ) as rows_of_parts
    where
        replaced_at is null
        and {{ floor_minutes('block_start', minutes) }} + {{ seconds(minutes * 60) }} < (select max(built_until) from headrace.builds where name = '{{ model.schema }}.{{ model.identifier }}')
    group by {{ keys | join(', ') }}, {{ floor_minutes('block_start', minutes) }}
)

select children.*
from children
left join parents
    on
        {% for key in keys %}children.{{ key }} = parents.{{ key }} and {% endfor -%}
        children.parent_start = parents.block_start
where
    parents.block_start is null
    {%- for column in columns %}
    or parents.{{ column }} <> children.{{ column }}
    {%- endfor %}
{% endtest %}
