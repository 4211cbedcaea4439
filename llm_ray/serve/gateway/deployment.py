"""The gateway class that Ray Serve starts. It imports heavy modules lazily, so the deploying process does not need
them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_ray.imports import uncollected

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from llm_ray.serve.gateway.finetuning.service import Opening, Service

_LOG = logging.getLogger("ray.serve")
_RECOVER = 10.0  # seconds between checks for jobs whose processes were killed


class Gateway:
    """One replica that serves HTTP for all models. Its `user_config` is the endpoint's part of the conf and is applied
    live; `open_finetuning` creates the fine-tuning API's use cases."""

    def __init__(self, open_finetuning: Opening) -> None:
        self._open_finetuning = open_finetuning
        self._recovering: asyncio.Task[None] | None = None

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        with uncollected():
            from llm_ray.serve.gateway.api import Api
            from llm_ray.serve.gateway.protect.limits import Limiter

        self._api, self._limiter = Api(), Limiter()
        self._app = _Outermost(self._api.app, self._api.metrics.refuse)
        return self._app

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Called by Serve with the deployment's user_config, at startup and whenever it changes."""
        from llm_ray.conf.serve import Endpoint
        from llm_ray.serve.gateway.openapi import ask_for_keys
        from llm_ray.serve.gateway.protect import Protection, protect

        protection = Protection.from_json(config["protection"])
        settings = Endpoint.model_validate(config["endpoint"]).finetuning
        service = self._open_finetuning(Path(config["home"]), settings)
        self._api.offer(service, settings.enabled)
        self._recover(service if settings.enabled else None)
        ask_for_keys(self._api.app, protection.keys_file is not None)
        self._app.inner = protect(self._api.app, protection, self._limiter)
        await self._api.start()

    def _recover(self, service: Service | None) -> None:
        """Restarts jobs whose processes were killed, periodically while the fine-tuning API is enabled."""
        if self._recovering:
            self._recovering.cancel()
        self._recovering = asyncio.create_task(_look_after(service)) if service else None

    async def stats(self) -> dict[str, dict[str, float]]:
        """Returns requests, errors, requests in progress, tokens and tokens/s of each model and adapter."""
        return await self._api.stats()

    async def drain(self, seconds: float) -> int:
        """Refuses new requests, and waits for those in progress; returns how many are unfinished after `seconds`."""
        self._api.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self._api.idle()
        except TimeoutError:
            pass
        return self._api.in_progress


async def _look_after(service: Service) -> None:
    while True:
        try:
            await asyncio.to_thread(service.recover)
        except Exception:  # retried at the next check
            _LOG.exception("jobs of the fine-tuning API could not be looked after")
        await asyncio.sleep(_RECOVER)


class _Outermost:
    """An ASGI app whose inner app can be replaced while it runs. Counts requests that fail before they reach a
    model."""

    def __init__(self, inner: ASGIApp, refused: Callable[[int], None]) -> None:
        self.inner, self._refused = inner, refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.setdefault("state", {})

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] >= 400 and "llm_ray_counted" not in state:
                self._refused(message["status"])
            await send(message)

        await self.inner(scope, receive, sent)
