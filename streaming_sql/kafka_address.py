"""Where a Kafka event log is: `kafka://broker:9092,broker:9092/topic?partitions=2`, read and checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from urllib.parse import parse_qsl, urlsplit

from warehouse.errors import HeadraceError


@dataclass(frozen=True)
class KafkaAddress:
    """What `kafka://broker:9092,broker:9092/topic?partitions=2` says."""

    brokers: str
    topic: str
    num_partitions: int | None = None
    """Use the first so many of the topic's; all of them when not said."""
    trusts_create_time: bool = False
    """`timestamps=create`: landed_at is what the producer stamped, for brokers that do not stamp and for replays."""
    replicas: int = -1
    """Of a topic that is made now; the broker's default."""
    config: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Settings of librdkafka: every parameter with a dot in its name, such as `security.protocol`."""

    @classmethod
    def parse(cls, url: str) -> "KafkaAddress":
        """Raises HeadraceError with what would be right; the message holds no value of a parameter."""
        parts = urlsplit(url)
        topic = parts.path.strip("/")
        if parts.scheme != "kafka" or not parts.netloc or not topic or "/" in topic:
            raise HeadraceError("a Kafka event log is kafka://BROKER:PORT[,BROKER:PORT]/TOPIC[?partitions=2]")
        given = dict(parse_qsl(parts.query, keep_blank_values=True))
        config = {name: given.pop(name) for name in list(given) if "." in name}
        partitions, timestamps, replicas = (given.pop(name, None) for name in ("partitions", "timestamps", "replicas"))
        if given:
            raise HeadraceError(
                f"a Kafka event log has no parameter {', '.join(sorted(given))}; it has partitions, timestamps, replicas, and "
                "those of librdkafka, which have a dot in their name"
            )
        if timestamps not in (None, "append", "create"):
            raise HeadraceError("timestamps of a Kafka event log is append or create")
        for name, value in (("partitions", partitions), ("replicas", replicas)):
            if value is not None and not (value.isdigit() and int(value) > 0):
                raise HeadraceError(f"{name} of a Kafka event log is a number of at least 1")
        return cls(
            parts.netloc,
            topic,
            int(partitions) if partitions else None,
            timestamps == "create",
            int(replicas) if replicas else -1,
            config,
        )
