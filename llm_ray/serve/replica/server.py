"""A model's server in its replica: ``ray.serve.llm``'s LLMServer with our engine and with adapters from folders."""

from __future__ import annotations

import asyncio
import functools
import tempfile
from pathlib import Path
from typing import Any

from ray.llm._internal.common.callbacks.base import CallbackBase
from ray.llm._internal.serve.core.configs.llm_config import LLMConfig
from ray.llm._internal.serve.core.protocol import LLMServerProtocol
from ray.llm._internal.serve.core.server.llm_server import LLMServer
from transformers import AutoTokenizer
from vllm.exceptions import VLLMNotFoundError

from llm_ray.conf.engines import ENGINES
from llm_ray.models.chat import ChatTemplate, as_learnt, tell_tools
from llm_ray.serve.engines.frontend import Engine
from llm_ray.serve.models import NEUTRAL, Adapter, ServedModel, sampling
from llm_ray.serve.replica.streams import TOKEN_BY_TOKEN, collected

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
ADAPTERS_AT_ONCE = 8  # adapters computed in one batch
_LOOKS = 300  # checks for a new adapter, a tenth of a second apart
_LORAS_KEPT = 64  # adapters in memory


class NoDownload(CallbackBase):
    """Skips Ray's download task, whose process imports vLLM: the model is a local folder."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


class ModelServer(LLMServer):
    """LLMServer with the engine from the model's conf. `start()` loads it."""

    def __init__(self, model: ServedModel) -> None:  # LLMServer's __init__ is a coroutine that only Serve can call
        self._name = model.name
        self.adapters = dict(model.adapters)
        self._loading = asyncio.Lock()
        template = chat_template(model)
        self._template, self._tools = template, bool(model.tool_parser)
        LLMServerProtocol.__init__(self)
        self._init_shared(llm_config(model, template), functools.partial(Engine, model))

    async def start(self) -> None:
        """Loads the engine and the adapters, and runs a test generation, so that engine failures show before the first
        request.

        Raises what the engine raises.
        """
        await super().start()
        await self.engine.try_out()
        for name, adapter in self.adapters.items():
            await self._load_adapter(name, adapter)

    async def _start_engine(self) -> None:  # LLMServer's would also start Ray's telemetry actor, a process of 0.4 GB
        await self.engine.start()

    async def _run_request(self, request: Any, *args: Any, **options: Any) -> Any:
        # Serve's multiplexing would send requests for an adapter to one replica until it is full; here every replica
        # has all adapters.
        if request.model != self._name:
            await self._load_adapter(request.model, await self._adapter(request.model))
        return await super()._run_request(request, *args, **options)

    @functools.cached_property
    def _versions(self) -> tempfile.TemporaryDirectory[str]:
        """Folder of symlinks to adapters. vLLM caches prompts by an adapter's name and path, so changed weights need a
        new path."""
        return tempfile.TemporaryDirectory(prefix="llm-ray-adapters-")

    async def _load_adapter(self, name: str, adapter: Adapter) -> None:
        """Loads an adapter unless it is loaded. Raises ModelError if the engine rejects it."""
        path = Path(self._versions.name) / adapter.identity
        if self.engine.adapter_path(name) == str(path):
            return
        async with self._loading:
            if self.engine.adapter_path(name) == str(path):
                return  # loaded by a concurrent request
            self._link(adapter)
            await self.engine.load_adapter(name, path)

    def _link(self, adapter: Adapter) -> None:
        path = Path(self._versions.name) / adapter.identity
        path.unlink(missing_ok=True)  # the same adapter may have moved
        path.symlink_to(adapter.path)

    async def _adapter(self, name: str) -> Adapter:
        """Returns the adapter, waiting up to 30 s because the gateway may learn of an adapter before its replicas do.
        Raises VLLMNotFoundError (404 for the client)."""
        for _ in range(_LOOKS):
            if name in self.adapters:
                return self.adapters[name]
            await asyncio.sleep(0.1)
        raise VLLMNotFoundError(f"The model `{name}` is no longer served.")

    def _batch_output_stream(self, generator: Any) -> Any:  # the default delays every token by 50 ms, even the first
        return collected(generator)

    async def chat(self, request: Any, raw_request_info: Any = None) -> Any:
        TOKEN_BY_TOKEN.set(bool(request.tools))
        return await super().chat(told(request, self._template, tools=self._tools), raw_request_info)

    async def tokenize(self, request: Any, raw_request_info: Any = None) -> Any:
        return await super().tokenize(told(request, self._template, tools=self._tools), raw_request_info)

    async def set_adapters(self, adapters: dict[str, Adapter]) -> None:
        """Replaces the served adapters; removed and changed ones are unloaded. Raises ModelError if the engine rejects
        one."""
        before, self.adapters = (
            self.adapters,
            dict(adapters),
        )  # set first, so that concurrent requests load the new adapters
        for name in before.keys() - adapters.keys():
            self.engine.forget_adapter(name)
        for name, adapter in adapters.items():
            if before.get(name) != adapter:
                self._link(adapter)  # vLLM re-reads it after evicting it from memory
                await self._load_adapter(name, adapter)


