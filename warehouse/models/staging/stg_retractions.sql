{# One row per retraction: an event that takes another one back. It is in no feature's set; what it does is in stg_retracted_events. #}
{{ accepted_retractions(
    source('lake', 'events'),
    arrived_from="timestamp with time zone '" ~ build_range().start ~ "' - " ~ seconds(300 + var('furthest_ahead_seconds') + var('duplicate_memory_seconds')),
    arrived_until="timestamp with time zone '" ~ build_range().end ~ "' + " ~ seconds(var('grace_seconds')),
) }}
where {{ in_build_range('known_at') }}
