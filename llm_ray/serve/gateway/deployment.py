"""The gateway as Ray Serve starts it. What is heavy is imported in the replica, so that whoever deploys it needs to import none."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class Gateway:
    """One replica, which answers HTTP for all models. Its `user_config` is the endpoint's part of the conf, taken over live."""

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        from llm_ray.serve.gateway.api import Api

        self._api = Api()
        self._app = _Switch(self._api.app)
        return self._app

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Called by Serve with the deployment's user_config, at the start and whenever it changes."""
        from llm_ray.serve.protect import Protection, protect

        self._app.inner = protect(self._api.app, Protection.from_json(config))
        await self._api.start()

    async def stats(self) -> dict[str, dict[str, float]]:
        """Of each model: requests, errors, requests in progress, tokens, tokens/s."""
        return await self._api.stats()

    async def drain(self, seconds: float) -> int:
        """Take no more requests, and wait until those that are in are answered; returns how many are not after `seconds`."""
        self._api.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._api.idle()
        except TimeoutError:
            pass
        return self._api.in_progress


class _Switch:
    """An ASGI app whose inside can be exchanged while it runs."""

    def __init__(self, inner: ASGIApp) -> None:
        self.inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.inner(scope, receive, send)
