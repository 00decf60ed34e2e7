"""The metrics of `metrics` as SQL, so that they can be asked of served requests where those lie.

`METRICS` reads a relation `scored_rows`, one row per impression: row_id (unique; settles only which bin of ECE a tied row falls
in), group_id (reader or request), label (0 or 1), score (a probability). It answers one row of numbers, NULL where
`metrics` says NaN. Parameters: $base_rate, $k, $bins.
`SERVED_ROWS` makes that relation of the lake's `forward_log` and `events`: shown candidates of requests before $until, positive
when an event $head followed within $wait_min minutes.
"""

METRICS = """
with rows_placed as (
    select
        row_id,
        group_id,
        label::double as label,
        score::double as score,
        greatest(least(score::double, 1 - 1e-7), 1e-7) as clipped,
        greatest(least($base_rate::double, 1 - 1e-7), 1e-7) as clipped_base_rate,
        row_number() over (partition by group_id order by score desc, label) as place,
        ntile($bins) over (order by score, row_id) as bin
    from scored_rows
),

ties as (
    select score, sum(label) as positives, sum(1 - label) as negatives
    from rows_placed
    group by score
),

ties_placed as (
    select
        positives,
        negatives,
        coalesce(sum(negatives) over (order by score rows between unbounded preceding and 1 preceding), 0) as negatives_below,
        sum(positives) over (order by score desc) as positives_from_above,
        sum(positives + negatives) over (order by score desc) as rows_from_above
    from ties
),

over_ties as (
    select
        sum(positives * (negatives_below + negatives / 2)) / nullif(sum(positives) * sum(negatives), 0) as auc,
        sum(positives * positives_from_above / rows_from_above) / nullif(sum(positives), 0) as average_precision
    from ties_placed
),

group_ties as (
    select
        group_id,
        score,
        sum(label) as positives,
        sum(1 - label) as negatives,
        avg(if(place <= $k, 1 / log2(1 + place), 0)) as mean_discount
    from rows_placed
    group by group_id, score
),

group_ties_placed as (
    select
        *,
        coalesce(
            sum(negatives) over (partition by group_id order by score rows between unbounded preceding and 1 preceding), 0
        ) as negatives_below
    from group_ties
),

lists as (
    select
        group_id,
        sum(positives) as num_positives,
        sum(positives + negatives) as num_rows,
        sum(positives * (negatives_below + negatives / 2)) / nullif(sum(positives) * sum(negatives), 0) as auc,
        sum(positives * mean_discount) / list_sum(
            [1 / log2(1 + ideal_place) for ideal_place in range(1, 1 + least(sum(positives), $k)::bigint)]
        ) as ndcg
    from group_ties_placed
    group by group_id
),

precisions as (
    select
        group_id,
        label,
        place,
        sum(label) over (partition by group_id order by place) / place as precision
    from rows_placed
),

positives_placed as (
    select
        precisions.group_id,
        max(precisions.label / precisions.place) as reciprocal_rank,
        sum(if(precisions.place <= $k, precisions.label * precisions.precision, 0)) / least(max(lists.num_positives), $k)
            as average_precision,
        sum(if(precisions.place <= $k, precisions.label, 0)) / max(lists.num_positives) as recall
    from precisions
    inner join lists on precisions.group_id = lists.group_id
    where lists.num_positives > 0
    group by precisions.group_id
),

bins as (
    select count(*) as num_rows, abs(avg(score) - avg(label)) as gap
    from rows_placed
    group by bin
),

probabilities as (
    select
        count(*) as num_rows,
        sum(label) as num_positives,
        -avg(if(label = 1, ln(clipped), ln(1 - clipped))) as log_loss,
        -avg(if(label = 1, ln(clipped_base_rate), ln(1 - clipped_base_rate))) as baseline,
        sum(score) / nullif(sum(label), 0) as relative_calibration
    from rows_placed
)

select
    probabilities.num_rows,
    probabilities.num_positives,
    over_ties.auc,
    (select sum(auc * num_rows) / sum(num_rows) from lists where auc is not null) as grouped_auc,
    over_ties.average_precision as pr_auc,
    1 - probabilities.log_loss / probabilities.baseline as nce,
    probabilities.log_loss,
    (select avg(ndcg) from lists where num_positives > 0) as ndcg,
    (select avg(reciprocal_rank) from positives_placed) as mrr,
    (select avg(average_precision) from positives_placed) as map,
    (select avg(recall) from positives_placed) as recall,
    (select sum(gap * num_rows) / sum(num_rows) from bins) as ece,
    probabilities.relative_calibration
from probabilities
cross join over_ties
"""

SERVED_ROWS = """
with shown as (
    select
        user_id as group_id,
        request_ts,
        unnest(list_filter(candidates, lambda candidate: candidate.shown)) as candidate
    from forward_log
    where request_ts < $until::timestamptz
),

acted as (
    select impression_id, min(event_ts) as event_ts
    from events
    where event_type = $head
    group by impression_id
)

select
    shown.candidate.impression_id as row_id,
    shown.group_id,
    shown.candidate.note_id as note_id,
    coalesce(acted.event_ts < shown.request_ts + to_minutes($wait_min::integer), false)::integer as label,
    shown.candidate.predictions[$head]::double as score
from shown
left join acted on shown.candidate.impression_id = acted.impression_id
where shown.candidate.predictions[$head] is not null
"""
