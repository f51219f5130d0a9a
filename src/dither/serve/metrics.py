"""What Prometheus may ask for. A registry of its own, so that several servers live in one process."""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("dither_requests", "Requests answered, by path and status.", ("path", "status"), registry=registry)
        self.disconnects = Counter("dither_disconnects", "Clients that left before their text was done.", registry=registry)
        self.failures = Counter("dither_failures", "Requests that ended because the model failed.", registry=registry)
        self.prompt_tokens = Counter("dither_prompt_tokens", "Tokens of prompts that were read.", registry=registry)
        self.tokens = Counter("dither_generated_tokens", "Tokens made.", registry=registry)
        self.rows = Counter("dither_step_rows", "Sequences stepped, over all steps; over the count of steps: how full they are.", registry=registry)
        self.active = Gauge("dither_active_sequences", "Texts being made.", registry=registry)
        self.waiting = Gauge("dither_waiting_sequences", "Texts waiting for a slot.", registry=registry)
        self.read_seconds = Histogram("dither_prompt_seconds", "Reading one prompt.", buckets=_SECONDS, registry=registry)
        self.step_seconds = Histogram("dither_step_seconds", "One call of the model for a token each.", buckets=_SECONDS, registry=registry)
        self.first_seconds = Histogram("dither_first_token_seconds", "From arrival to the first token.", buckets=_SECONDS, registry=registry)

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)
