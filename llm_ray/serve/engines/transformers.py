"""Any causal transformers model as a core, with dynamic batching and optional IPEX.

Each step computes a token for every running request, and a chunk of waiting prompts: as many short ones as fit, or 512
tokens of a long one. ``llm_ray.serve.engines.batches`` computes the logits; sampling, stop conditions and grammars are
vLLM's code.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import deque
from typing import Any

import torch
import xgrammar
from transformers import GenerationConfig, PreTrainedModel
from vllm.config import VllmConfig
from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from llm_ray.conf.finetune import Model
from llm_ray.conf.section import Paths
from llm_ray.errors import ModelError
from llm_ray.models.load import find_base, load_model
from llm_ray.serve.engines.batches import Alone, Batch, Row, Rows, cells, group_heads, probe
from llm_ray.serve.engines.sampling import PlainSampler, failure, metadata
from llm_ray.serve.models import ServedModel

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Prompt tokens per step: larger chunks delay the running requests.
_PROMPT_TOKENS = 512
# Free tokens per request required to admit one: with less it would soon be preempted.
_SPARE = 128

logger = init_logger("vllm.llm_ray.transformers")


class TransformersCore:
    """A transformers model as an engine core.

    Raises ModelError if the model cannot be loaded, or if the cache is too small for one request of max_model_len.
    """

    def __init__(self, model: ServedModel, config: VllmConfig) -> None:
        self._model = _load(model)
        with torch.inference_mode():
            found = probe(self._model)
        if not found.batches:
            logger.warning(
                "%s computes batched requests differently from single ones: computing them one by one",
                type(self._model).__name__,
            )
        self._batches = found.batches
        self._capacity = _capacity(model, found.token_bytes)
        # Two batches are merged if the added padding takes less memory traffic than the weights, which are then read
        # once instead of twice.
        self._worth = self._model.get_memory_footprint() // max(found.token_bytes, 1)
        self._max_batch = model.max_batch
        self._max_model_len = model.max_model_len
        self._config = config
        self._sampler = PlainSampler()
        self._grammars = StructuredOutputManager(config)
        self._waiting: deque[Row] = deque()
        self._filling: Rows | None = None  # prompts being computed
        self._running: list[Rows] = []

    @staticmethod
    def refusal(params: SamplingParams) -> str | None:
        """Returns why a request is not supported, naming the parameter; None if it is."""
        cannot = {
            "return logprobs of the prompt (prompt_logprobs)": params.prompt_logprobs is not None,
            "return logprobs of given tokens (logprob_token_ids)": bool(params.logprob_token_ids),
            "score the prompt (prompt_logprob_token_ids)": params.prompt_logprob_token_ids is not None,
            "do thinking_token_budget": params.thinking_token_budget is not None,
            "do trace_decode_token_ids": params.trace_decode_token_ids is not None,
            "do watermarking": bool(params.watermarking),
        }
        return next(
            (f"engine transformers cannot {what}; engine vllm can" for what, asked in cannot.items() if asked), None
        )

    def add(self, request: EngineCoreRequest) -> None:
        """Adds a request. Raises VLLMValidationError, reported to the client as 400, for what `refusal` cannot
        check."""
        if request.sampling_params is None:
            raise VLLMValidationError("engine transformers computes no embeddings; engine vllm does")
        for what in ("prompt_embeds", "mm_features", "lora_request"):
            if getattr(request, what):
                raise VLLMValidationError(f"engine transformers does not support {what}; engine vllm does")
        params = request.sampling_params
        queued = Request.from_engine_core_request(request, None)
        self._grammars.grammar_init(queued)
        self._waiting.append(
            Row(queued, params, None if params.seed is None else torch.Generator().manual_seed(params.seed))
        )

    @torch.inference_mode()
    def abort(self, request_ids: list[str]) -> None:
        gone = set(request_ids)
        self._waiting = deque(row for row in self._waiting if row.request.request_id not in gone)
        for rows in self._all():
            self._keep(rows, [i for i, row in enumerate(rows.rows) if row.request.request_id not in gone])

    def has_work(self) -> bool:
        return bool(self._waiting or self._all())

    @torch.inference_mode()
    def step(self) -> EngineCoreOutputs:
        outputs: list[EngineCoreOutput] = []
        for rows in list(self._running):
            self._make_room(rows)
            if rows.rows:
                outputs += self._choose(rows, rows.forward(1))
        if self._filling is None:
            outputs += self._admit()
        if filling := self._filling:
            todo = filling.todo()
            tokens = min(todo, _PROMPT_TOKENS) if self._batches else todo
            logits = filling.forward(tokens)
            if tokens == todo:
                self._filling = None
                self._running.append(filling)
                outputs += self._choose(filling, logits)
                self._join(filling)
        elif not self._running and self._waiting:
            time.sleep(0.005)  # all are waiting for grammars, compiled in other threads
        return EngineCoreOutputs(outputs=outputs)

    def call(self, method: str, *args: Any) -> Any:
        if method == "get_supported_tasks":
            return ("generate",)
        if method == "reset_prefix_cache":
            return True
        raise NotImplementedError(f"engine transformers does not support {method}; engine vllm does")

    def shutdown(self) -> None:
        self._grammars.clear_backend()
        self._waiting.clear()
        self._filling = None
        self._running.clear()
        del self._model

    def _all(self) -> list[Rows]:
        return [*self._running, *([self._filling] if self._filling else [])]

    def _keep(self, rows: Rows, kept: list[int]) -> None:
        """Drops the other rows, and the batch if no row is left."""
        if len(kept) == len(rows.rows):
            return
        rows.keep(kept)
        if not kept:
            self._running = [other for other in self._running if other is not rows]
            if rows is self._filling:
                self._filling = None

    def _admit(self) -> list[EngineCoreOutput]:
        """Admits the requests that have waited longest, as far as there is room. Returns failures of those whose
        grammar did not compile."""
        held = sum(rows.cells() for rows in self._all())
        free = self._max_batch - sum(len(rows.rows) for rows in self._all())
        admitted: list[Row] = []
        failed: list[EngineCoreOutput] = []
        width = 0
        for row in list(self._waiting):
            if grammar := row.request.structured_output_request:
                if not grammar.is_grammar_ready:
                    continue
                if isinstance(grammar.grammar, Exception):
                    failed.append(failure(row.request.request_id, None))
                    self._waiting.remove(row)
                    continue
            wider = max(width, row.request.num_tokens)
            many = len(admitted) + 1
            if many > free or (admitted and (not self._batches or many * wider > _PROMPT_TOKENS)):
                break
            if (held or admitted) and held + cells(many, wider + _SPARE) > self._capacity:
                break
            self._waiting.remove(row)
            admitted.append(row)
            width = wider
        if admitted:
            self._filling = Batch(self._model, admitted) if self._batches else Alone(self._model, admitted)
        return failed

    def _make_room(self, rows: Rows) -> None:
        """Preempts the youngest requests until these rows have room for one more token. Preempted requests are
        recomputed later."""
        while sum(other.cells(1 if other is rows else 0) for other in self._all()) > self._capacity:
            holders = [
                (row.request.arrival_time, i, other) for other in self._all() for i, row in enumerate(other.rows)
            ]
            if len(holders) == 1:
                return
            _, index, other = max(holders, key=lambda holder: holder[0])
            self._waiting.appendleft(other.rows[index])
            self._keep(other, [i for i in range(len(other.rows)) if i != index])
            if not rows.rows:
                return

    def _join(self, new: Rows) -> None:
        """Merges the new batch into another, if it pays and there is room."""
        if not isinstance(new, Batch) or not new.rows:
            return
        for old in self._running:
            if old is new or not isinstance(old, Batch) or old.cost(new) > self._worth:
                continue
            together = cells(len(old.rows) + len(new.rows), max(old.width, new.width))
            others = sum(rows.cells() for rows in self._all() if rows is not old and rows is not new)
            if together <= max(self._capacity - others, old.cells() + new.cells()):
                old.absorb(new)
                self._running.remove(new)
                return

    def _choose(self, rows: Rows, logits: torch.Tensor) -> list[EngineCoreOutput]:
        """Samples each row's next token from the logits [rows, vocabulary] and drops finished rows."""
        logits = logits.float()
        requests = [row.request for row in rows.rows]
        self._constrain(requests, logits)
        if rows.sampling is None:
            generators = {i: row.generator for i, row in enumerate(rows.rows) if row.generator}
            rows.sampling = metadata(
                requests, [row.params for row in rows.rows], generators, self._config, logits.shape[1]
            )
        else:
            for processor in rows.sampling.logitsprocs.all:
                processor.update_state(None)
        sampled = self._sampler(logits, rows.sampling)
        logprobs = sampled.logprobs_tensors.tolists() if sampled.logprobs_tensors else None
        outputs = []
        for i, (row, token) in enumerate(zip(rows.rows, sampled.sampled_token_ids[:, 0].tolist(), strict=True)):
            request = row.request
            if i in self._sampler.stuck:
                request.status = RequestStatus.FINISHED_ERROR
                outputs.append(failure(request.request_id, self._sampler.stuck[i]))
                continue
            request.append_output_token_ids(token)
            check_stop(request, self._max_model_len)
            if not self._grammars.accept_tokens(request, [token]):
                request.status = RequestStatus.FINISHED_ERROR
            output = EngineCoreOutput(
                request.request_id,
                [token],
                finish_reason=request.get_finished_reason(),
                stop_reason=request.stop_reason,
            )
            if logprobs and row.params.logprobs is not None:
                output.new_logprobs = logprobs.slice_request(i, 1)
            outputs.append(output)
        self._keep(rows, [i for i, request in enumerate(requests) if not request.is_finished()])
        return outputs

    def _constrain(self, requests: list[Request], logits: torch.Tensor) -> None:
        """Masks the logits of tokens that the requests' grammars do not allow."""
        shaped = {request.request_id: i for i, request in enumerate(requests) if request.use_structured_output}
        mask = self._grammars.grammar_bitmask({request.request_id: request for request in requests}, [*shaped], {})
        if mask is not None:
            whole = torch.full((len(requests), mask.shape[1]), -1, dtype=torch.int32)
            whole[[*shaped.values()]] = torch.from_numpy(mask)
            xgrammar.apply_token_bitmask_inplace(logits, whole, indices=[*shaped.values()])