def told(request: Any, template: ChatTemplate | None, *, tools: bool) -> Any:
    """Returns the request with its messages as in training data. With `tools`, tools that the chat template does not
    support are described as text."""
    if messages := getattr(request, "messages", ()):
        request.messages = as_learnt(messages)
        if template and tools and template.in_words(request.messages, request.tools):
            wanted = request.tools or () if getattr(request, "tool_choice", "auto") != "none" else ()
            request.messages = tell_tools(request.messages, [tool.model_dump() for tool in wanted])
            if request.tools:  # keeps the template from writing the tools a second time
                request.chat_template_kwargs = (request.chat_template_kwargs or {}) | {"tools": []}
        if template:
            request.messages = template.with_whole_system(request.messages, request.tools)
    return request


def engine_arguments(model: ServedModel) -> dict[str, Any]:
    """Returns vLLM's AsyncEngineArgs for the model: for vLLM's engine, and for vLLM's front end before other
    engines."""
    engine: dict[str, Any] = {
        "max_model_len": model.max_model_len,
        "max_num_seqs": model.max_batch,
        "kv_cache_memory_bytes": model.kv_cache_bytes,  # if given, vLLM skips its profiling forward pass
        "dtype": _DTYPES[model.precision],
        "enforce_eager": not model.compile,
        "trust_remote_code": model.trust_remote_code,
        "load_format": "hf",  # else Mistral's consolidated.safetensors takes precedence over the checked files
        "override_generation_config": {
            name: NEUTRAL[name] for name in sampling(model.path).keys() - model.sampling.keys()
        },
        "disable_log_stats": True,
    }
    if model.tokenizer:
        engine["tokenizer"] = str(model.tokenizer)
    if model.lora_rank:
        engine |= {
            "enable_lora": True,
            "max_lora_rank": model.lora_rank,
            "max_loras": ADAPTERS_AT_ONCE,
            "max_cpu_loras": _LORAS_KEPT,
        }
    kind = ENGINES[model.engine]
    return engine | dict(kind.front_end) | (model.engine_options if kind.options_of_vllm else {})


def chat_template(model: ServedModel) -> ChatTemplate | None:
    """Returns the template for the model's prompts; None if it takes no conversations. Raises what transformers
    raises."""
    if model.task != "chat":
        return None
    tokenizer = AutoTokenizer.from_pretrained(
        str(model.tokenizer or model.path), trust_remote_code=model.trust_remote_code
    )
    if model.chat_template:
        tokenizer.chat_template = model.chat_template.read_text(encoding="utf-8")
    return ChatTemplate(tokenizer) if tokenizer.chat_template else None


def llm_config(model: ServedModel, template: ChatTemplate | None) -> LLMConfig:
    """Returns the model's configuration for ``ray.serve.llm``."""
    engine = engine_arguments(model)
    if template:
        engine["chat_template_content_format"] = {True: "openai", False: "string", None: "auto"}[template.takes_parts]
        if template.alone:
            engine["chat_template"] = template.alone
    if model.chat_template:
        engine["chat_template"] = str(model.chat_template)
    if model.tool_parser:
        engine |= {"enable_auto_tool_choice": True, "tool_call_parser": model.tool_parser}
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": str(model.path)},
        accelerator_config={"kind": "cpu"},
        engine_kwargs=engine,
        callback_config={"callback_class": NoDownload},
        log_engine_metrics=False,
    )
