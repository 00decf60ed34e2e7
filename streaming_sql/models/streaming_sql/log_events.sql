{# One row per record of the event log, as Kafka delivered it: the one table that feeds every view, because separate sources drift
   apart. Append-only. Heartbeats are ordinary records here; the log's timestamp (LogAppendTime), partition and offset come beside. #}
{{ config(materialized='table_with_connector') }}

create table {{ this }} (
    event_id varchar,
    event_type varchar,
    user_id varchar,
    note_id varchar,
    author_id varchar,
    surface varchar,
    request_id varchar,
    impression_id varchar,
    event_ts timestamptz,
    retracts varchar,
    properties jsonb
)
append only
include timestamp as kafka_timestamp
include partition as kafka_partition
include offset as kafka_offset
with (
    connector = 'kafka',
    topic = '{{ var("kafka_topic") }}',
    properties.bootstrap.server = '{{ var("kafka_brokers") }}',
    scan.startup.mode = 'earliest'
)
format plain encode json
