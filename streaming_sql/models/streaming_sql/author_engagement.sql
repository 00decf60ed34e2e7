{# One row per (author_id, block_start, known_at): the 5-minute blocks of the declaration `author_engagement`, from the macro that builds them in
   batch. Rows of ticks that are not closed yet still grow: readers ask for known_at <= closed_tick. #}
{{ config(materialized='materialized_view', indexes=[{'columns': ['author_id']}]) }}

{{ block_rows(feature_group('author_engagement'), ref('stg_engagements'), ref('stg_retracted_events')) }}
