{# One row per event_id: its first arrival, typed, with the tick that first knows it. Feature groups read this, never the raw log. #}
{{ first_arrivals(
    source('lake', 'events'),
    arrived_from="timestamp with time zone '" ~ build_range().start ~ "' - " ~ seconds(300 + var('furthest_ahead_seconds') + var('duplicate_memory_seconds')),
    arrived_until="timestamp with time zone '" ~ build_range().end ~ "' + " ~ seconds(var('grace_seconds')),
    attributes=declared_attributes('stg_engagements'),
) }}
where {{ in_build_range('known_at') }}
