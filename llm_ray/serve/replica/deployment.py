"""A replica of a model: what Ray Serve starts. It imports the engine itself, so the deploying process does not have
to."""

from __future__ import annotations

import asyncio
import logging
import os
from typing import TYPE_CHECKING, Any

from llm_ray.conf.engines import ENGINES
from llm_ray.serve.directory import described
from llm_ray.serve.models import ServedModel

if TYPE_CHECKING:
    from llm_ray.serve.replica.server import ModelServer

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # the models are folders
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine is a thread of this process
    "VLLM_NO_USAGE_STATS": "1",
    # It would close the handlers of Serve's log, which the controller asks for when it comes back
    "VLLM_CONFIGURE_LOGGING": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # llm_ray.cores binds
}
# Seconds for the clients whose requests the engine took with it to be told. What killed it would otherwise be asked of
# another replica.
_TOLD_WITHIN = 1.0


def environment(model: ServedModel) -> dict[str, str]:
    """What the model's process has to have in its environment before it imports the engine."""
    # vLLM's sampler would compile parts of itself in the middle of the first request that wants logprobs: seconds in
    # which all others wait, and the engine's death on a host without a C++ compiler.
    return ENVIRONMENT if model.compile else {**ENVIRONMENT, "TORCH_COMPILE_DISABLE": "1"}


def start_environment(model: ServedModel) -> dict[str, str]:
    """What the model's process has to be started with, for Ray's runtime_env."""
    return {} if ENGINES[model.engine].any_malloc else {"LD_PRELOAD": ""}


class ModelReplica:
    """Methods as ``ray.serve.llm``'s LLMServer has them; each returns an asynchronous generator."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._server: ModelServer | None = None

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Called by Serve with the deployment's user_config: at the start, where the engine is loaded, and whenever it
        changes."""
        if self._server is None:
            os.environ.update(environment(self._model))
            logging.getLogger("ray.serve").info(f"pid={os.getpid()} {self._model}")
            logging.getLogger("vllm").setLevel(logging.WARNING)
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
        """Ends the process when its engine is dead. Serve replaces at once what has ended, and what is ill after three
        checks only: until then every request that came to it would fail.
        """
        try:
            await self.server.check_health()
        except Exception as error:
            await asyncio.sleep(_TOLD_WITHIN)
            text = f"The engine died, so this replica ends and another is started: {type(error).__name__}: {error}"
            logging.getLogger("ray.serve").error(text)
            logging.shutdown()
            os._exit(1)
