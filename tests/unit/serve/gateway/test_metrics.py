"""What the gateway counts."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from llm_ray.serve.directory import Deployed
from llm_ray.serve.gateway.metrics import NO_MODEL, Metrics
from llm_ray.serve.models import Adapter, ServedModel


def counted(metrics: Metrics) -> dict[tuple[str, ...], float]:
    families = text_string_to_metric_families(metrics.text().decode())
    return {
        (s.name.removeprefix("llm_ray_"), *s.labels.values()): s.value for family in families for s in family.samples
    }


def test_a_streamed_answer_is_counted_once() -> None:
    metrics = Metrics()
    watch = metrics.begin("m")
    assert metrics.in_progress() == 1
    watch.token()
    watch.token()
    watch.usage(10, 5)
    watch.end(200)
    watch.end(500)
    found = counted(metrics)
    assert found["requests_total", "m", "200"] == 1
    assert found["prompt_tokens_total", "m"] == 10
    assert found["generated_tokens_total", "m"] == 5
    assert found["time_to_first_token_seconds_count", "m"] == 1
    assert found["time_per_output_token_seconds_count", "m"] == 1
    assert found["requests_in_progress", "m"] == 0
    assert metrics.summary("m")["generated_tokens"] == 5
    assert metrics.summary("m")["errors"] == 0


def test_an_answer_in_one_piece_has_no_first_token() -> None:
    metrics = Metrics()
    watch = metrics.begin("m")
    watch.usage(10, 5)
    watch.end(200)
    found = counted(metrics)
    assert ("time_to_first_token_seconds_count", "m") not in found
    assert found["request_seconds_count", "m"] == 1


def test_failures_of_ours_and_requests_without_a_model_are_told_apart() -> None:
    metrics = Metrics()
    metrics.begin("m").end(503)
    metrics.begin("m").end()
    metrics.refuse(404)
    found = counted(metrics)
    assert found["request_errors_total", "m"] == 1
    assert found["requests_total", "m", "499"] == 1
    assert found["requests_total", NO_MODEL, "404"] == 1
    assert metrics.summary("m")["requests"] == 2


def test_what_the_replicas_do_not_take_waits_and_models_that_are_gone_have_no_gauges() -> None:
    metrics = Metrics()
    model = ServedModel("m", Path("m"), max_batch=2, adapters={"a": Adapter("a", "1")})
    for name in ("m", "m", "a", "a"):
        metrics.begin(name)
    metrics.set_models({"m": Deployed(model, "RUNNING", "", replicas=1, wanted=1, created=0)})
    assert counted(metrics)["requests_queued", "m"] == 2
    assert counted(metrics)["model_replicas", "m"] == 1
    metrics.set_models({})
    assert ("requests_queued", "m") not in counted(metrics)
    assert counted(metrics)["requests_in_progress", "a"] == 2
