"""vLLM's front end for all engines: OpenAI protocol, chat templates, tools, stop strings, logprobs, usage, streaming.

``Engine`` is the engine class for ``ray.serve.llm``. It runs one of the cores in ``llm_ray.serve.engines``.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
from ray.llm._internal.serve.engines.vllm.vllm_engine import VLLMEngine
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest, async_llm
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from llm_ray import cores
from llm_ray.conf.engines import ENGINES, EngineName
from llm_ray.errors import ModelError
from llm_ray.serve.engines.calls import read_as_streamed
from llm_ray.serve.engines.offsets import offsets_in_text
from llm_ray.serve.engines.thread import Core, EngineThread
from llm_ray.serve.engines.words import forbidden_tokens
from llm_ray.serve.models import ServedModel
from llm_ray.serve.replica.streams import CoalescedOutputs

async_llm.RequestOutputCollector = CoalescedOutputs  # AsyncLLM has no parameter for it

_LOOK = 1.0  # seconds
# Seconds after which a step (at most a few thousand prompt tokens) counts as hung.
_LONGEST_STEP = 900.0

# Returns why a request is not supported, or None. Called before the request reaches the core.
Refusal = Callable[[SamplingParams], str | None]


class FrontEnd(AsyncLLM):
    """vLLM's asynchronous engine on top of the core that `make` returns. Must be built within a running event loop."""

    def __init__(self, config: VllmConfig, make: Callable[[], Core], refusal: Refusal) -> None:
        self._refusal = refusal
        with _core_client(lambda: EngineThread(make)):
            super().__init__(config, UniProcExecutor, log_stats=False, log_requests=False)
        self.input_processor = _Inputs(config, self.renderer)

    def generate(  # no generator, so it raises before the stream begins
        self, prompt: Any, sampling_params: SamplingParams, request_id: str, *args: Any, **options: Any
    ) -> AsyncGenerator[RequestOutput, None]:
        """Same as AsyncLLM.generate. Raises VLLMValidationError, reported to the client as 400, for parameters that the
        core does not support."""
        if reason := self._refusal(sampling_params):
            raise VLLMValidationError(reason)
        return _with_reasons(super().generate(prompt, sampling_params, request_id, *args, **options))

    async def _add_request(self, request: EngineCoreRequest, *args: Any) -> None:
        try:
            await super()._add_request(request, *args)
        except BaseException:  # rejected, or the client disconnected: vLLM itself cleans up only one of several
            await self.abort(request.request_id, internal=True)
            raise


async def _with_reasons(outputs: AsyncGenerator[RequestOutput, None]) -> AsyncGenerator[RequestOutput, None]:
    """Yields a request's outputs. Raises VLLMValidationError if the core ended the request with a reason for its
    client."""
    async with contextlib.aclosing(outputs):
        async for output in outputs:
            for one in output.outputs:
                if one.finish_reason == "error" and one.stop_reason:
                    raise VLLMValidationError(str(one.stop_reason))
            yield output


class _Inputs(InputProcessor):
    """vLLM's input processor with another tokenization of `bad_words`."""

    def process_inputs(
        self, request_id: str, prompt: Any, params: SamplingParams | PoolingParams, *args: Any, **options: Any
    ) -> EngineCoreRequest:
        words = params.bad_words if isinstance(params, SamplingParams) else None
        if not words:
            return super().process_inputs(request_id, prompt, params, *args, **options)
        tokens = forbidden_tokens(words, self.get_tokenizer())
        params = params.clone()
        params.bad_words = []
        request = super().process_inputs(request_id, prompt, params, *args, **options)
        request.sampling_params.bad_words, request.sampling_params._bad_words_token_ids = words, tokens
        return request


@contextlib.contextmanager
def _core_client(make: Callable[[], EngineThread]) -> Iterator[None]:
    # AsyncLLM has no parameter for its client; it calls this function to create one.
    with patch.object(EngineCoreClient, "make_async_mp_client", lambda **_: make()):
        yield


