"""What the server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "rode_requests",
            "Chat completions by the status that they ended with",
            ["status"],
            registry=registry,
        )
        self.tokens = Counter(
            "rode_tokens",
            "Tokens of prompts (pictures included) and of answers",
            ["model", "kind"],
            registry=registry,
        )
        self.waiting = Gauge("rode_waiting_requests", "Requests in the queue", registry=registry)
        self.running = Gauge("rode_running_requests", "Requests that are answered now", registry=registry)
        self.batches = Histogram(
            "rode_batch_size",
            "Requests answered together",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.first_token = Histogram(
            "rode_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_SECONDS,
            registry=registry,
        )
        self.duration = Histogram(
            "rode_request_seconds",
            "From a request's arrival to the end of its answer",
            buckets=_SECONDS,
            registry=registry,
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
