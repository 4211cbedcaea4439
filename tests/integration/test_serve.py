"""The real model behind the endpoint, through the real command, asked by OpenAI's own client."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

LLM_RAY = Path(sys.executable).with_name("llm-ray")
QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """The command, with a home of its own, so that no other deployment is met."""
    home = tmp_path_factory.mktemp("home")

    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LLM_RAY_HOME": str(home), "TMPDIR": str(home)}
        return subprocess.run([LLM_RAY, *arguments], capture_output=True, text=True, check=False, timeout=300, env=environment)

    yield command
    command("serve", "stop", "--all")


@pytest.fixture(scope="module")
def adapter(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter with random weights, large enough to change the answers."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(smollm2), LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.2)
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


def _deploy(run: Run, conf: Path) -> None:
    deployed = run("serve", "deploy", "--config", str(conf))
    assert deployed.returncode == 0, deployed.stderr


@pytest.fixture(scope="module")
def conf(run: Run, smollm2: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    file = tmp_path_factory.mktemp("conf") / "serve.yaml"
    model = {"model": str(smollm2), "max_model_len": 512, "cpus": 2, "adapters": {"tuned": str(adapter)}}
    file.write_text(json.dumps({"endpoint": {"port": port, "max_body_mib": 1}, "models": {"small": model}}))
    return file


@pytest.fixture(scope="module")
def base(run: Run, conf: Path) -> str:
    _deploy(run, conf)
    return f"http://127.0.0.1:{json.loads(conf.read_text())['endpoint']['port']}"


@pytest.fixture(scope="module")
def client(base: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{base}/v1", api_key="none", max_retries=0, http_client=openai.DefaultHttpxClient(trust_env=False)
    ) as made:
        yield made


@pytest.fixture(scope="module")
def http(base: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=base, trust_env=False, timeout=120) as made:
        yield made


def test_a_model_and_its_adapter_are_listed(client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"small", "tuned"}
    assert client.models.retrieve("tuned").id == "tuned"


def test_an_answer_whole_and_streamed(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "small", "messages": QUESTION, "temperature": 0, "max_tokens": 16}
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.content == "The capital of France is Paris."
    assert (whole.choices[0].finish_reason, whole.model) == ("stop", "small")
    assert whole.usage
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 1
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in client.chat.completions.create(**ask, stream=True))


def test_settings_of_an_answer(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "small", "prompt": "The days of the week are Monday,", "max_tokens": 24, "temperature": 0}
    assert client.completions.create(**ask).choices[0].finish_reason == "length"
    stopped = client.completions.create(**ask, stop=["Wednesday"])
    assert stopped.choices[0].finish_reason == "stop"
    assert "Wednesday" not in stopped.choices[0].text
    several = client.completions.create(**ask | {"temperature": 1, "n": 3, "seed": 4})
    assert len({choice.text for choice in several.choices}) > 1
    again = client.completions.create(**ask | {"temperature": 1, "n": 3, "seed": 4})
    assert [choice.text for choice in again.choices] == [choice.text for choice in several.choices]
    scored = client.chat.completions.create(model="small", messages=QUESTION, max_tokens=2, logprobs=True, top_logprobs=3, temperature=0)
    assert scored.choices[0].logprobs
    assert [len(token.top_logprobs) for token in scored.choices[0].logprobs.content or ()] == [3, 3]


def test_an_answer_in_the_form_of_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
    answer = client.chat.completions.create(model="small", messages=QUESTION, temperature=0, max_tokens=48, response_format=form)
    assert set(json.loads(answer.choices[0].message.content or "")) == {"city"}


def test_tools(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {
        "model": "small",
        "messages": [{"role": "user", "content": "Weather in Oslo?"}],
        "tools": [TOOL],
        "temperature": 0,
    }
    free = client.chat.completions.create(**ask, tool_choice="auto", max_tokens=64)
    assert free.choices[0].finish_reason in ("stop", "length", "tool_calls")
    named = client.chat.completions.create(**ask, tool_choice={"type": "function", "function": {"name": "get_weather"}}, max_tokens=64)
    calls: Any = named.choices[0].message.tool_calls
    assert calls[0].function.name == "get_weather"
    assert "city" in json.loads(calls[0].function.arguments)
    told = [
        *ask["messages"],
        named.choices[0].message.model_dump(exclude_none=True),
        {"role": "tool", "tool_call_id": calls[0].id, "content": "rain"},
    ]
    assert client.chat.completions.create(**ask | {"messages": told, "max_tokens": 8}).choices[0].message is not None


def test_32_at_once_answer_as_one_alone(base: str, client: openai.OpenAI) -> None:
    prompts = [f"The number after {i} is" for i in range(32)]

    async def together() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{base}/v1", api_key="none", max_retries=0, http_client=openai.DefaultAsyncHttpxClient(trust_env=False)
        ) as asking:
            answers = await asyncio.gather(
                *(asking.completions.create(model="small", prompt=p, max_tokens=8, temperature=0) for p in prompts)
            )
        return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(together())
    assert len(texts) == 32
    assert texts[7] == client.completions.create(model="small", prompt=prompts[7], max_tokens=8, temperature=0).choices[0].text


def test_letters_of_several_tokens_come_whole(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": "small", "prompt": "Ünïcödé 🦦🦦🦦🦦 北京", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**ask, echo=True).choices[0].text
    assert whole.startswith("Ünïcödé 🦦🦦🦦🦦 北京")
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True))
    assert whole == ask["prompt"] + streamed


def test_an_adapter_answers_by_its_own_name(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 12, "temperature": 0}
    plain = client.completions.create(model="small", **ask).choices[0].text
    tuned = client.completions.create(model="tuned", **ask)
    assert tuned.choices[0].text != plain
    assert tuned.model == "tuned"
    assert client.completions.create(model="small", **ask).choices[0].text == plain


def test_adapters_come_and_go_without_a_restart(
    run: Run, conf: Path, adapter: Path, client: openai.OpenAI, base: str, tmp_path: Path
) -> None:
    before = run("serve", "logs", "small").stdout.count("Started initializing replica")
    other = shutil.copytree(adapter, tmp_path / "other")
    asked = json.loads(conf.read_text())
    asked["models"]["small"]["adapters"]["later"] = str(other)
    (tmp_path / "more.yaml").write_text(json.dumps(asked))
    _deploy(run, tmp_path / "more.yaml")
    ask: dict[str, Any] = {"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    assert (
        client.completions.create(model="later", **ask).choices[0].text == client.completions.create(model="tuned", **ask).choices[0].text
    )
    _deploy(run, conf)
    with pytest.raises(openai.NotFoundError):  # never the base in its place
        client.completions.create(model="later", **ask)
    assert run("serve", "logs", "small").stdout.count("Started initializing replica") == before


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("v1/chat/completions", {"model": "nobody", "messages": QUESTION}, 404),
        ("v1/chat/completions", {"model": "small", "messages": []}, 400),
        ("v1/chat/completions", {"model": "small", "messages": 3}, 400),
        ("v1/chat/completions", {"model": "small"}, 400),
        ("v1/chat/completions", {"model": "small", "messages": [{"role": "user", "content": "word " * 600}]}, 400),
        ("v1/chat/completions", {"model": "small", "messages": QUESTION, "max_tokens": 100000}, 400),
        ("v1/chat/completions", {"model": "small", "messages": QUESTION, "temperature": -1}, 400),
        ("v1/chat/completions", "{bad", 400),
        ("v1/completions", {"model": "small", "prompt": ""}, None),
        ("v1/embeddings", {"model": "small", "input": "x"}, 400),
        ("small", {"text": ""}, 400),
        ("small", {"text": "x", "config": {"max_new_token": 3}}, 400),
        ("nobody", {"text": "x"}, 404),
        ("v1/chat/completions", "x" * 2**20 + "x", 413),
    ],
)
def test_what_a_client_does_wrong_is_told_in_openais_form(http: httpx.Client, path: str, body: Any, status: int | None) -> None:
    answer = http.post(
        f"/{path}", content=body if isinstance(body, str) else json.dumps(body), headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == status or (status is None and answer.status_code < 500)
    if answer.status_code != 200:
        assert {"message", "type", "code"} <= set(answer.json()["error"])


def test_a_models_own_route(http: httpx.Client) -> None:
    settings = {"max_new_tokens": 16, "temperature": 0}
    text = "What is the capital of France?"
    assert http.post("/small", json={"text": text, "config": settings}).text == "The capital of France is Paris."
    assert http.post("/small", json={"text": text, "config": settings, "stream": True}).text == "The capital of France is Paris."
    assert http.post("/small", json={"text": QUESTION, "config": settings}).text == "The capital of France is Paris."
    assert http.post("/small", json={"text": [text, text], "config": settings}).json() == ["The capital of France is Paris."] * 2
    told = http.post("/small", json={"text": text, "config": settings}, headers={"Accept": "application/json"}).json()
    assert (told["text"], told["finish_reason"]) == ("The capital of France is Paris.", "stop")


def test_tokens(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"model": "small", "prompt": "hello world"}).json()["tokens"]
    assert http.post("/detokenize", json={"model": "small", "tokens": tokens}).json()["prompt"] == "hello world"


def test_health_readiness_and_counters(http: httpx.Client) -> None:
    assert http.get("/health").status_code == 200
    assert http.get("/ready").json()["ready"] is True

    def counted() -> dict[str, float]:
        families = text_string_to_metric_families(http.get("/metrics").text)
        return {s.name: s.value for f in families for s in f.samples if s.labels.get("model") == "small" and "status" not in s.labels}

    before = counted()
    answer = http.post("/v1/completions", json={"model": "small", "prompt": "One two", "max_tokens": 5, "ignore_eos": True}).json()
    after = counted()
    assert after["llm_ray_generated_tokens_total"] - before["llm_ray_generated_tokens_total"] == 5
    assert after["llm_ray_prompt_tokens_total"] - before["llm_ray_prompt_tokens_total"] == answer["usage"]["prompt_tokens"]
    assert after["llm_ray_requests_in_progress"] == 0


def test_the_status_is_told(run: Run, base: str) -> None:
    told = json.loads(run("serve", "status", "--json").stdout)
    assert told["url"] == f"{base}/v1"
    assert told["models"]["small"]["ready"] is True
    assert "small" in run("serve", "status").stdout
