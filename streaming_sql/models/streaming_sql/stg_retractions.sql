{# One row per retraction, each event_id once. The twin of the batch model of this name, from the same macro. #}
{{ config(materialized='materialized_view') }}

{{ accepted_retractions(ref('arrivals')) }}
