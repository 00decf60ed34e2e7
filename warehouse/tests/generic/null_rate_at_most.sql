{# The share of rows in which a column is null is at most `rate`, from 0 to 1; returns the share where it is not. #}
{% test null_rate_at_most(model, column_name, rate) %}
{%- if not 0 <= rate <= 1 -%}
    {{ exceptions.raise_compiler_error("null_rate_at_most on " ~ model ~ ": rate is a share from 0 to 1, got " ~ rate) }}
{%- endif %}
select avg(cast({{ column_name }} is null as integer)) as null_rate
from {{ model }}
having avg(cast({{ column_name }} is null as integer)) > {{ rate }}
{% endtest %}
