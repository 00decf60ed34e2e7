"""Prometheus metrics of one server. Stage latencies, what was degraded, queue and tick: what one looks at at 3 a.m."""

from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 1.2, 2.5, 5.0)
_CANDIDATES = (0, 20, 50, 100, 200, 500, 1000, 2000, 5000)
_FEEDS = (1, 2, 4, 8, 16)


class Metrics:
    """One registry per app, so that several apps in one process (tests) do not share counts. What has labels is a function of
    them."""

    def __init__(self) -> None:
        own = self.registry = CollectorRegistry()
        self.requests = cache(Counter("headrace_http_requests", "Answers", ["route", "status"], registry=own).labels)
        latency = Histogram(
            "headrace_http_request_seconds", "From headers read to body written", ["route"], buckets=_SECONDS, registry=own
        )
        stage = Histogram("headrace_stage_seconds", "One stage of the cascade", ["stage"], buckets=_SECONDS, registry=own)
        self.latency, self.stage = cache(latency.labels), cache(stage.labels)
        self.candidates = Histogram("headrace_candidates", "Candidates of one feed", buckets=_CANDIDATES, registry=own)
        self.side_by_side = Histogram(
            "headrace_side_by_side_feeds", "Feeds that one thread computed together", buckets=_FEEDS, registry=own
        )
        degraded = Counter("headrace_degraded", "Stages skipped or failed, rules relaxed", ["what"], registry=own)
        self.degraded = cache(degraded.labels)
        self.events = cache(Counter("headrace_events", "Events posted", ["status"], registry=own).labels)
        self._cache = Gauge(
            "headrace_cache_answers", "Asked of a cache since the start, by what came of it", ["cache", "result"], registry=own
        )
        self.handed_on = Counter("headrace_handed_on_requests", "Feeds that another worker computed for this one", registry=own)
        self.shed = Counter("headrace_shed_requests", "Requests refused because too many wait", registry=own)
        ProcessCollector(registry=own)  # processor seconds, memory, open files

    def gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A value that is read when it is asked for."""
        Gauge(f"headrace_{name}", what, registry=self.registry).set_function(read)

    def cache(self, name: str, read: Callable[[str], float]) -> None:
        """read: the number of `hits`, `shared` (made for another who asked at the same time) or `misses`."""
        for result in ("hits", "shared", "misses"):
            self._cache.labels(name, result).set_function(partial(read, result))

    def versions(self, read: Callable[[], Mapping[str, str]]) -> None:
        """read: the version of each loaded model."""
        self.registry.register(_Versions(read))

    def text(self) -> bytes:
        return generate_latest(self.registry)


def of_workers(texts: Mapping[int, bytes]) -> bytes:
    """The texts of several workers as one: every sample says whose it is, in its label `worker`."""
    registry = CollectorRegistry()
    registry.register(_OfWorkers(texts))
    return generate_latest(registry)


class _OfWorkers(Collector):
    def __init__(self, texts: Mapping[int, bytes]):
        self._texts = texts

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        for worker, text in self._texts.items():
            for family in text_string_to_metric_families(text.decode()):
                samples = families.setdefault(family.name, Metric(family.name, family.documentation, family.type)).samples
                samples.extend(one._replace(labels={**one.labels, "worker": str(worker)}) for one in family.samples)
        yield from families.values()


class _Versions(Collector):
    """`headrace_model_info{model,version} 1` for the models that are loaded at the moment."""

    def __init__(self, read: Callable[[], Mapping[str, str]]):
        self._read = read

    def collect(self) -> Iterator[GaugeMetricFamily]:
        family = GaugeMetricFamily("headrace_model_info", "Versions of the loaded models", labels=["model", "version"])
        for model, version in self._read().items():
            family.add_metric([model, version], 1.0)
        yield family
