"""The gateway's metrics, for Prometheus and `llm-ray serve status`, by requested model or adapter."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from llm_ray.serve.directory import Deployed

disable_created_metrics()

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_WINDOW = 60.0
# Label of requests that reach no model.
NO_MODEL = "-"


class Metrics:
    """Counters by model, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        common: Any = {"labelnames": ["model"], "registry": self.registry}
        self._requests = Counter(
            "llm_ray_requests", "Finished requests, by HTTP status", ["model", "status"], registry=self.registry
        )
        self._errors = Counter("llm_ray_request_errors", "Requests that failed on the server's side (5xx)", **common)
        self._running = Gauge(
            "llm_ray_requests_in_progress", "Requests accepted and not yet answered, including queued ones", **common
        )
        self._waiting = Gauge(
            "llm_ray_requests_queued", "Requests queued because all replicas are at their limit", **common
        )
        self._prompt = Counter("llm_ray_prompt_tokens", "Prompt tokens", **common)
        self._generated = Counter("llm_ray_generated_tokens", "Generated tokens", **common)
        self._first = Histogram(
            "llm_ray_time_to_first_token_seconds",
            "Time from the request to the first token of a streamed answer",
            buckets=_SECONDS,
            **common,
        )
        self._each = Histogram(
            "llm_ray_time_per_output_token_seconds",
            "Time per token from the first token of a streamed answer to the last",
            buckets=_TOKEN_SECONDS,
            **common,
        )
        self._whole = Histogram(
            "llm_ray_request_seconds", "Time from the request to the end of its answer", buckets=_SECONDS, **common
        )
        self._replicas = Gauge("llm_ray_model_replicas", "Ready replicas of a model", **common)
        self._sums: defaultdict[str, _Sums] = defaultdict(_Sums)

    def begin(self, model: str) -> Watch:
        """Starts tracking a request to `model`."""
        self._running.labels(model).inc()
        self._sums[model].in_progress += 1
        return Watch(self, model)

    def refuse(self, status: int) -> None:
        """Counts a request that was refused before it reached a model."""
        self._count(NO_MODEL, status)

    def _count(self, model: str, status: int) -> None:
        self._requests.labels(model, str(status)).inc()
        self._sums[model].requests += 1
        if status >= 500:
            self._errors.labels(model).inc()
            self._sums[model].errors += 1

    def _end(self, watch: Watch) -> None:
        model, now, sums = watch.model, time.monotonic(), self._sums[watch.model]
        self._running.labels(model).dec()
        sums.in_progress -= 1
        self._count(model, watch.status)
        self._whole.labels(model).observe(now - watch.began)
        self._prompt.labels(model).inc(watch.prompt_tokens)
        self._generated.labels(model).inc(watch.generated_tokens)
        sums.prompt_tokens += watch.prompt_tokens
        sums.generated_tokens += watch.generated_tokens
        if watch.first is not None:
            self._first.labels(model).observe(watch.first - watch.began)
            if watch.generated_tokens > 1:
                self._each.labels(model).observe((now - watch.first) / (watch.generated_tokens - 1))
        sums.recent.append((now, watch.generated_tokens))
        sums.forget(now)

    def set_models(self, models: Mapping[str, Deployed]) -> None:
        """Updates the gauges to the deployed models. Counters of removed models stay, as Prometheus requires."""
        self._replicas.clear()
        self._waiting.clear()
        for name, entry in models.items():
            running = sum(self._sums[called].in_progress for called in (name, *entry.model.adapters))
            self._replicas.labels(name).set(entry.replicas)
            self._waiting.labels(name).set(max(0, running - entry.replicas * entry.model.max_batch))

    def in_progress(self) -> int:
        """Returns the number of accepted requests without a complete answer, over all models."""
        return sum(sums.in_progress for sums in self._sums.values())

    def text(self) -> bytes:
        """Returns the metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def summary(self, model: str) -> dict[str, float]:
        """Returns requests, errors and tokens since the gateway started, requests in progress, and generated tokens/s
        over the last minute."""
        sums = self._sums[model]
        sums.forget(time.monotonic())
        return {
            "requests": sums.requests,
            "errors": sums.errors,
            "in_progress": sums.in_progress,
            "prompt_tokens": sums.prompt_tokens,
            "generated_tokens": sums.generated_tokens,
            "tokens_per_second": round(sum(tokens for _, tokens in sums.recent) / _WINDOW, 1),
        }


@dataclass
class _Sums:
    requests: int = 0
    errors: int = 0
    in_progress: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    recent: deque[tuple[float, int]] = field(default_factory=deque)
    """End time and tokens of recent answers."""

    def forget(self, now: float) -> None:
        while self.recent and self.recent[0][0] < now - _WINDOW:
            self.recent.popleft()


class Watch:
    """Tracks one request. Only the first call of `end` counts."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics: Metrics | None = metrics
        self.model = model
        self.began = time.monotonic()
        self.first: float | None = None
        self.prompt_tokens = 0
        self.generated_tokens = 0
        self.status = 499  # unless set otherwise: cancelled, by a disconnect or a timeout
        """HTTP status; 5xx for a stream that breaks, although its headers said 200."""

    def token(self) -> None:
        """Records the first piece of a streamed answer."""
        if self.first is None:
            self.first = time.monotonic()

    def usage(self, prompt_tokens: int, generated_tokens: int) -> None:
        self.prompt_tokens, self.generated_tokens = prompt_tokens, generated_tokens

    @property
    def ended(self) -> bool:
        return self._metrics is None

    def end(self, status: int | None = None) -> None:
        if self._metrics:
            metrics, self._metrics = self._metrics, None
            self.status = status or self.status
            metrics._end(self)
