{# One row per event_id (per duplicate memory): typed first arrivals with the tick that first knows them. The twin of the batch
   model of this name, from the same macro; known_at is plain SQL, no watermark on event_ts decides a value. #}
{{ config(materialized='materialized_view') }}

{{ first_arrivals(ref('arrivals'), attributes=declared_attributes('stg_engagements')) }}
