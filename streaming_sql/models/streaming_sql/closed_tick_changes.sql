{# Each tick as it closes, so that a server need not ask. #}
{{ config(materialized='subscription', retention='1 day') }}

{{ ref('closed_tick') }}
