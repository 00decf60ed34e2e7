{# The rows of closed ticks into stream.user_activity of the lake's catalogue, each once. #}
{{ config(materialized='sink', connector='iceberg', connector_parameters=lake_sink_parameters('user_activity')) }}

{{ closed_rows(feature_group('user_activity'), ref('user_activity'), ref('closed_tick')) }}
