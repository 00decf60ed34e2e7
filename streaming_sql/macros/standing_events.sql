{# The rows of a stream of events that no retraction takes back now, less those that lack one of the keys. rows: a relation or a query in
   brackets; retracted: `stg_retracted_events`. RisingWave, PostgreSQL. #}
{% macro standing_events(rows, retracted, keys=[]) -%}
select came.*
from {{ rows }} as came
left join {{ retracted }} as retracted
    on
        came.log_partition = retracted.log_partition
        and came.log_offset = retracted.log_offset
where
    retracted.retracted_at is null
    {%- for key in keys %}
    and came.{{ key }} is not null
    {%- endfor %}
{%- endmacro %}
