{# One row per event of stg_engagements that was retracted, from the tick on at which it no longer counts. The twin of the batch model
   of this name, from the same macro. Rows of ticks that are not closed yet may still come and change. #}
{{ config(materialized='materialized_view') }}

{{ retracted_rows(ref('stg_engagements'), ref('stg_retractions')) }}
