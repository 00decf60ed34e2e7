{# Returns arrivals that were accepted although the same event_id had been accepted within the duplicate memory before them. #}
{% test an_id_is_accepted_once_per_duplicate_memory(model) %}
select
    event_id,
    landed_at
from {{ model }}
qualify landed_at <= lag(landed_at) over (partition by event_id order by landed_at) + {{ seconds(var('duplicate_memory_seconds')) }}
{% endtest %}
