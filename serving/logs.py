"""Log lines that say which request they belong to, as text or as JSON. They hold no reader's id: `request_id` leads to the
forward log, which is where it is kept who asked."""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

NONE = "-"
request_id: ContextVar[str] = ContextVar("request_id", default=NONE)
"""Of the request that this task, or the thread that works for it, is answering."""
FORMATS = ("text", "json")
access = logging.getLogger("headrace.access")
"""One line per answer, at INFO; off unless asked for."""


class JsonLines(logging.Formatter):
    """A JSON object per record: time (UTC), level, logger, message, request_id, what `extra={"fields": …}` adds, exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class TextLines(logging.Formatter):
    """`2026-01-01 10:00:00,000 WARNING serving.rank [request_id]: message field=value`."""

    def format(self, record: logging.LogRecord) -> str:
        record.request_id = request_id.get()
        fields = "".join(f" {name}={value}" for name, value in getattr(record, "fields", {}).items())
        return super().format(record) + fields


def configure(form: str, with_access: bool) -> None:
    """Sends everything from INFO on to stderr in one of FORMATS; with_access: a line per answer too."""
    handler = logging.StreamHandler()
    text = TextLines("%(asctime)s %(levelname)s %(name)s [%(request_id)s]: %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    access.setLevel(logging.INFO if with_access else logging.WARNING)
