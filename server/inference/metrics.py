"""Prometheus metrics of one server, in their own collector registry."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from reftserve.server.engine.messages import EngineStats

GAUGES = ("running", "waiting", "kv_blocks_used", "kv_blocks_total", "bank_rows_used", "bank_rows_total")
COUNTERS = ("steps", "prompt_tokens", "cached_prompt_tokens", "generated_tokens", "preemptions")
LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The metrics. engine_stats: returns the engine's latest statistics, None before its first step."""

    def __init__(self, engine_stats: Callable[[], EngineStats | None]) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "reftserve_requests", "Generation and scoring requests, by outcome", ["outcome"], registry=self.registry
        )
        self.first_token_s = Histogram(
            "reftserve_time_to_first_token_seconds",
            "Time from a request's arrival to its first token",
            buckets=LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.engine_starts = Counter("reftserve_engine_starts", "Starts of the engine", registry=self.registry)
        self.ready = Gauge("reftserve_ready", "1 when model and database are available", registry=self.registry)
        self.registry.register(_EngineCollector(engine_stats))

    @contextmanager
    def request(self, *, is_metered: bool) -> Iterator[FirstTokenTimer]:
        """Count a request by its outcome: finished, error, or cancelled when the client disconnects."""
        if not is_metered:
            yield FirstTokenTimer(None)
            return
        outcome = "finished"
        try:
            yield FirstTokenTimer(self.first_token_s)
        except Exception:
            outcome = "error"
            raise
        except BaseException:  # a closed generator, a cancelled task
            outcome = "cancelled"
            raise
        finally:
            self.requests.labels(outcome).inc()

    def render(self) -> bytes:
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class FirstTokenTimer:
    """Measures a request's time to its first token, once. histogram: None records nothing."""

    def __init__(self, histogram: Histogram | None) -> None:
        self._histogram = histogram
        self._began = time.monotonic()

    def first_token(self) -> None:
        """Observe the time at the first call; later calls do nothing."""
        if self._histogram is not None:
            self._histogram.observe(time.monotonic() - self._began)
            self._histogram = None


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats | None]) -> None:
        self._stats = stats

    def collect(self) -> list[Metric]:
        stats = self._stats()
        counters: list[Metric] = [
            CounterMetricFamily(f"reftserve_engine_{name}", f"Engine: {name}", value=getattr(stats, name, 0))
            for name in COUNTERS
        ]
        if stats is None:
            return counters
        return counters + [
            GaugeMetricFamily(f"reftserve_engine_{name}", f"Engine: {name}", value=getattr(stats, name))
            for name in GAUGES
        ]
