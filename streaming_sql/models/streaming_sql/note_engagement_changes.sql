{# What changes in note_engagement, for servers that read it as it happens (streaming_sql/changes.py). #}
{{ config(materialized='subscription', retention='1 day') }}

{{ ref('note_engagement') }}
