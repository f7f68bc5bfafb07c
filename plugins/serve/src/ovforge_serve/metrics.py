"""What /metrics shows, in Prometheus' text format."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from ovforge.model import Timings
from ovforge_serve.pipelines import Loadable, Pipelines, resident_memory

__all__ = ["Metrics"]

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)


class Metrics:
    """Counters of one server."""

    def __init__(self, pipelines: Pipelines) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter(
            "ovforge_requests", "Requests, by route and status.", ["route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "ovforge_request_seconds", "Time of requests, waiting included.", ["route"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.stages = Histogram(
            "ovforge_stage_seconds", "Time of each stage of a run.", ["pipeline", "stage"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.waited = Histogram(
            "ovforge_queue_seconds", "Time that requests waited for their turn.", ["pipeline"],
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self.waiting = Gauge("ovforge_waiting", "Requests that wait for their turn.", registry=registry)
        self.running = Gauge("ovforge_running", "Runs that go on.", ["pipeline"], registry=registry)
        self.refused = Counter("ovforge_refused", "Requests that found the queue full.", registry=registry)
        self.joined = Counter("ovforge_joined", "Requests that ran as one with others.", registry=registry)
        memory = Gauge("ovforge_resident_bytes", "Memory that the process holds.", registry=registry)
        memory.set_function(lambda: float(resident_memory()))
        loaded = Gauge("ovforge_loaded", "Whether a pipeline or model is loaded.", ["pipeline"], registry=registry)
        for served in pipelines.all():
            loaded.labels(served.name).set_function(partial(_is_loaded, served))

    def count(self, pipeline: str, timings: Timings) -> None:
        """Add the stages of one run."""
        for row in timings.rows():
            self.stages.labels(pipeline, row.name).observe(row.seconds)

    def text(self) -> bytes:
        """Return the page."""
        return generate_latest(self._registry)


def _is_loaded(served: Loadable) -> float:
    return float(served.content is not None)
