{# One row per (note_id, window_end): what the measures of `note_engagement` that declare the window 1h store over that hour, every 5
   minutes; trending reads it with window_end = the closed tick. #}
{{ config(materialized='materialized_view', indexes=[{'columns': ['window_end', 'note_id']}]) }}

{{ sliding_windows(feature_group('note_engagement'), ref('stg_engagements'), ref('stg_retracted_events'), '1h') }}
