{# One row per impression: the features of note_engagement as known at its own T and K. #}
with spine as (
    select
        impression_id as row_id,
        user_id,
        note_id,
        author_id,
        request_ts,
        feature_watermark,
        feature_watermark as known_at,
        null::bigint[] as known_position,
        labels_known_at
    from {{ ref('impressions') }}
    where {{ in_build_range('labels_known_at') }}
),

features as (
    {{ features_at('note_engagement', 'spine') | indent(4) }}
)

select
    features.row_id as impression_id,
    spine.labels_known_at,
    features.* exclude (row_id)
from features
inner join spine on features.row_id = spine.row_id
