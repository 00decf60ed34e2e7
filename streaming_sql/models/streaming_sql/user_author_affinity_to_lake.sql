{# The rows of closed ticks into stream.user_author_affinity of the lake's catalogue, each once. #}
{{ config(materialized='sink', connector='iceberg', connector_parameters=lake_sink_parameters('user_author_affinity')) }}

{{ closed_rows(feature_group('user_author_affinity'), ref('user_author_affinity'), ref('closed_tick')) }}
