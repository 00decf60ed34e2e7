{# Returns the keys that stand in more than one row, and rows with a null in their key. #}
{% test grain_is_unique(model, columns) %}
select
    {{ columns | join(', ') }},
    count(*) as num_rows
from {{ model }}
group by {{ columns | join(', ') }}
having
    count(*) > 1
    {%- for column in columns %}
    or {{ column }} is null
    {%- endfor %}
{% endtest %}
