"""Ask a model over the OpenAI API or its own route, streamed or not.

    async with Asker(parse("http://127.0.0.1:8000/v1"), "quickstart", Settings(max_tokens=64)) as asker:
        answer = await asker.ask(Prompt("What is Ray?"), on_text=print)

The OpenAI API is called through the openai SDK. A model's own route (``http://HOST:PORT/MODEL``) takes the simple
request of the old workflow, ``{"text": …, "config": {…}, "stream": …}``, and answers in plain text, or in JSON on
request. A busy endpoint (429, or 503 with Retry-After) is retried after the delay that it gives, within the timeout.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

from llm_ray.client.connections import Connections
from llm_ray.client.endpoint import Endpoint
from llm_ray.client.errors import Broken, Failed, Refused, failed, refused
from llm_ray.client.prompts import Prompt
from llm_ray.errors import ConfError, ServeError

OnText = Callable[[str], None]
OnWait = Callable[[float, Refused], None]
Usage = dict[str, int]
Piece = tuple[str, str | None, Usage | None]
"""Part of an answer: text, finish_reason and usage; the latter two are None unless they come with it."""

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0
"""Delay in seconds before retrying a busy endpoint without Retry-After: the first one, doubled each time up to the
longest."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Settings of a request. None leaves the choice to the endpoint. `timeout` covers the whole answer in seconds,
    including retries of a busy endpoint."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    system: str | None = None
    completion: bool = False
    response_format: dict[str, Any] | None = None
    """What holds an answer to JSON, in the form of the OpenAI API, which a model's own route does not take."""
    timeout: float = 600.0

    def given(self) -> dict[str, Any]:
        """Returns the set values that affect the answer, as JSON."""
        values = {**asdict(self), "stop": list(self.stop), "completion": self.completion or None}
        return {name: value for name, value in values.items() if value not in (None, []) and name != "timeout"}

    def sampling(self) -> dict[str, Any]:
        """Returns the set sampling parameters under their OpenAI names (plus top_k, a common extension)."""
        return {name: value for name, value in self.given().items() if name not in ("system", "completion")}


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer. `usage` (prompt_tokens, completion_tokens, total_tokens) and `finish_reason` (stop, length, …) are
    None if the endpoint does not report them, as when a model's own route streams. `seconds` runs from the request to
    the end of the answer."""

    model: str
    text: str
    finish_reason: str | None
    usage: Usage | None
    seconds: float


class Asker:
    """Sends prompts to one model with fixed settings. An async context manager. Connections are reused between prompts;
    `connections` given by the caller stay open afterwards."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        settings: Settings,
        on_wait: OnWait = lambda seconds, error: None,
        connections: Connections | None = None,
    ) -> None:
        self.endpoint, self.model, self.settings = endpoint, model, settings
        self._on_wait = on_wait
        self._connections, self._own = connections or Connections(), connections is None

    async def __aenter__(self) -> Asker:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._own:
            await self._connections.close()

    async def ask(self, prompt: Prompt, on_text: OnText | None = None) -> Answer:
        """Returns the answer to `prompt`. With `on_text` it is streamed, and each piece of text is passed on as it
        arrives.

        Raises Failed (Refused, Unreachable, TimedOut, Broken).
        """
        deadline = time.monotonic() + self.settings.timeout
        pause = FIRST_PAUSE
        while True:
            try:
                return await self._ask(prompt, on_text, deadline)
            except Refused as error:
                seconds = pause if error.retry_after is None else error.retry_after
                busy = error.status == 429 or (error.status == 503 and error.retry_after is not None)
                if not busy or time.monotonic() + seconds >= deadline:
                    raise await self._with_models(error) from None
                self._on_wait(seconds, error)
            await asyncio.sleep(seconds)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _ask(self, prompt: Prompt, on_text: OnText | None, deadline: float) -> Answer:
        ask = self._from_sdk if self.endpoint.openai else self._from_route
        began = time.monotonic()
        texts: list[str] = []
        finish: str | None = None
        usage: Usage | None = None
        try:
            async with (
                asyncio.timeout(max(0.0, deadline - began)),
                contextlib.aclosing(ask(prompt, on_text is not None)) as pieces,
            ):
                async for text, reason, tokens in pieces:
                    finish, usage = reason or finish, tokens or usage
                    texts.append(text)
                    if text and on_text:
                        on_text(text)
        except TimeoutError as error:
            raise failed(self.endpoint, error, self.settings.timeout) from error
        if self.endpoint.openai and not texts:
            raise self._foreign()
        if self.endpoint.openai and finish is None:
            raise Broken(f"{self.endpoint.url} ended the answer early (without a finish_reason)")
        return Answer(self.model, "".join(texts), finish, usage, time.monotonic() - began)

    async def _from_sdk(self, prompt: Prompt, stream: bool) -> AsyncGenerator[Piece, None]:
        import openai

        arguments: dict[str, Any] = {
            "model": self.model,
            "stream": stream,
            "extra_body": self.settings.sampling(),
            "extra_headers": self.endpoint.headers or {"Authorization": openai.omit},
        }
        if stream:
            arguments["stream_options"] = {"include_usage": True}
        sdk: Any = self._connections.sdk(self.endpoint, self.settings.timeout)
        try:
            if self.settings.completion:
                reply = await sdk.completions.create(**arguments, prompt=prompt.content)
            else:
                reply = await sdk.chat.completions.create(**arguments, messages=prompt.messages(self.settings.system))
            if not stream:
                yield _piece(reply, "message")
                return
            async with reply:
                async for chunk in reply:
                    yield _piece(chunk, "delta")
        except openai.APIStatusError as error:
            raise refused(self.endpoint, error.status_code, error.response.headers, error.response.text) from error
        except (openai.APIConnectionError, ValueError) as error:
            raise failed(self.endpoint, error, self.settings.timeout) from error
        except openai.APIError as error:  # an error event in the stream
            raise Broken(f"{self.endpoint.url} aborted the answer: {error.message}") from error
        except (AttributeError, IndexError, TypeError) as error:  # the SDK does not validate responses
            raise self._foreign() from error

    async def _from_route(self, prompt: Prompt, stream: bool) -> AsyncGenerator[Piece, None]:
        import httpx

        messages = prompt.messages(self.settings.system)
        plain = len(messages) == 1 and isinstance(prompt.content, str)
        names = {"max_tokens": "max_new_tokens"}
        body = {
            "text": prompt.content if plain else messages,
            "config": {names.get(name, name): value for name, value in self.settings.sampling().items()},
            "stream": stream,
        }
        headers = {"Accept": "text/plain" if stream else "application/json"} | self.endpoint.headers
        http = self._connections.http(self.endpoint, self.settings.timeout)
        try:
            async with http.stream("POST", self.endpoint.url, json=body, headers=headers) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise refused(self.endpoint, response.status_code, response.headers, text)
                if stream:
                    if not response.headers.get("content-type", "").startswith("text/plain"):
                        raise self._foreign()
                    response.encoding = "utf-8"
                    async for text in response.aiter_text():
                        yield text, None, None
                    return
                await response.aread()
                reply = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise failed(self.endpoint, error, self.settings.timeout) from error
        if not isinstance(reply, dict) or not isinstance(reply.get("text"), str):
            raise self._foreign()
        yield reply["text"], reply.get("finish_reason"), reply.get("usage")

    def _foreign(self) -> Broken:
        form = "the OpenAI API" if self.endpoint.openai else "a model's route"
        return Broken(f"{self.endpoint.url} does not answer like {form}: is this the right address?")

    async def _with_models(self, error: Refused) -> Refused:
        """Returns the error, with the served models added to a 404."""
        if error.status != 404:
            return error
        try:
            models = await served_models(self.endpoint, self.settings.timeout)
        except Failed:
            return error
        listed = ", ".join(models) or "no model"
        return error if listed in str(error) else Refused(f"{error}. {self.endpoint.base} serves {listed}", 404)


