{# known_at lies on the 5-minute grid, not before the end of the event's block, and not before the event could have arrived. #}
{% test known_at_is_a_tick_after_arrival(model) %}
select *
from {{ model }}
where
    epoch_us(known_at) % 300000000 <> 0
    or known_at < {{ floor_minutes('event_ts', 5) }} + {{ seconds(300) }}
    or known_at + {{ seconds(var('grace_seconds')) }} <= landed_at
{% endtest %}
