{# One row per impression whose outcomes are final: the spine of training. T is the newest tick at the request, K = T.
   An outcome counts if it lands within the attribution window A of the impression. All of those are known a tick after t + A + F: an
   outcome stamped ahead of the clock (by F at most) is known only when its own block has ended. The impression itself may be late. A view whose retraction is known by then is no
   impression: nobody saw it. One that is retracted later stays, as the features that were served for it do. #}
with views as (
    select
        log_partition,
        log_offset,
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

select
    views.impression_id,
    views.user_id,
    views.note_id,
    views.author_id,
    views.surface,
    views.request_ts,
    views.feature_watermark,
    views.labels_known_at
from views
left join {{ ref('stg_retracted_events') }} as retracted
    on
        views.log_partition = retracted.log_partition
        and views.log_offset = retracted.log_offset
where
    {{ in_build_range('labels_known_at') }}
    and (retracted.retracted_at is null or retracted.retracted_at > views.labels_known_at)
