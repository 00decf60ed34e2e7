{# Returns rows known before their block has ended, or off the grid of ticks. #}
{% test known_at_follows_the_block(model, minutes) %}
select *
from {{ model }}
where
    known_at < block_start + {{ seconds(minutes * 60) }}
    or epoch_us(known_at) % 300000000 <> 0
    or block_start <> {{ floor_minutes('block_start', minutes) }}
{% endtest %}
