"""The replica class that Ray Serve starts. It imports the engine lazily, so the deploying process does not have to."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

from llm_ray.conf.engines import ENGINES
from llm_ray.imports import uncollected
from llm_ray.serve.directory import described
from llm_ray.serve.models import ServedModel

if TYPE_CHECKING:
    from llm_ray.serve.replica.server import ModelServer

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # models are local folders
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs as a thread of this process
    "VLLM_NO_USAGE_STATS": "1",
    # It would close the handlers of Serve's log, which the controller needs after a restart.
    "VLLM_CONFIGURE_LOGGING": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # llm_ray.cores binds
}
# Seconds before a replica with a dead engine exits, so that its clients get their errors. Otherwise the requests that
# killed the engine would be retried on another replica.
_TOLD_WITHIN = 1.0


def environment(model: ServedModel) -> dict[str, str]:
    """Returns environment variables that the model's process must set before importing the engine."""
    # Otherwise vLLM's sampler compiles parts of itself during the first request with logprobs: all others wait for
    # seconds, and without a C++ compiler the engine dies.
    return ENVIRONMENT if model.compile else {**ENVIRONMENT, "TORCH_COMPILE_DISABLE": "1"}


def start_environment(model: ServedModel) -> dict[str, str]:
    """Returns environment variables that the model's process must start with, for Ray's runtime_env."""
    return {} if ENGINES[model.engine].any_malloc else {"LD_PRELOAD": ""}


class ModelReplica:
    """Has the methods of ``ray.serve.llm``'s LLMServer; each returns an asynchronous generator."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._server: ModelServer | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Called by Serve with the deployment's user_config: at startup, when it loads the engine, and at every
        change."""
        if self._server is None:
            os.environ.update(environment(self._model))
            logging.getLogger("ray.serve").info(f"pid={os.getpid()} {self._model}")
            logging.getLogger("vllm").setLevel(logging.WARNING)
            with uncollected():
                from llm_ray.serve.replica.server import ModelServer

            server = ModelServer(self._model)
            await server.start()
            self._server = server
        await self.server.set_adapters(described(config).adapters)

    @property
    def server(self) -> ModelServer:
        if self._server is None:
            raise RuntimeError("the engine is not loaded yet")
        return self._server

    async def chat(self, request: Any, info: Any = None) -> Any:
        return await self.server.chat(request, info)

    async def completions(self, request: Any, info: Any = None) -> Any:
        return await self.server.completions(request, info)

    async def embeddings(self, request: Any, info: Any = None) -> Any:
        return await self.server.embeddings(request, info)

    async def tokenize(self, request: Any, info: Any = None) -> Any:
        return await self.server.tokenize(request, info)

    async def detokenize(self, request: Any, info: Any = None) -> Any:
        return await self.server.detokenize(request, info)

    async def check_health(self) -> None:
        """Exits the process if its engine is dead. Serve replaces an exited process at once, but an unhealthy one only
        after three checks, and until then all of its requests would fail."""
        try:
            await self.server.check_health()
        except Exception as error:
            await asyncio.sleep(_TOLD_WITHIN)
            text = f"The engine died, so this replica ends and another is started: {type(error).__name__}: {error}"
            logging.getLogger("ray.serve").error(text)
            logging.shutdown()
            os._exit(1)
