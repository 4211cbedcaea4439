"""HTTP clients kept between requests: creating one and connecting takes 25 ms.

connections = Connections()
async with Asker(endpoint, "support-bot", settings, connections=connections) as asker:
    …
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_ray.client.endpoint import Endpoint, certificates

if TYPE_CHECKING:
    import httpx
    from openai import AsyncOpenAI


class Connections:
    """Cache of clients by URL and timeout (seconds per step of a request), created on first use. They hold no API key,
    which goes with each request. Use from one event loop only."""

    def __init__(self) -> None:
        self._http: dict[tuple[str, float], httpx.AsyncClient] = {}
        self._sdk: dict[tuple[str, float], AsyncOpenAI] = {}

    async def close(self) -> None:
        for http in self._http.values():
            await http.aclose()
        for sdk in self._sdk.values():
            await sdk.close()

    def http(self, endpoint: Endpoint, timeout: float) -> httpx.AsyncClient:
        found = self._http.get((endpoint.url, timeout))
        if found is None:
            found = self._http[endpoint.url, timeout] = endpoint.http(timeout)
        return found

    def sdk(self, endpoint: Endpoint, timeout: float) -> AsyncOpenAI:
        """Returns an openai SDK client with retries disabled."""
        found = self._sdk.get((endpoint.url, timeout))
        if found is None:
            found = self._sdk[endpoint.url, timeout] = _sdk(endpoint, timeout)
        return found


def _sdk(endpoint: Endpoint, timeout: float) -> AsyncOpenAI:
    import openai

    return openai.AsyncOpenAI(
        base_url=endpoint.url,
        api_key="none",  # not sent: each request has its own header
        timeout=timeout,
        max_retries=0,
        http_client=openai.DefaultAsyncHttpxClient(
            trust_env=endpoint.trust_env, verify=certificates(endpoint.trust_env)
        ),
    )
