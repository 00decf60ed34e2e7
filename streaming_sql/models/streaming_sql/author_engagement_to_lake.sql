{# The rows of closed ticks into stream.author_engagement of the lake's catalogue, each once. #}
{{ config(materialized='sink', connector='iceberg', connector_parameters=lake_sink_parameters('author_engagement')) }}

{{ closed_rows(feature_group('author_engagement'), ref('author_engagement'), ref('closed_tick')) }}
