{# Returns rows that are known later than the model says it is built until: a reader who asks for that tick would see part of it. #}
{% test nothing_beyond_its_tick(model, column='known_at') %}
select *
from {{ model }}
where {{ column }} >= (select max(built_until) from headrace.builds where name = '{{ model.schema }}.{{ model.identifier }}')
{% endtest %}
