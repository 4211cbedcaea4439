"""The other routes: models, a model's own, tokens, health, readiness, counters, the description of it all."""

from __future__ import annotations

import json
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
MESSAGES = [{"role": "user", "content": QUESTION}]
SETTINGS: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0}
JSON = {"Accept": "application/json"}


def counted(http: httpx.Client, model: str) -> dict[str, float]:
    """The counters of a model, those of a status under name/status."""
    found = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            if sample.labels.get("model") == model and "le" not in sample.labels:
                status = sample.labels.get("status")
                found[sample.name.removeprefix("llm_ray_") + (f"/{status}" if status else "")] = sample.value
    return found


def test_models_are_listed_and_told(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert {"small", "tuned", "team/other"} <= set(listed)
    for name in ("small", "team/other"):
        assert client.models.retrieve(name) == listed[name]
    assert listed["small"].created > 1_700_000_000
    assert (listed["small"].owned_by, listed["small"].object) == ("llm-ray", "model")


def test_a_models_own_route(http: httpx.Client) -> None:
    for text in (QUESTION, MESSAGES):
        answer = http.post("/small", json={"text": text, "config": SETTINGS})
        assert (answer.text, answer.headers["content-type"]) == (ANSWER, "text/plain; charset=utf-8")
    greedy = {"max_new_tokens": 16, "do_sample": False, "top_k": 5, "repetition_penalty": 1.0, "seed": 1}
    assert http.post("/small", json={"text": QUESTION, "config": greedy}).text == ANSWER
    assert http.post("/small", json={"text": [QUESTION, QUESTION], "config": SETTINGS}).json() == [ANSWER, ANSWER]
    assert http.post("/small", json={"text": [QUESTION], "config": SETTINGS}).json() == [ANSWER]
    with http.stream("POST", "/small", json={"text": QUESTION, "config": SETTINGS, "stream": True}) as streamed:
        pieces = list(streamed.iter_text())
    assert ("".join(pieces), len(pieces) > 1) == (ANSWER, True)
    told = http.post("/small", json={"text": QUESTION, "config": SETTINGS}, headers=JSON).json()
    assert (told["text"], told["finish_reason"], told["model"]) == (ANSWER, "stop", "small")
    assert told["usage"]["total_tokens"] == told["usage"]["prompt_tokens"] + told["usage"]["completion_tokens"]
    several = http.post("/small", json={"text": [QUESTION, "Hi"], "config": SETTINGS}, headers=JSON).json()
    assert (several[0]["text"], len(several)) == (ANSWER, 2)
    stopped = http.post(
        "/small", json={"text": QUESTION, "config": SETTINGS | {"stop": ["France"]}}, headers=JSON
    ).json()
    assert (stopped["text"], stopped["finish_reason"]) == ("The capital of ", "stop")
    assert http.post("/team/other", json={"text": QUESTION, "config": SETTINGS}).text == ANSWER


def test_tokens_of_texts_and_conversations(http: httpx.Client, client: openai.OpenAI) -> None:
    told = http.post("/tokenize", json={"model": "small", "prompt": "hello 🦦", "return_token_strs": True}).json()
    assert (told["count"], told["max_model_len"]) == (len(told["tokens"]), 512)
    assert len(told["token_strs"]) == told["count"]
    assert http.post("/detokenize", json={"model": "small", "tokens": told["tokens"]}).json() == {"prompt": "hello 🦦"}
    tokens = http.post("/tokenize", json={"model": "tuned", "messages": MESSAGES}).json()["tokens"]
    text = http.post("/detokenize", json={"model": "small", "tokens": tokens}).json()["prompt"]
    assert text.endswith(f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")
    answer = client.completions.create(model="small", prompt=tokens, max_tokens=16, temperature=0)
    assert answer.choices[0].text == ANSWER
    empty = http.post("/tokenize", json={"model": "small", "prompt": ""}).json()
    assert empty["tokens"] == []


def test_health_and_readiness(http: httpx.Client) -> None:
    assert http.get("/health").json() == {"status": "ok"}
    assert http.get("/ready").json() == {"ready": True, "models": {"small": "ready", "team/other": "ready"}}


def test_requests_are_counted(http: httpx.Client) -> None:
    before, strangers = counted(http, "small"), counted(http, "-")
    tuned = counted(http, "tuned")
    ask = {"model": "small", "prompt": "One two", "max_tokens": 5, "ignore_eos": True}
    prompt = http.post("/v1/completions", json=ask).json()["usage"]["prompt_tokens"]
    http.post("/v1/completions", json=ask | {"stream": True})
    http.post("/v1/completions", json=ask | {"model": "tuned"})
    http.post("/v1/completions", json=ask | {"max_tokens": 9999})
    http.post("/v1/completions", json=ask | {"max_tokens": "many"})
    http.post("/v1/completions", json=ask | {"model": "nobody"})
    http.get("/nothing/at/all")
    after = counted(http, "small")

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert (grown("requests_total/200"), grown("requests_total/400")) == (2, 1)
    assert (grown("generated_tokens_total"), grown("prompt_tokens_total")) == (10, 2 * prompt)
    assert (grown("time_to_first_token_seconds_count"), grown("time_per_output_token_seconds_count")) == (1, 1)
    assert grown("request_seconds_count") == 3
    assert 0 < grown("time_to_first_token_seconds_sum") < grown("request_seconds_sum")
    assert (after["requests_in_progress"], after["requests_queued"], after["model_replicas"]) == (0, 0, 1)
    assert after.get("request_errors_total", 0) == before.get("request_errors_total", 0)
    assert counted(http, "tuned")["generated_tokens_total"] - tuned.get("generated_tokens_total", 0) == 5
    refused = counted(http, "-")
    assert refused["requests_total/400"] - strangers.get("requests_total/400", 0) == 1
    assert refused["requests_total/404"] - strangers.get("requests_total/404", 0) == 2


def test_it_describes_itself(http: httpx.Client) -> None:
    told = http.get("/openapi.json").json()
    operations = {
        (path, method): operation for path, methods in told["paths"].items() for method, operation in methods.items()
    }
    assert ("/v1/chat/completions", "post") in operations
    for operation in operations.values():
        assert operation["summary"]
        assert "422" not in operation["responses"]
        assert operation["responses"]["default"]["content"]["application/json"]["schema"]["$ref"].endswith("/Error")
    answers = operations["/v1/chat/completions", "post"]["responses"]["200"]["content"]
    assert set(answers) == {"application/json", "text/event-stream"}
    assert "securitySchemes" not in told["components"]


def test_the_status_is_told(run: Any, base: str, http: httpx.Client) -> None:
    told = json.loads(run("serve", "status", "--json").stdout)
    assert told["url"] == f"{base}/v1"
    assert told["models"]["small"]["ready"] is True
    assert "small" in run("serve", "status").stdout
    assert "POST" in run("serve", "logs", "gateway").stdout
