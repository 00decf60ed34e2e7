{# The whole of a model `impression_<group>`: one row per impression with the group's features, each at the impression's own t, T and K.

   On DuckDB the model's SQL is the spine alone: `meta.features_of` asks the plugin for the features, which gives them by the engine of
   `headrace features compute`, in chunks. `--vars 'features_by: sql'` writes point_in_time out instead: equal rows, many times
   slower, to be read. Any other engine runs that SQL. #}
{% macro impression_features(group) -%}
    {%- set by_engine = target.type == 'duckdb' and var('features_by') == 'engine' -%}
    {%- set features = feature_group(group) -%}
    {%- set of_entity = features['keys'] | length - features['calendar'] | length -%}
    {%- set spine -%}
select
    impression_id,
    {%- for key in features['keys'][:of_entity] %}
    {{ key }},
    {%- endfor %}
    request_ts,
    feature_watermark,
    feature_watermark as known_at,
    cast(null as bigint[]) as known_position,
    labels_known_at
from {{ ref('impressions') }}
where {{ in_build_range('labels_known_at') }}
    {%- endset -%}
    {%- if by_engine -%}
{{ config(meta={'features_of': group}) }}
{{- '-- The spine. Each row is given the features of ' ~ group ~ ', of events before feature_watermark that were known at known_at;' }}
-- fresh ones of events before request_ts that had landed by then (or lie before known_position).
{% for relation in (ref(group), ref(group ~ '_1h'), ref(group ~ '_1d'), ref('stg_engagements'), ref('stg_shadowed_arrivals'), ref('stg_retractions')) -%}
-- depends_on: {{ relation }}
{% endfor -%}
{{ spine }}
    {%- else -%}
with spine as (
    {{ spine | replace('impression_id,', 'impression_id as row_id,') | indent(4) }}
),

features as (
    {{ features_at(group, 'spine') | indent(4) }}
)

select
    features.row_id as impression_id,
    spine.labels_known_at,
    features.* exclude (row_id)
from features
inner join spine on features.row_id = spine.row_id
    {%- endif -%}
{%- endmacro %}