def _load(served: ServedModel) -> PreTrainedModel:
    dtype = _DTYPES[served.precision]
    # The serve conf already decides whether the folder is trusted.
    trusted = (str(served.path),) if served.trust_remote_code else ()
    conf = Model(
        base=str(served.path),
        tokenizer=str(served.tokenizer or served.path),
        trust_remote_code=served.trust_remote_code,
        trusted_models=trusted,
    )
    model = load_model(find_base(conf, Paths()), dtype).eval().requires_grad_(False)
    model.generation_config = GenerationConfig()  # ignore the model's suggestions, such as another cache or none
    group_heads(model)
    return _optimized_by_ipex(model, dtype) if importlib.util.find_spec("intel_extension_for_pytorch") else model


def _optimized_by_ipex(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Returns the model optimized by Intel Extension for PyTorch, in the IPEX profile (docs/reference/profiles.md)."""
    import intel_extension_for_pytorch as ipex

    optimized: PreTrainedModel = ipex.optimize(model, dtype=dtype, inplace=True)
    logging.getLogger("ray.serve").info(f"optimized by intel-extension-for-pytorch {ipex.__version__}")
    return optimized


def _capacity(model: ServedModel, token_bytes: int) -> int:
    """Returns how many tokens the cache can hold. Raises ModelError if that is less than one request of
    max_model_len."""
    capacity = model.kv_cache_bytes // max(token_bytes, 1)
    if capacity < model.max_model_len:
        need = model.max_model_len * token_bytes / 2**30
        raise ModelError(
            f"model {model.name}: a request of {model.max_model_len} tokens (max_model_len) needs {need:.2f} GiB for "
            f"keys and values, but the cache has {model.kv_cache_bytes / 2**30:.2f} GiB: raise kv_cache_gib or lower "
            "max_model_len"
        )
    return capacity
