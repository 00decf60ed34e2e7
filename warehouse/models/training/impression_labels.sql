{# One row per impression: what came of it within the attribution window, 0 or 1. An outcome whose retraction is known when the
   labels are final is none. #}
{%- set outcomes = ['click', 'long_view', 'like', 'comment', 'share', 'follow', 'hide'] %}
with spine as (
    select
        impression_id,
        request_ts,
        labels_known_at
    from {{ ref('impressions') }}
    where {{ in_build_range('labels_known_at') }}
),

outcomes as (
    select
        came.impression_id,
        came.event_type,
        came.landed_at,
        retracted.retracted_at
    from {{ ref('stg_engagements') }} as came
    left join {{ ref('stg_retracted_events') }} as retracted
        on
            came.log_partition = retracted.log_partition
            and came.log_offset = retracted.log_offset
    where came.event_type in ('{{ outcomes | join("', '") }}')
),

attributed as (
    select
        spine.impression_id,
        outcomes.event_type
    from spine
    inner join outcomes on spine.impression_id = outcomes.impression_id
    where
        outcomes.landed_at < spine.request_ts + {{ seconds(var('attribution_seconds')) }}
        and (outcomes.retracted_at is null or outcomes.retracted_at > spine.labels_known_at)
),

labels as (
    select
        spine.impression_id,
        spine.labels_known_at,
        {%- for outcome in outcomes %}
        cast(count(*) filter (where attributed.event_type = '{{ outcome }}') > 0 as integer) as label_{{ outcome }},
        {%- endfor %}
    from spine
    left join attributed on spine.impression_id = attributed.impression_id
    group by spine.impression_id, spine.labels_known_at
)

select * from labels
