"""What `serve deploy` is told of a model, and what comes of it: kind, tokenizer, chat template, name, time."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest

from tests.integration import tiny
from tests.integration.endpoint.conftest import Guarded
from tests.integration.serving import Clients


def test_a_model_that_makes_vectors_with_a_tokenizer_of_another_folder(
    client: openai.OpenAI, bert: tuple[Path, Path]
) -> None:
    texts = ["the cat sleeps", "the cat"]
    answer = client.embeddings.create(model="vectors", input=texts)
    assert answer.usage.prompt_tokens == 5 + 4
    for text, found in zip(texts, answer.data, strict=True):
        assert found.embedding == pytest.approx(tiny.embedded(*bert, text), abs=1e-5)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="vectors", messages=[{"role": "user", "content": texts[0]}])
    with pytest.raises(openai.BadRequestError):
        client.embeddings.create(model="team/pair", input="the cat")
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="none").embeddings.create(model="vectors", input="the cat")


def test_a_chat_template_replaces_the_models_own(home: Guarded) -> None:
    with home.http(home.key) as client:
        messages = [{"role": "user", "content": "Hello"}]
        tokens = client.post("/tokenize", json={"model": "red", "messages": messages}).json()["tokens"]
        assert client.post("/detokenize", json={"model": "red", "tokens": tokens}).json()["prompt"] == "[user] Hello\n"


@pytest.mark.parametrize("name", ["team/pair", "team/blue", "red"])
def test_infer_asks_a_models_own_route(home: Guarded, name: str) -> None:
    ask = ["infer", "--api-key", home.key, "--prompt", "Hello", "--temperature", "0", "--max-tokens", "4", "--json"]
    route, api = (
        home.run(*ask, "--model_endpoint", f"{home.url}/{name}"),
        home.run(*ask, "--model_endpoint", f"{home.url}/v1", "--model", name),
    )
    assert (route.returncode, api.returncode) == (0, 0), route.stderr + api.stderr
    answers = [json.loads(done.stdout) for done in (route, api)]
    assert [answer["model"] for answer in answers] == [name, name]
    assert answers[0]["text"] == answers[1]["text"]


def test_infer_tells_the_models_where_a_route_names_none(home: Guarded) -> None:
    done = home.run("infer", "--api-key", home.key, "--prompt", "Hello", "--model_endpoint", f"{home.url}/team/nobody")
    assert (done.returncode, "red, team/blue, team/pair" in done.stderr) == (1, True), done.stderr
    done = home.run(
        "infer",
        "--api-key",
        home.key,
        "--prompt",
        "Hello",
        "--model_endpoint",
        f"{home.url}/team/pair",
        "--model",
        "red",
    )
    assert (done.returncode, f"use {home.url}/v1" in done.stderr) == (2, True), done.stderr


def test_a_model_that_is_not_ready_in_time_is_taken_back(home: Guarded, bert: tuple[Path, Path]) -> None:
    with Clients(home, "red") as clients:
        failed = home.deploy("late", "--tokenizer", str(bert[1]), "--timeout", "1", model=str(bert[0]))
        models = home.models()
    assert (failed.returncode, "did not start within 1 s: raise --timeout" in failed.stderr) == (1, True), failed.stderr
    assert "Traceback" not in failed.stderr
    assert set(models) == {"team/pair", "vectors"}
    assert not home.processes("ServeReplica:model:late")
    assert set(clients.statuses) == {200}
