{# One row per impression whose outcomes are final: the spine of training. T is the newest tick at the request, K = T.
   An outcome counts if it lands within the attribution window A of the impression. All of those are known a tick after t + A + F: an
   outcome stamped ahead of the clock (by F at most) is known only when its own block has ended. The impression itself may be late. #}
with views as (
    select
        impression_id,
        user_id,
        note_id,
        author_id,
        surface,
        event_ts as request_ts,
        {{ newest_tick('event_ts') }} as feature_watermark,
        greatest(
            known_at,
            {{ arrival_tick('(event_ts + ' ~ seconds(var('attribution_seconds') + var('furthest_ahead_seconds')) ~ ')') }}
        ) as labels_known_at
    from {{ ref('stg_engagements') }}
    where
        event_type = 'view'
        and impression_id is not null
)

select * from views
where {{ in_build_range('labels_known_at') }}