class Engine(VLLMEngine):
    """Engine for ``ray.serve.llm``: vLLM's front end with the core of the model's engine."""

    def __init__(self, model: ServedModel, llm_config: LLMConfig) -> None:
        super().__init__(llm_config)
        self._model = model
        self._unloading: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Loads the model. Propagates the engine's errors."""
        await super().start()
        self._oai_serving_tokenization = self._app_state.serving_tokenization  # Ray expects its older name
        if self._oai_serving_chat:
            read_as_streamed(self._oai_serving_chat)
        if self._oai_serving_completion:
            offsets_in_text(self._oai_serving_completion, self._oai_serving_completion.renderer.tokenizer)

    async def try_out(self) -> None:
        """Has the core compute a prompt and one more token. Raises ModelError with the core's reason if that fails."""
        if "generate" not in await self._engine_client.get_supported_tasks():
            return
        params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True, detokenize=False)
        try:
            async for _ in self._engine_client.generate(TokensPrompt(prompt_token_ids=[0, 0]), params, "try-out"):
                pass
        except EngineDeadError as error:
            reason = error.__cause__ or error
            raise ModelError(f"{self._model.path}: engine {self._model.engine} cannot compute it: {reason}") from reason

    async def check_health(self) -> None:
        """Raises the error that killed the core, or ModelError if the core hangs."""
        core = self._engine_client.engine_core
        if death := core.resources.death:
            raise death
        if (seconds := core.stalled()) > _LONGEST_STEP:
            raise ModelError(f"engine {self._model.engine} has been in one step for {seconds:.0f} s")
        await super().check_health()

    def adapter_path(self, name: str) -> str | None:
        """Returns the folder a LoRA adapter was loaded from; None if it is not loaded."""
        lora = self._oai_models.lora_requests.get(name)
        return lora.lora_path if lora else None

    async def load_adapter(self, name: str, path: Path) -> None:
        """Serves requests for `name` with this LoRA adapter from now on, without a gap if it replaces another. Raises
        ModelError if the engine rejects the adapter."""
        lora = LoRARequest(name, self._oai_models.lora_id_counter.inc(1), str(path))
        try:
            await self._engine_client.add_lora(lora)
        except (ValueError, RuntimeError) as error:
            raise ModelError(
                f"adapter {name}: engine {self._model.engine} rejects it: {error}. Deploy the merged model"
            ) from error
        self.forget_adapter(name)
        self._oai_models.lora_requests[name] = lora

    def forget_adapter(self, name: str) -> None:
        """Rejects new requests for a LoRA adapter, and unloads it once its requests in progress have finished."""
        if lora := self._oai_models.lora_requests.pop(name, None):
            task = asyncio.create_task(self._unload(lora.lora_int_id))
            self._unloading.add(task)
            task.add_done_callback(self._unloading.discard)

    async def _unload(self, number: int) -> None:
        # For a request in progress vLLM would reload the adapter from its folder, which may contain other weights by
        # now or be gone; a missing folder kills the engine.
        requests = self._engine_client.output_processor.request_states
        while True:
            await asyncio.sleep(_LOOK)  # first, since a request just admitted is not in `requests` yet
            if not any(state.lora_request and state.lora_request.lora_int_id == number for state in requests.values()):
                break
        await self._engine_client.remove_lora(number)

    def _start_async_llm_engine(self, engine_args: Any, config: VllmConfig, placement_group: Any) -> FrontEnd:
        return front_end(self._model, config)


def front_end(model: ServedModel, config: VllmConfig) -> FrontEnd:
    """Returns vLLM's front end of the model's core, which is loaded in a thread bound to the model's CPUs. Propagates
    the engine's errors."""
    # With "auto" the first request's backend would serve all requests, and backends support different schema keywords
    # (llm_ray.serve.gateway.schemas).
    config.structured_outputs_config.backend = "xgrammar"
    core = _core(model.engine)

    def bound() -> Core:
        import torch

        cores.foreground()
        torch.set_num_threads(cores.bind(model.cpus)[0] if model.cpus else model.threads)
        return core(model, config)

    return FrontEnd(config, bound, core.refusal)


def _core(engine: EngineName) -> Any:
    """Returns the class of the engine's core."""
    module, name = ENGINES[engine].core.split(":")
    return getattr(importlib.import_module(module), name)
