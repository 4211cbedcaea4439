"""A model's server in its replica: ``ray.serve.llm``'s LLMServer with our engine, and adapters from folders."""

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
ADAPTERS_AT_ONCE = 8  # adapters whose requests are computed together
_LOOKS = 300  # a tenth of a second apart
_LORAS_KEPT = 64  # adapters in memory


class NoDownload(CallbackBase):
    """The model is a folder that is there: Ray's task that would fetch it, in a process that imports vLLM for that, is
    left out."""

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False


class ModelServer(LLMServer):
    """LLMServer with the engine that the model's conf names. `start()` loads it."""

    def __init__(
        self, model: ServedModel
    ) -> None:  # LLMServer's own is a coroutine, which Serve alone knows how to call
        self._name = model.name
        self.adapters = dict(model.adapters)
        self._loading = asyncio.Lock()
        template = chat_template(model)
        self._template, self._tools = template, bool(model.tool_parser)
        LLMServerProtocol.__init__(self)
        self._init_shared(llm_config(model, template), functools.partial(Engine, model))

    async def start(self) -> None:
        """Load the engine and the adapters, and try the engine out: what it cannot compute shows now, not to the first
        client.

        Raises what the engine raises.
        """
        await super().start()
        await self.engine.try_out()
        for name, adapter in self.adapters.items():
            await self._load_adapter(name, adapter)

    async def _run_request(self, request: Any, *args: Any, **options: Any) -> Any:
        # Not by Serve's multiplexing, which sends requests for a name to one replica until that is full: here all have
        # all adapters.
        if request.model != self._name:
            await self._load_adapter(request.model, await self._adapter(request.model))
        return await super()._run_request(request, *args, **options)

    @functools.cached_property
    def _versions(self) -> tempfile.TemporaryDirectory[str]:
        """vLLM keeps what it has computed of a prompt by an adapter's name and path: here other weights have another
        path."""
        return tempfile.TemporaryDirectory(prefix="llm-ray-adapters-")

    async def _load_adapter(self, name: str, adapter: Adapter) -> None:
        """Load an adapter unless it is loaded. Raises ModelError for one that the engine does not take."""
        path = Path(self._versions.name) / adapter.identity
        if self.engine.adapter_path(name) == str(path):
            return
        async with self._loading:
            if self.engine.adapter_path(name) == str(path):
                return  # another request has loaded it meanwhile
            self._link(adapter)
            await self.engine.load_adapter(name, path)

    def _link(self, adapter: Adapter) -> None:
        path = Path(self._versions.name) / adapter.identity
        path.unlink(missing_ok=True)  # the same may lie elsewhere by now
        path.symlink_to(adapter.path)

    async def _adapter(self, name: str) -> Adapter:
        """The adapter; the gateway may know of one a moment before its replicas do. Raises VLLMNotFoundError, for the
        client a 404."""
        for _ in range(_LOOKS):
            if name in self.adapters:
                return self.adapters[name]
            await asyncio.sleep(0.1)
        raise VLLMNotFoundError(f"The model `{name}` is no longer served.")

    def _batch_output_stream(self, generator: Any) -> Any:  # the default waits 50 ms for each token, the first as well
        return collected(generator)

    async def chat(self, request: Any, raw_request_info: Any = None) -> Any:
        TOKEN_BY_TOKEN.set(bool(request.tools))
        return await super().chat(told(request, self._template, tools=self._tools), raw_request_info)

    async def tokenize(self, request: Any, raw_request_info: Any = None) -> Any:
        return await super().tokenize(told(request, self._template, tools=self._tools), raw_request_info)

    async def set_adapters(self, adapters: dict[str, Adapter]) -> None:
        """Serve these adapters from now on; those that are gone or have changed are unloaded. Raises ModelError for one
        that the engine does not take."""
        before, self.adapters = (
            self.adapters,
            dict(adapters),
        )  # first: requests that come meanwhile load what is to be served
        for name in before.keys() - adapters.keys():
            self.engine.forget_adapter(name)
        for name, adapter in adapters.items():
            if before.get(name) != adapter:
                self._link(adapter)  # vLLM reads it again where there are more adapters than it keeps
                await self._load_adapter(name, adapter)


def told(request: Any, template: ChatTemplate | None, *, tools: bool) -> Any:
    """The request with its messages as training has them; with `tools`, those that the chat template does not know are
    told in words."""
    if messages := getattr(request, "messages", ()):
        request.messages = as_learnt(messages)
        if template and tools and template.in_words(request.messages, request.tools):
            wanted = request.tools or () if getattr(request, "tool_choice", "auto") != "none" else ()
            request.messages = tell_tools(request.messages, [tool.model_dump() for tool in wanted])
            if request.tools:  # the template shall not write what it knows of them once more
                request.chat_template_kwargs = (request.chat_template_kwargs or {}) | {"tools": []}
        if template:
            request.messages = template.with_whole_system(request.messages, request.tools)
    return request


def engine_arguments(model: ServedModel) -> dict[str, Any]:
    """vLLM's AsyncEngineArgs for the model: for its own engine, and for the front end before others."""
    engine: dict[str, Any] = {
        "max_model_len": model.max_model_len,
        "max_num_seqs": model.max_batch,
        "kv_cache_memory_bytes": model.kv_cache_bytes,  # given, vLLM needs no forward pass to find it out
        "dtype": _DTYPES[model.precision],
        "enforce_eager": not model.compile,
        "trust_remote_code": model.trust_remote_code,
        "load_format": "hf",  # else Mistral's consolidated.safetensors goes before the files that were checked
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
    """The template that writes the model's prompts; None where it takes no conversations. Raises what transformers
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
    """What ``ray.serve.llm`` wants to know of the model."""
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
