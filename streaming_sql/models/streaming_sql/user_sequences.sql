{# One row per (user_id, measure): the newest n events of each last_n measure of user_activity, in the total order
   (event_ts, event_id), oldest first, the open block included. Three arrays of one length; a reader cuts them at its own
   window and t. #}
{{ config(materialized='materialized_view', indexes=[{'columns': ['user_id']}]) }}

{{ newest_events(feature_group('user_activity'), ref('stg_engagements'), ref('stg_retracted_events')) }}
