"""What the gateway counts of each model, for Prometheus and `llm-ray serve status`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_WINDOW = 60.0


class Metrics:
    """Counters by model, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter("llm_ray_requests", "Requests answered, by HTTP status", ["model", "status"], registry=self._registry)
        self._errors = Counter("llm_ray_request_errors", "Requests that failed on our side (5xx)", ["model"], registry=self._registry)
        self._running = Gauge("llm_ray_requests_in_progress", "Requests taken in and not answered yet", ["model"], registry=self._registry)
        self._waiting = Gauge("llm_ray_requests_queued", "Requests that wait for a replica", ["model"], registry=self._registry)
        self._prompt = Counter("llm_ray_prompt_tokens", "Tokens of prompts", ["model"], registry=self._registry)
        self._generated = Counter("llm_ray_generated_tokens", "Tokens of answers", ["model"], registry=self._registry)
        self._first = Histogram(
            "llm_ray_time_to_first_token_seconds",
            "From the request to its first token",
            ["model"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._each = Histogram(
            "llm_ray_time_per_output_token_seconds",
            "From the first token to the last, by token",
            ["model"],
            buckets=_TOKEN_SECONDS,
            registry=self._registry,
        )
        self._whole = Histogram(
            "llm_ray_request_seconds", "From the request to its end", ["model"], buckets=_SECONDS, registry=self._registry
        )
        self._ready = Gauge("llm_ray_model_replicas", "Replicas that answer", ["model"], registry=self._registry)
        self._recent: dict[str, deque[tuple[float, int]]] = {}

    def begin(self, model: str) -> Watch:
        """Begin to watch a request to `model`."""
        self._running.labels(model).inc()
        return Watch(self, model)

    def _end(self, watch: Watch) -> None:
        model, now = watch.model, time.monotonic()
        self._running.labels(model).dec()
        self._requests.labels(model, str(watch.status)).inc()
        if watch.status >= 500:
            self._errors.labels(model).inc()
        self._whole.labels(model).observe(now - watch.began)
        self._prompt.labels(model).inc(watch.prompt_tokens)
        self._generated.labels(model).inc(watch.generated_tokens)
        if watch.first is not None:
            self._first.labels(model).observe(watch.first - watch.began)
            if watch.generated_tokens > 1:
                self._each.labels(model).observe((now - watch.first) / (watch.generated_tokens - 1))
        self._recent.setdefault(model, deque()).append((now, watch.generated_tokens))

    def set_models(self, replicas: dict[str, int], queued: Callable[[str, int], int]) -> None:
        """How many replicas each model has; counters of models that are gone stay, as Prometheus wants it."""
        for model, count in replicas.items():
            self._ready.labels(model).set(count)
            self._waiting.labels(model).set(queued(model, self.in_progress(model)))

    def in_progress(self, model: str) -> int:
        """Requests to `model` taken in and not answered yet."""
        return int(self._running.labels(model)._value.get())

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def summary(self, model: str) -> dict[str, float]:
        """Requests, failures, tokens since the gateway began, and generated tokens/s over the last minute."""
        recent = self._recent.setdefault(model, deque())
        now = time.monotonic()
        while recent and recent[0][0] < now - _WINDOW:
            recent.popleft()
        requests = sum(
            sample.value
            for metric in self._requests.collect()
            for sample in metric.samples
            if sample.name.endswith("_total") and sample.labels["model"] == model
        )
        return {
            "requests": int(requests),
            "errors": int(self._errors.labels(model)._value.get()),
            "in_progress": self.in_progress(model),
            "prompt_tokens": int(self._prompt.labels(model)._value.get()),
            "generated_tokens": int(self._generated.labels(model)._value.get()),
            "tokens_per_second": round(sum(tokens for _, tokens in recent) / _WINDOW, 1),
        }


class Watch:
    """One request, from its arrival to its end. `end` counts once."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics: Metrics | None = metrics
        self.model = model
        self.began = time.monotonic()
        self.first: float | None = None
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.status = 499  # the client was gone, unless something else is said
        """HTTP status; a stream that breaks is a 5xx though its headers said 200."""

    def token(self) -> None:
        """The first piece of the answer is there."""
        if self.first is None:
            self.first = time.monotonic()

    def usage(self, prompt_tokens: int, generated_tokens: int) -> None:
        self.prompt_tokens, self.generated_tokens = prompt_tokens, generated_tokens

    def end(self, status: int | None = None) -> None:
        if self._metrics:
            metrics, self._metrics = self._metrics, None
            self.status = status or self.status
            metrics._end(self)
