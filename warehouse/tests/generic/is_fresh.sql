{# The newest row is at most `within` (such as '2 hours') older than the last closed tick; returns that row's time where it is not. An
   empty model is not stale: `volume_within` minds that. #}
{% test is_fresh(model, within, column='known_at') %}
select max({{ column }}) as newest
from {{ model }}
having max({{ column }}) < (select closed_until from headrace.run) - interval '{{ within }}'
{% endtest %}
