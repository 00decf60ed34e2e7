{# One row per impression whose outcomes are final: the spine of training. T is the newest tick at the request, K = T.
   An outcome counts if it lands within the attribution window A of the impression; it is final a tick after that. #}
with views as (
    select
        impression_id,
        user_id,
        note_id,
        author_id,
        surface,
        event_ts as request_ts,
        {{ newest_tick('event_ts') }} as feature_watermark,
        {{ arrival_tick('(event_ts + ' ~ seconds(var('attribution_seconds')) ~ ')') }} as labels_known_at
    from {{ ref('stg_engagements') }}
    where
        event_type = 'view'
        and impression_id is not null
)

select * from views
where {{ in_build_range('labels_known_at') }}
