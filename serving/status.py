"""Where a server stands: told by `/v1/status`, and as gauges by `/metrics`."""

import functools
import os
from collections.abc import Callable
from typing import Any

from serving import answers
from serving.caches import CACHES
from serving.engine import Engine
from serving.metrics import Metrics
from serving.models import MEMOS


def status_of(engine: Engine) -> dict[str, Any]:
    world, forward_log = engine.world, engine.forward_log
    known: dict[str, Any] = {
        "ready": not engine.missing(),
        "missing": engine.missing(),
        "degraded": engine.troubles(),
        "clock": answers.instant(engine.clock.now_us()),
    }
    if engine.seat is not None:
        known |= {"worker": engine.seat.number, "pid": os.getpid(), "leads": engine.seat.leads}
    if world is None or forward_log is None or engine.log is None:
        return known
    view = world.store.view()
    return known | {
        "tick": answers.instant(view.tick_us),
        "position": list(view.position),
        "logEnd": list(engine.log.end()),
        "modelVersions": dict(world.models.versions),
        "declarationsHash": world.declarations_hash,
        "featureGroups": {name: len(group.feature_names) + len(group.sequence_names) for name, group in world.groups.items()},
        "notes": len(world.catalogue),
        "readers": len(world.readers),
        "caches": {
            name: {"entries": len(cache), "hits": cache.num_hits, "shared": cache.num_shared, "misses": cache.num_misses}
            for name, cache in world.caches.by_name().items()
        }
        | {
            name: {"entries": len(memo), "hits": memo.num_hits, "misses": memo.num_misses}
            for name, memo in world.models.memos().items()
        },
        "forwardLog": {
            "written": forward_log.num_written,
            "waiting": forward_log.num_waiting,
            "dropped": forward_log.num_dropped,
            "failedWrites": forward_log.num_failed_writes,
        },
    }


def watch(metrics: Metrics, engine: Engine) -> None:
    def of_log(name: str) -> Callable[[], float]:
        return lambda: float(getattr(engine.forward_log, name, 0) or 0)

    def tick_age_s() -> float:
        world = engine.world
        return (engine.clock.now_us() - world.store.view().tick_us) / 1e6 if world else float("nan")

    def away_s() -> float:
        cluster = engine.world.cluster if engine.world else None
        return cluster.away_s if cluster else 0.0

    def head_events() -> float:
        return float(engine.world.store.num_head_events()) if engine.world else float("nan")

    def of_cache(name: str, result: str) -> float:
        world = engine.world
        kept = (world.caches.by_name() | world.models.memos()).get(name) if world else None
        return float(getattr(kept, f"num_{result}", 0))

    for name in (*CACHES, *MEMOS):
        metrics.cache(name, functools.partial(of_cache, name))
    metrics.versions(lambda: engine.world.models.versions if engine.world else {})
    metrics.gauge("ready", "1 when feeds are answered", lambda: 0.0 if engine.missing() else 1.0)
    metrics.gauge("features_away_seconds", "How long RisingWave has not answered; 0 while it does", away_s)
    metrics.gauge("head_events", "Events in memory that no tick holds yet, each group's own counted", head_events)
    metrics.gauge("tick_age_seconds", "Server clock minus T; above 900 the stream is stuck", tick_age_s)
    metrics.gauge("forward_log_waiting", "Requests that wait for the lake", of_log("num_waiting"))
    metrics.gauge("forward_log_written", "Requests written to the lake since the start", of_log("num_written"))
    metrics.gauge("forward_log_dropped", "Requests lost because the queue was full", of_log("num_dropped"))
    metrics.gauge(
        "forward_log_failed_writes", "Writes to the lake that failed and were tried again", of_log("num_failed_writes")
    )
