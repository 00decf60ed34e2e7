{# The rows of closed ticks into stream.note_engagement of the lake's catalogue, each once. #}
{{ config(materialized='sink', connector='iceberg', connector_parameters=lake_sink_parameters('note_engagement')) }}

{{ closed_rows(feature_group('note_engagement'), ref('note_engagement'), ref('closed_tick')) }}
