"""The event log that a home uses: the embedded one, or a Kafka topic where settings or HEADRACE_EVENT_LOG name one."""

from streaming_sql.event_log import EventLog, Log
from streaming_sql.kafka_address import KafkaAddress
from streaming_sql.kafka_log import KafkaLog
from streaming_sql.lander import newest_landed_us
from streaming_sql.settings import StreamSettings
from warehouse.clock import Clock
from warehouse.errors import HeadraceError
from warehouse.home import Home
from warehouse.lake import Lake
from warehouse.landing import create_tables, landed_position

SQLITE = "sqlite"


def open_log(home: Home, lake: Lake, clock: Clock, settings: StreamSettings | None = None) -> Log:
    """The home's event log; a new one continues the lake's offsets and landing times.

    Raises HeadraceError if the log cannot be opened, or if `event_log` names none.
    """
    where = (settings or StreamSettings.from_env()).event_log
    create_tables(lake)
    start = landed_position(lake)
    if where == SQLITE:
        return EventLog.open(home.log, len(start), clock, start, newest_landed_us(lake))
    if where.startswith("kafka:"):
        return KafkaLog.open(KafkaAddress.parse(where), len(start), clock, start, newest_landed_us(lake))
    raise HeadraceError(f"event_log is sqlite or kafka://BROKER:PORT/TOPIC, got {where.split('?')[0]!r}")


def has_log(home: Home, settings: StreamSettings) -> bool:
    """Whether there is a log to look into without making one."""
    return settings.event_log != SQLITE or (home.log / "events.db").exists()
