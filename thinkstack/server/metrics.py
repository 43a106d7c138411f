"""Metrics for Prometheus: the state of each member, latencies of its tokens, and requests by route and status.

The state is read when it is asked for. Latencies are observed once per update of a stream, in the event loop alone.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from thinkstack.engine.interface import ServiceStatus

if TYPE_CHECKING:
    from thinkstack.server.served import Member

FIRST_TOKEN_BOUNDS = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0)
BETWEEN_TOKENS_BOUNDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
"""Upper bounds of the buckets, in seconds."""


class Histogram:
    """Counts of values in buckets; for one thread."""

    def __init__(self, bounds: tuple[float, ...]):
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """Add `count` equal values."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """(upper bound, number of values up to it), as Prometheus has them."""
        found, total = [], 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            found.append((str(bound), float(total)))
        return found


@dataclass
class Latencies:
    """How fast the requests of one member get their tokens."""

    first_token: Histogram = field(default_factory=lambda: Histogram(FIRST_TOKEN_BOUNDS))
    """Seconds from the admission to the first token."""
    between_tokens: Histogram = field(default_factory=lambda: Histogram(BETWEEN_TOKENS_BOUNDS))
    """Seconds between two tokens of one choice."""


def kv_cache_usage(status: ServiceStatus) -> float | None:
    """The part of the KV cache that running requests hold, 0 to 1; cached prefixes count as free. None: the cache is
    on other servers."""
    return 1 - status.free_blocks / status.num_blocks if status.num_blocks else None


STATE: tuple[tuple[type[Metric], str, str, Callable[[ServiceStatus], float | None]], ...] = (
    (GaugeMetricFamily, "num_requests_waiting", "Requests in the queue.", lambda status: status.waiting),
    (GaugeMetricFamily, "num_requests_running", "Sequences that run.", lambda status: status.running),
    (GaugeMetricFamily, "kv_cache_usage", "Part of the KV cache in use, 0 to 1.", kv_cache_usage),
    (GaugeMetricFamily, "engine_up", "1 unless the engine has failed.", lambda status: float(status.failure is None)),
    (CounterMetricFamily, "generation_tokens", "Tokens sampled.", lambda status: status.num_sampled),
    (CounterMetricFamily, "preemptions", "Sequences that lost their memory.", lambda status: status.num_preemptions),
    (CounterMetricFamily, "steps", "Steps of the engine.", lambda status: status.num_steps),
    (CounterMetricFamily, "step_seconds", "Seconds in steps.", lambda status: status.step_seconds),
)
"""(kind, name, meaning, value) of the metrics of a member."""


class Metrics:
    """All metrics of one server, in a registry of its own."""

    def __init__(self, members: Mapping[str, "Member"]):
        self._members = members
        self._registry = CollectorRegistry()
        self._registry.register(self)
        self._requests = Counter(
            "thinkstack_requests", "Requests by route and status.", ["route", "status"], registry=self._registry
        )

    def count_request(self, route: str, status: int) -> None:
        """Count a request that has ended. route: the path with the names of its parameters."""
        self._requests.labels(route, str(status)).inc()

    def text(self) -> bytes:
        """The metrics in the text format of Prometheus."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The metrics of the members; called by the registry."""
        statuses = {name: member.service.status for name, member in self._members.items()}
        for kind, name, meaning, value in STATE:
            family = kind(f"thinkstack_{name}", meaning, labels=["member"])  # type: ignore[call-arg, arg-type]
            for member, status in statuses.items():
                if (found := value(status)) is not None:
                    family.add_metric([member], found)  # type: ignore[attr-defined]
            yield family
        first = HistogramMetricFamily(
            "thinkstack_time_to_first_token_seconds", "Seconds to the first token.", labels=["member"]
        )
        between = HistogramMetricFamily(
            "thinkstack_inter_token_latency_seconds", "Seconds between two tokens.", labels=["member"]
        )
        for name, latencies in ((name, member.latencies) for name, member in self._members.items()):
            first.add_metric([name], latencies.first_token.buckets(), latencies.first_token.sum)
            between.add_metric([name], latencies.between_tokens.buckets(), latencies.between_tokens.sum)
        yield first
        yield between
