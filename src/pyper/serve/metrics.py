"""What /metrics shows, in Prometheus' text format."""

from collections.abc import Callable, Sequence
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from pyper.generate import EngineStats, Event

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of one server."""

    def __init__(self, experts: Sequence[str], stats: Callable[[], EngineStats]) -> None:
        self._experts = experts
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._requests = Counter(
            "pyper_requests", "Answered requests", ["path", "status"], registry=registry
        )
        self._seconds = Histogram(
            "pyper_request_seconds", "From a request's head to its last byte", ["path"],
            registry=registry,
        )  # fmt: skip
        first = Histogram(
            "pyper_first_token_seconds", "From the body to the first token", registry=registry
        )
        self.observe_first_token = first.observe
        """After the first token of a request: seconds."""
        self._tokens = Counter(
            "pyper_written_tokens", "By the expert with the largest weight", ["expert"],
            registry=registry,
        )  # fmt: skip
        for field, help_text in _GAUGES.items():
            gauge = Gauge(f"pyper_{field}", help_text, registry=registry)
            gauge.set_function(partial(_field_of, stats, field))

    def count_request(self, path: str, status: int, seconds: float) -> None:
        """After each answer."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def count_tokens(self, events: Sequence[Event]) -> None:
        """After each step of the engine."""
        for event in events:
            if event.token is not None:
                self._tokens.labels(self._experts[event.expert]).inc()

    def to_text(self) -> bytes:
        """The whole page."""
        return generate_latest(self._registry)


def _field_of(stats: Callable[[], EngineStats], field: str) -> float:
    return float(getattr(stats(), field))


_GAUGES = {
    "running": "Sequences that are being written",
    "waiting": "Sequences that wait for a place",
    "cache_tokens_used": "Tokens of keys and values held now",
    "cache_tokens_total": "Tokens of keys and values that can be held",
    "prefill_tokens": "Prompt tokens read since the start",
    "decoded_tokens": "Tokens written since the start",
    "reused_tokens": "Prompt tokens that needed no reading: another request had read them",
    "resident_experts": "Experts in memory",
    "guessed_tokens": "Tokens read on trial since the start (`--speculate`, `--draft`)",
    "accepted_tokens": "Of those the ones that came",
}
