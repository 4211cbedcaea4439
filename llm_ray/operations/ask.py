"""Asks a served model one question, as a client would."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Iterator
from typing import Any

from llm_ray.client.ask import Asker, Settings
from llm_ray.client.endpoint import Key, parse
from llm_ray.client.errors import refused
from llm_ray.client.prompts import Prompt
from llm_ray.conf.section import home
from llm_ray.conf.serve import Limits
from llm_ray.errors import ServeError
from llm_ray.serve.deployments import deploy
from llm_ray.serve.gateway.protect.keys import add_key, keys_file, revoke_key
from llm_ray.serve.models import ServedModel

_TOKENS = 64


def ask(model: str, question: str, seconds: float) -> dict[str, Any]:
    """Returns the model's answer over HTTP from the connected cluster's endpoint. Raises ServeError."""
    url, served = deploy.url(), deploy.status().get(model)
    if url is None or served is None:
        raise ServeError(f"{model} is not served on this cluster")
    with _key(model, seconds) as key:
        answer = asyncio.run(_ask(url, served.model, question, key, seconds))
    return {"url": url, "model": model, "prompt": question, "answer": answer}


async def _ask(url: str, served: ServedModel, question: str, key: Key, seconds: float) -> str:
    if served.task == "embeddings":
        return await _embed(url, served.name, question, key, seconds)
    settings = Settings(max_tokens=_TOKENS, temperature=0.0, completion=served.task == "completions", timeout=seconds)
    async with Asker(parse(url, key), served.name, settings) as asker:
        return (await asker.ask(Prompt(question))).text.strip()


async def _embed(url: str, model: str, text: str, key: Key, seconds: float) -> str:
    endpoint = parse(url, key)
    async with endpoint.http(seconds) as http:
        response = await http.post(f"{url}/embeddings", json={"model": model, "input": text}, headers=endpoint.headers)
    if response.status_code != 200:
        raise refused(endpoint, response.status_code, response.headers, response.text)
    return f"a vector of {len(response.json()['data'][0]['embedding'])} numbers"


@contextlib.contextmanager
def _key(model: str, seconds: float) -> Iterator[Key]:
    """Creates a key for this question and revokes it afterwards. Endpoints without keys ignore it."""
    file = keys_file(home())
    kept, secret = add_key(file, f"serve.yml {secrets.token_hex(4)}", Limits(), (model,), time.time() + seconds + 60)
    try:
        yield Key(secret, "serve.yml")
    finally:
        revoke_key(file, kept.id)
