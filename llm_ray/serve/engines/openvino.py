"""OpenVINO as a core: the fastest engine, for models converted with ``llm-ray model convert MODEL --to openvino``.

Batching, paged KV cache and sampling are done by ``openvino_genai.ContinuousBatchingPipeline``, which releases the GIL
while it computes. `OpenVinoCore.refusal` lists the sampling parameters of vLLM that it does not support. A LoRA adapter
applies to the whole pipeline, so requests of different adapters take turns (:mod:`llm_ray.serve.engines.turns`).
"""

from __future__ import annotations

import json
import logging
import random
import re
import tempfile
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
import torch
import xgrammar
from openvino import opset13
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.outputs import LogprobsLists
from vllm.v1.structured_output.utils import choice_as_grammar, grammar_is_likely_lark

from llm_ray.errors import ModelError
from llm_ray.hardware import Precision
from llm_ray.models.openvino import adaptable_layers
from llm_ray.serve.engines.openvino_adapters import frame, read_adapter
from llm_ray.serve.engines.sampling import failure
from llm_ray.serve.engines.turns import BASE, Turns
from llm_ray.serve.models import ServedModel

_NUMBER_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "u8": 1}
_SCALE_BYTES = {"u8": 8}  # per key or value of a head
_BLOCK_TOKENS = 32  # per cache block, on CPUs
# Tokens per step, including prompt chunks: larger chunks delay the running requests.
_STEP_TOKENS = 512
# Number of schemas remembered as unreadable.
_REMEMBERED = 99
# Rules that vLLM's xgrammar writes and OpenVINO's older one cannot parse.
_NEWER = re.compile(r"^\w+ ::= (Regex|TagDispatch|TokenTagDispatch)\(", re.MULTILINE)


@dataclass
class _Work:
    """A waiting or running request."""

    request_id: str
    prompt: list[int]
    params: SamplingParams
    adapter: int = BASE
    tokens: list[int] = field(default_factory=list)


