"""What is said of a view whose head had no room for all events since its tick."""

from streaming_sql.online_store import StoreView
from streaming_sql.runner_report import iso

SHORT = "head_shortened"


def words_of(view: StoreView) -> list[str]:
    """For `degraded` of an answer."""
    return [SHORT] if view.lacks_events else []


def troubles_of(view: StoreView) -> list[str]:
    """For an operator."""
    if not view.lacks_events:
        return []
    return [
        f"no tick has come since {iso(view.tick_us)}, and the oldest events since were dropped (features_head_events): "
        "event-fresh features lack them until one comes"
    ]
