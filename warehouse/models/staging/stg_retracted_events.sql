{# One row per event of stg_engagements that was retracted, from the tick on at which it no longer counts. Only events that became
   known, or whose retraction did, in the range under build can begin to be retracted there. #}
with new_retractions as (
    select retracts
    from {{ ref('stg_retractions') }}
    where {{ in_build_range('known_at') }}
),

events as (
    select *
    from {{ ref('stg_engagements') }}
    where
        {{ in_build_range('known_at') }}
        or event_id in (select retracts from new_retractions)
),

retracted as (
    {{ retracted_rows('events', ref('stg_retractions')) | indent(4) }}
)

select * from retracted
where {{ in_build_range('retracted_at') }}