def _piece(reply: Any, part: str) -> Piece:
    """Returns text, finish_reason and usage of an SDK response or chunk. A completion has its text in the choice
    itself."""
    usage = reply.usage
    tokens = (
        {name: getattr(usage, name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
        if usage
        else None
    )
    if not reply.choices and usage:  # the last chunk, with usage only
        return "", None, tokens
    choice = reply.choices[0]
    text = choice.text if "text" in choice.model_fields_set else getattr(choice, part).content
    return text or "", choice.finish_reason, tokens


async def served_models(endpoint: Endpoint, timeout: float) -> list[str]:
    """Returns the names of the models that the endpoint lists. Raises Failed."""
    import httpx

    async with endpoint.http(timeout) as client:
        try:
            response = await client.get(f"{endpoint.base}/models", headers=endpoint.headers)
            if response.status_code != 200:
                raise refused(endpoint, response.status_code, response.headers, response.text)
            return [model["id"] for model in response.json()["data"]]
        except (httpx.HTTPError, OSError, ValueError) as error:
            raise failed(endpoint, error, timeout) from error
        except (KeyError, TypeError) as error:
            raise Broken(f"{endpoint.base}/models lists no models: is it an OpenAI API?") from error


async def choose_model(endpoint: Endpoint, model: str | None, timeout: float) -> str:
    """Returns the model to ask: the named one, or the only one that an OpenAI API lists, or the model of a model's own
    route.

    Raises ConfError if several are listed and none is named, or if one is named for a route; ServeError if none is
    listed.
    """
    if not endpoint.openai:
        if model:
            raise ConfError(
                f"--model {model}: {endpoint.url} is already the route of one model; with --model use {endpoint.base}"
            )
        return endpoint.name
    if model:
        return model
    models = await served_models(endpoint, timeout)
    if not models:
        raise ServeError(f"{endpoint.url} serves no model: llm-ray serve deploy --model NAME")
    if len(models) > 1:
        raise ConfError(f"{endpoint.url} serves {len(models)} models: name one with --model: {', '.join(models)}")
    return models[0]
