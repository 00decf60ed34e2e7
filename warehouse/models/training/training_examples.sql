{# One row per impression: point-in-time features of the note, its author, the user and the pair, request-time features of the note,
   and labels. A note's own attributes count only if it existed at the request. #}
with spine as (
    select *
    from {{ ref('impressions') }}
    where {{ in_build_range('labels_known_at') }}
),

notes as (
    select
        note_id,
        duration_ms,
        note_type,
        topics[1] as topic,
        created_at
    from {{ source('lake', 'notes') }}
),

examples as (
    select
        spine.impression_id,
        spine.user_id,
        spine.note_id,
        spine.author_id,
        spine.surface,
        spine.request_ts,
        spine.feature_watermark,
        spine.labels_known_at,
        note_features.* exclude (impression_id, labels_known_at),
        author_features.* exclude (impression_id, labels_known_at),
        user_features.* exclude (impression_id, labels_known_at),
        user_author_features.* exclude (impression_id, labels_known_at),
        notes.duration_ms as note_duration_ms,
        notes.note_type,
        notes.topic as note_topic,
        (epoch_us(spine.request_ts) - epoch_us(notes.created_at)) / 60000000 as note_age_min,
        labels.* exclude (impression_id, labels_known_at),
    from spine
    inner join {{ ref('impression_note_engagement') }} as note_features
        on spine.impression_id = note_features.impression_id
    inner join {{ ref('impression_author_engagement') }} as author_features
        on spine.impression_id = author_features.impression_id
    inner join {{ ref('impression_user_activity') }} as user_features
        on spine.impression_id = user_features.impression_id
    inner join {{ ref('impression_user_author_affinity') }} as user_author_features
        on spine.impression_id = user_author_features.impression_id
    inner join {{ ref('impression_labels') }} as labels
        on spine.impression_id = labels.impression_id
    left join notes
        on
            spine.note_id = notes.note_id
            and notes.created_at < spine.request_ts
)

select * from examples
