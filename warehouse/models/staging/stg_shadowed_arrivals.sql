{# One row per duplicate that a reader lagging in another log partition would take for the first. Empty on a log that refuses
   duplicates itself; point-in-time reads at a log position need it to see what that reader saw. #}
{{ shadowed_arrivals(
    source('lake', 'events'),
    arrived_from="timestamp with time zone '" ~ build_range().start ~ "' - " ~ seconds(300 + var('furthest_ahead_seconds') + var('duplicate_memory_seconds')),
    arrived_until="timestamp with time zone '" ~ build_range().end ~ "' + " ~ seconds(var('grace_seconds')),
    attributes=declared_attributes('stg_engagements'),
) }}
where {{ in_build_range('known_at') }}
