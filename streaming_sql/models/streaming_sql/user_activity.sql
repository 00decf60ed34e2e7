{# One row per (user_id, block_start, known_at): the 5-minute blocks of the declaration `user_activity`, from the macro that builds them in
   batch. Rows of ticks that are not closed yet still grow: readers ask for known_at <= closed_tick. #}
{{ config(materialized='materialized_view', indexes=[{'columns': ['user_id']}]) }}

{{ block_rows(feature_group('user_activity'), ref('stg_engagements'), ref('stg_retracted_events')) }}
