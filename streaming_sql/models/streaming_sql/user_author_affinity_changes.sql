{# What changes in user_author_affinity, for servers that read it as it happens (streaming_sql/changes.py). #}
{{ config(materialized='subscription', retention='1 day') }}

{{ ref('user_author_affinity') }}
