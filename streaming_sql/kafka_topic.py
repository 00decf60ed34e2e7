"""The topic of an event log in Kafka, as an administrator sees it: made, checked, trimmed."""

from collections.abc import Sequence
from typing import Any

from streaming_sql.kafka_address import KafkaAddress
from warehouse.errors import HeadraceError

DEADLINE_S = 30.0
"""How long the brokers may take to answer."""


def ready_topic(settings: Any, address: KafkaAddress, num_partitions: int) -> None:
    """Makes the topic if need be. settings: of librdkafka. Raises HeadraceError if it has another number of partitions or
    stamps CreateTime, KafkaException if the brokers say no."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient, ConfigResource, NewTopic

    admin = AdminClient(settings)
    topics = admin.list_topics(timeout=DEADLINE_S).topics
    if address.topic not in topics or not topics[address.topic].partitions:
        config = {"message.timestamp.type": "LogAppendTime", "retention.ms": "-1", "cleanup.policy": "delete"}
        new = NewTopic(address.topic, num_partitions, address.replicas, config=config)
        for made in admin.create_topics([new], operation_timeout=DEADLINE_S).values():
            made.result(DEADLINE_S)
    found = admin.list_topics(address.topic, timeout=DEADLINE_S).topics[address.topic]
    if found.error is not None:
        raise KafkaException(found.error)
    more_will_do = address.num_partitions is not None and len(found.partitions) >= num_partitions
    if len(found.partitions) != num_partitions and not more_will_do:
        raise HeadraceError(
            f"Kafka topic {address.topic!r} has {len(found.partitions)} partitions, the lake {num_partitions}; "
            "they must be the same, since both place an event by its user"
        )
    if address.trusts_create_time:
        return
    (described,) = admin.describe_configs([ConfigResource(ConfigResource.Type.TOPIC, address.topic)]).values()
    stamps = described.result(DEADLINE_S)["message.timestamp.type"].value
    if stamps != "LogAppendTime":
        raise HeadraceError(
            f"Kafka topic {address.topic!r} stamps {stamps}; set message.timestamp.type=LogAppendTime, so that "
            "landed_at is the log's word (or say timestamps=create to believe producers)"
        )


def delete_below(settings: Any, places: Sequence[Any]) -> None:
    """Deletes the records before each place (TopicPartition with an offset)."""
    from confluent_kafka.admin import AdminClient

    for deleted in AdminClient(settings).delete_records(list(places)).values():
        deleted.result(DEADLINE_S)
