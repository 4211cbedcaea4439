"""vLLM's CPU engine as a core."""

from __future__ import annotations

import tempfile
from typing import Any

from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from llm_ray.serve.engines.punica import lora_on_cpus
from llm_ray.serve.engines.sampling import CheckedSampler, failure
from llm_ray.serve.models import ServedModel


class VllmCore:
    """vLLM's own EngineCore, with its worker in the same thread."""

    def __init__(self, _: ServedModel, config: VllmConfig) -> None:
        config.parallel_config.distributed_executor_backend = "uni"
        with lora_on_cpus():
            self._core = EngineCore(config, _Executor, log_stats=False)
        self._runner = self._core.model_executor.driver_worker.worker.model_runner
        self._sampler = CheckedSampler(self._runner.sampler.logprobs_mode, self._runner.sampler.use_fp64_gumbel)
        self._runner.sampler = self._sampler

    @staticmethod
    def refusal(params: SamplingParams) -> str | None:
        """Returns None: vLLM validates parameters itself."""
        return None

    def add(self, request: EngineCoreRequest) -> None:
        self._core.add_request(*self._core.preprocess_add_request(request))

    def abort(self, request_ids: list[str]) -> None:
        self._core.abort_requests(request_ids)

    def has_work(self) -> bool:
        return bool(self._core.scheduler.has_requests())

    def step(self) -> EngineCoreOutputs:
        self._sampler.stuck = {}
        outputs, executed = self._core.step_fn()
        self._core.post_step(model_executed=executed)
        result = (outputs or {}).get(0) or EngineCoreOutputs()
        if self._sampler.stuck:
            stuck = {self._runner.input_batch.req_ids[row]: reason for row, reason in self._sampler.stuck.items()}
            self._core.abort_requests([*stuck])
            result.outputs = [output for output in result.outputs if output.request_id not in stuck]
            result.outputs += [failure(request_id, reason) for request_id, reason in stuck.items()]
        return result

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._core, method)(*args)

    def shutdown(self) -> None:
        self._core.shutdown()


class _Executor(UniProcExecutor):
    """vLLM's single-worker executor, without its leftover: vLLM leaves the workers' rendezvous file in TMPDIR."""

    def _init_executor(self) -> None:
        with tempfile.TemporaryDirectory(prefix="llm-ray-worker-") as self._folder:
            super()._init_executor()

    def _distributed_args(self) -> tuple[str, int, int]:
        return f"file://{self._folder}/workers", 0, 0