class OpenVinoCore:
    """openvino_genai's continuous batching as an engine core.

    Raises ModelError if the model's folder has no OpenVINO model, or if the cache is too small for one request of
    max_model_len.
    """

    def __init__(self, model: ServedModel, config: VllmConfig) -> None:
        if not (model.path / "openvino_model.xml").is_file():
            raise ModelError(
                f"{model.path} has no openvino_model.xml: create it with `llm-ray model convert {model.path} --to "
                "openvino`"
            )
        threads = torch.get_num_threads()  # set by the front end for this thread
        computes_in = arithmetic(model.precision)
        if model.precision == "bf16" and computes_in != "bf16":
            logging.getLogger("ray.serve").warning(
                f"model {model.name}: OpenVINO does not compute in bf16 on this processor, which lacks AVX-512: it "
                "uses fp32, and keys and values need twice the memory"
            )
        properties: dict[str, Any] = precision_properties(computes_in) | {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": threads,
            "sampler_num_threads": threads,
        }
        properties |= model.engine_options
        scheduler = genai.SchedulerConfig()
        scheduler.num_kv_blocks = _blocks(model, config, str(properties["KV_CACHE_PRECISION"]))
        scheduler.max_num_batched_tokens = max(_STEP_TOKENS, model.max_batch)
        # Cached prefixes are looked up by tokens only, so with adapters they could come from another adapter.
        scheduler.enable_prefix_caching = not model.lora_rank
        self._layers = adaptable_layers(model.path) if model.lora_rank else {}
        # The base model gets an adapter without effect: when GenAI switches from no adapter to one, the first token in
        # bf16 can be NaN.
        self._adapters: dict[int, genai.Adapter] = {BASE: frame(self._layers)} if self._layers else {}
        if self._layers:
            properties["adapters"] = _adapter(self._adapters[BASE])
        vocabulary = _vocabulary(config)
        self._load = lambda: genai.ContinuousBatchingPipeline(model.path, vocabulary, scheduler, "CPU", **properties)
        try:
            self._pipeline = self._load()
        except RuntimeError as error:
            raise ModelError(
                f"{model.path}: OpenVINO cannot load the model: {str(error).strip().splitlines()[-1]}"
            ) from error
        self._max_batch = model.max_batch
        self._max_model_len = model.max_model_len
        self._turns = Turns()
        self._waiting: dict[str, _Work] = {}
        self._running: dict[str, _Work] = {}
        self._handles: dict[str, genai.GenerationHandle] = {}
        self._numbers = count()
        self._unreadable: list[StructuredOutputsParams | None] = []
        self._apply(BASE)

    @staticmethod
    def refusal(params: SamplingParams) -> str | None:
        """Returns why a request is not supported, naming the parameter; None if it is."""
        shape = params.structured_outputs
        # GenAI returns only the chosen token's logprob, which is also the top entry if the token is certainly the
        # likeliest.
        likeliest = params.temperature == 0 and not (
            shape
            or params.presence_penalty
            or params.frequency_penalty
            or params.repetition_penalty != 1
            or params.min_tokens
        )
        cannot = {
            "return the likeliest tokens (logprobs, top_logprobs)": (params.logprobs or 0)
            not in ((0, 1) if likeliest else (0,)),
            "return logprobs of the prompt (prompt_logprobs)": params.prompt_logprobs is not None,
            "return logprobs of given tokens (logprob_token_ids)": bool(params.logprob_token_ids),
            "score the prompt (prompt_logprob_token_ids)": params.prompt_logprob_token_ids is not None,
            "do logit_bias": bool(params.logit_bias),
            "do allowed_token_ids": params.allowed_token_ids is not None,
            "do bad_words": bool(params.bad_words),
            "do thinking_token_budget": params.thinking_token_budget is not None,
            "do repetition_detection": params.repetition_detection is not None,
            "do trace_decode_token_ids": params.trace_decode_token_ids is not None,
            "do watermarking": bool(params.watermarking),
        }
        if shape:
            disobeyed = _disobeyed(shape)
            cannot |= {
                "do structured_outputs.disable_any_whitespace": shape.disable_any_whitespace,
                "do structured_outputs.disable_additional_properties": shape.disable_additional_properties,
                "use a structural_tag of the old form (structures, triggers)": '"structures"'
                in (shape.structural_tag or ""),
                f"enforce {disobeyed} in a schema that also has patterns or formats": disobeyed is not None,
                "read Lark grammars (structured_outputs.grammar)": grammar_is_likely_lark(shape.grammar or ""),
            }
        return next(
            (f"engine openvino cannot {what}; engine vllm can" for what, asked in cannot.items() if asked), None
        )

    def add(self, request: EngineCoreRequest) -> None:
        """Adds a request. Raises VLLMValidationError, reported to the client as 400, for what `refusal` cannot
        check."""
        if request.sampling_params is None:
            raise VLLMValidationError("engine openvino computes no embeddings; engine vllm does")
        for what in ("prompt_embeds", "mm_features", "cache_salt"):
            if getattr(request, what):
                raise VLLMValidationError(f"engine openvino does not support {what}; engine vllm does")
        if request.sampling_params.structured_outputs in self._unreadable:
            raise VLLMValidationError(
                "engine openvino cannot read this schema, pattern or grammar (structured_outputs, response_format); "
                "engine vllm can"
            )
        lora = request.lora_request
        if lora and lora.lora_int_id not in self._adapters:
            self._add_lora(lora)
        adapter = lora.lora_int_id if lora else BASE
        self._wait(_Work(request.request_id, request.prompt_token_ids or [], request.sampling_params, adapter))

    def abort(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._turns.leave(request_id)
            self._waiting.pop(request_id, None)
            if self._running.pop(request_id, None):
                self._handles.pop(request_id).cancel()

    def has_work(self) -> bool:
        return bool(self._waiting) or self._pipeline.has_non_finished_requests()

    def step(self) -> EngineCoreOutputs:
        begun = []
        refused = []
        if self._turns.over():
            self._pause()
        if (adapter := self._turns.next(len(self._running))) is not None:
            self._apply(adapter)
        for request_id in self._turns.take(self._max_batch - len(self._running)):
            work = self._waiting.pop(request_id)
            try:
                self._start(work)
            except RuntimeError as error:  # OpenVINO validates with bounds of its own
                refused.append(
                    failure(
                        work.request_id,
                        f"engine openvino does not support these settings: {str(error).partition(' failed at')[0]}",
                    )
                )
                continue
            self._running[work.request_id] = work
            begun.append(work)
        self._turns.count()
        try:
            self._pipeline.step()
        except RuntimeError:
            # OpenVINO compiles a schema within a step, and its xgrammar is older than vLLM's, which has accepted the
            # schema. After such an error the pipeline is unusable: requests with a schema fail, the others continue in
            # a new pipeline.
            shaped = [work for work in self._running.values() if work.params.structured_outputs]
            if not shaped:
                raise
            if len(new := [work for work in begun if work in shaped]) == 1:  # its schema is rejected from now on
                self._unreadable = [*self._unreadable[-_REMEMBERED:], new[0].params.structured_outputs]
            outputs = [failure(work.request_id, None) for work in shaped]
            del self._pipeline
            self._pipeline = self._load()
            self._apply(self._turns.active)
            for work in self._running.values():
                if work not in shaped:
                    self._start(work)
        else:
            outputs = [output for work in self._running.values() if (output := self._read(work))]
        for output in outputs:
            if output.finished:
                self.abort([output.request_id])
        return EngineCoreOutputs(outputs=[*refused, *outputs])

    def call(self, method: str, *args: Any) -> Any:
        if method == "get_supported_tasks":
            return ("generate",)
        if method == "add_lora":
            return self._add_lora(*args)
        if method == "remove_lora":
            return self._adapters.pop(args[0], None) is not None
        if method == "list_loras":
            return {*self._adapters} - {BASE}
        raise NotImplementedError(f"engine openvino does not support {method}; engine vllm does")

    def shutdown(self) -> None:
        self.abort([*self._waiting, *self._running])
        del self._pipeline

    def _add_lora(self, lora: LoRARequest) -> bool:
        """Loads an adapter. Raises ValueError if it cannot be applied to this model."""
        self._adapters[lora.lora_int_id] = read_adapter(Path(lora.lora_path), self._layers)
        return True

    def _apply(self, adapter: int) -> None:
        """Activates an adapter. No request may be running.

        GenAI accepts adapters only in `generate`; later requests of `add_request` use the same.
        """
        if not self._layers:
            return
        while self._pipeline.has_non_finished_requests():  # cancelled ones
            self._pipeline.step()
        token = genai.GenerationConfig()
        token.max_new_tokens = 1
        token.adapters = _adapter(self._adapters[adapter])
        self._pipeline.generate([ov.Tensor(np.zeros((1, 1), dtype=np.int64))], [token])

    def _wait(self, work: _Work) -> None:
        self._turns.wait(work.request_id, work.adapter)
        self._waiting[work.request_id] = work

    def _pause(self) -> None:
        """Returns running requests to the queue, except those that could not resume with the same result."""
        for request_id, work in [*self._running.items()]:
            if _goes_on(work.params):
                del self._running[request_id]
                self._handles.pop(request_id).cancel()
                self._wait(work)

    def _start(self, work: _Work) -> None:
        """Submits a request to the pipeline, with the tokens generated so far as part of its prompt."""
        done = len(work.tokens)
        room = self._max_model_len - len(work.prompt)
        generation = _generation(work.params)
        generation.max_new_tokens = min(work.params.max_tokens or room, room) - done
        generation.min_new_tokens = max(work.params.min_tokens - done, 0)
        tokens = ov.Tensor(np.array([work.prompt + work.tokens], dtype=np.int64))
        self._handles[work.request_id] = self._pipeline.add_request(next(self._numbers), tokens, generation)

    def _read(self, work: _Work) -> EngineCoreOutput | None:
        """Returns a request's output of this step: a token or the end; None if there is nothing new."""
        handle = self._handles[work.request_id]
        if not handle.can_read():
            if handle.get_status() != genai.GenerationStatus.IGNORED:
                return None
            # The cache was full and requests were dropped: resume from the tokens so far.
            handle.cancel()
            if work.params.structured_outputs and work.tokens:  # its schema would start over
                return failure(work.request_id, None)
            self._start(work)
            return None
        (new,) = handle.read().values()
        tokens = new.generated_ids
        work.tokens += tokens
        output = EngineCoreOutput(work.request_id, tokens)
        if work.params.logprobs is not None:
            column = np.array(new.generated_log_probs, dtype=np.float32)[:, None]
            # Only the chosen token. Its rank is unknown; no response contains it.
            output.new_logprobs = LogprobsLists(np.array(tokens)[:, None], column, np.ones(len(tokens), dtype=np.int64))
        if new.finish_reason != genai.GenerationFinishReason.NONE:
            stop = work.tokens[-1]
            output.finish_reason = FinishReason.LENGTH
            if stop == work.params.eos_token_id:
                output.finish_reason = FinishReason.STOP
            elif stop in (work.params.stop_token_ids or ()):
                output.finish_reason, output.stop_reason = FinishReason.STOP, stop
        return output


def _goes_on(params: SamplingParams) -> bool:
    """Returns whether a request can resume with its tokens as part of the prompt: a schema and a seeded generator would
    start over, and the presence and frequency penalties ignore the prompt."""
    return not (
        params.structured_outputs or params.presence_penalty or params.frequency_penalty or params.seed is not None
    )


def _adapter(applied: genai.Adapter) -> genai.AdapterConfig:
    return genai.AdapterConfig([(applied, 1.0)], genai.AdapterConfig.Mode.MODE_DYNAMIC)


def _generation(params: SamplingParams) -> genai.GenerationConfig:
    """Converts sampling parameters to OpenVINO's, except for the number of tokens."""
    generation = genai.GenerationConfig()
    stops = {*(params.stop_token_ids or ()), *([] if params.eos_token_id is None else [params.eos_token_id])}
    if stops:
        generation.stop_token_ids = stops
        generation.eos_token_id = min(stops)  # any of them, to keep the model's default out
    else:
        generation.ignore_eos = True
    generation.do_sample = params.temperature > 0
    if generation.do_sample:
        generation.temperature = params.temperature
        generation.top_p = max(params.top_p, 1e-30)  # OpenVINO rejects 0 in single precision
        generation.min_p = min(params.min_p, 0.999999)  # OpenVINO rejects 1, which vLLM allows
        if params.top_k > 0:
            generation.top_k = params.top_k
        generation.rng_seed = (random.getrandbits(32) if params.seed is None else params.seed) % 2**32  # no secret
    generation.presence_penalty = params.presence_penalty
    generation.frequency_penalty = params.frequency_penalty
    generation.repetition_penalty = params.repetition_penalty
    generation.logprobs = 0 if params.logprobs is None else 1
    if params.structured_outputs:
        generation.structured_output_config = _structure(params.structured_outputs)
    return generation


def _structure(asked: StructuredOutputsParams) -> genai.StructuredOutputConfig:
    structure = genai.StructuredOutputConfig()
    if grammar := _grammar(asked):
        structure.grammar = grammar
    elif asked.json is not None:
        structure.json_schema = _text(asked.json)
    elif asked.regex is not None:
        structure.regex = asked.regex
    elif asked.structural_tag is not None:
        structure.structural_tags_config = asked.structural_tag
    else:
        structure.grammar = asked.grammar if asked.grammar is not None else choice_as_grammar(asked.choice)
    return structure


def _grammar(asked: StructuredOutputsParams) -> str | None:
    """Returns the grammar of a schema or structural tag, compiled by vLLM's xgrammar: OpenVINO's older one ignores some
    schema keywords.

    None if there is no schema, or if the grammar has rules that OpenVINO cannot parse.
    """
    if asked.json is not None:
        grammar = xgrammar.Grammar.from_json_schema(_text(asked.json), any_whitespace=True)
    elif asked.json_object:
        grammar = xgrammar.Grammar.from_json_schema('{"type": "object"}', any_whitespace=True)
    elif asked.structural_tag is not None:
        grammar = xgrammar.Grammar.from_structural_tag(asked.structural_tag)
    else:
        return None
    text = re.sub(r"\{(\d+), -1\}", r"{\1,}", str(grammar))  # older syntax
    return None if _NEWER.search(text) else text


def _disobeyed(asked: StructuredOutputsParams) -> str | None:
    """Returns a schema keyword that OpenVINO's xgrammar ignores if it has to compile the schema itself; None if there
    is none."""
    schema = asked.json if asked.json is not None else asked.structural_tag
    if schema is None or _grammar(asked):
        return None
    waiting = [json.loads(_text(schema))]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
            for keyword in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
                if isinstance(part.get(keyword), int | float):
                    return keyword
            for keyword in ("additionalProperties", "unevaluatedProperties"):
                if "properties" in part and part.get(keyword, False) is not False:
                    return f"{keyword} beside properties"
    return None


def _text(schema: Any) -> str:
    return schema if isinstance(schema, str) else json.dumps(schema)


def arithmetic(precision: Precision) -> str:
    """Returns the type that OpenVINO computes in and stores keys and values as, by OpenVINO's name: bf16 if requested
    and supported by the CPU plugin on this processor, else f32.

    By default OpenVINO would choose bf16 with an 8-bit KV cache (which, with bf16, saves memory but no time). A bf16 KV
    cache with a plugin that fell back to f32 gives no answers.
    """
    if precision == "fp32":
        return "f32"
    number = opset13.parameter([1], ov.Type.f32)
    compiled = ov.Core().compile_model(
        ov.Model([opset13.relu(number)], [number]), "CPU", {"INFERENCE_PRECISION_HINT": "bf16"}
    )
    return "bf16" if compiled.get_property("INFERENCE_PRECISION_HINT") == ov.Type.bf16 else "f32"


def precision_properties(computes_in: str) -> dict[str, Any]:
    """Returns the OpenVINO properties for a type of :func:`arithmetic`, both for computation and for the KV cache."""
    properties: dict[str, Any] = {"INFERENCE_PRECISION_HINT": computes_in, "KV_CACHE_PRECISION": computes_in}
    if computes_in == "f32":  # otherwise layers with int8 and int4 weights quantize their inputs to 8 bits
        properties["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
    return properties


def _blocks(model: ServedModel, config: VllmConfig, stored_as: str) -> int:
    """Returns the number of cache blocks. Raises ModelError if they cannot hold one request of max_model_len."""
    parallel = config.parallel_config
    heads = config.model_config.get_num_layers(parallel) * config.model_config.get_num_kv_heads(parallel) * 2
    per_token = heads * (
        config.model_config.get_head_size() * _NUMBER_BYTES[stored_as] + _SCALE_BYTES.get(stored_as, 0)
    )
    blocks = model.kv_cache_bytes // (per_token * _BLOCK_TOKENS)
    if blocks * _BLOCK_TOKENS < model.max_model_len:
        need = model.max_model_len * per_token / 2**30
        raise ModelError(
            f"model {model.name}: a request of {model.max_model_len} tokens (max_model_len) needs {need:.2f} GiB for "
            f"keys and values, but the cache has {model.kv_cache_bytes / 2**30:.2f} GiB: raise kv_cache_gib or lower "
            "max_model_len"
        )
    return int(blocks)


def _vocabulary(config: VllmConfig) -> genai.Tokenizer:
    """Returns a tokenizer that only knows the bytes of each token, which structured outputs need; the front end handles
    text.

    openvino_genai reads the bytes from the constants that feed the node VocabDecoder of a detokenizer model. Converting
    a real detokenizer is not possible for every tokenizer; the bytes are those that vLLM's own engine uses.
    """
    from xgrammar import TokenizerInfo

    tokenizer = cached_tokenizer_from_config(config.model_config)
    vocabulary = TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=config.model_config.get_vocab_size()
    ).decoded_vocab
    ends = np.cumsum([len(token) for token in vocabulary], dtype=np.int32)
    begins = np.concatenate([[0], ends[:-1]]).astype(np.int32)
    characters = np.frombuffer(b"".join(vocabulary), dtype=np.uint8).astype(np.int32)
    tokens = opset13.parameter([-1, -1], ov.Type.i64)
    flat = opset13.convert(opset13.reshape(tokens, [-1], special_zero=False), "i32")
    node = opset13.concat([flat, *map(opset13.constant, (begins, ends, characters))], 0)
    node.set_friendly_name("VocabDecoder")
    with tempfile.TemporaryDirectory() as folder:
        ov.save_model(
            ov.Model([opset13.result(node)], [tokens]), f"{folder}/openvino_detokenizer.xml", compress_to_fp16=False
        )
        Path(folder, "config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id}), encoding="utf-8")
        # Named here, so that GenAI does not ask the detokenizer for it.
        Path(folder, "special_tokens_map.json").write_text(
            json.dumps({"eos_token": {"content": "</s>"}}), encoding="utf-8"
        )
        return genai.Tokenizer(folder)
