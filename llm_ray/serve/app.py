"""Models as one Ray Serve application with the OpenAI API: chat, completions, models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llm_ray.serve.models import ServedModel, choose_dtype, kv_cache_bytes, longest

if TYPE_CHECKING:
    from ray.serve import Application
    from ray.serve.llm import LLMConfig

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",  # the models are folders
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}


def build_app(models: Sequence[ServedModel]) -> Application:
    """The application: a deployment for each model, and one that speaks HTTP in front of them.

    Raises ModelError for a folder without a readable config.json.
    """
    from ray.serve.llm import build_openai_app

    ingress = {"num_replicas": 1, "ray_actor_options": {"num_cpus": 0}}
    return build_openai_app({"llm_configs": [_config(model) for model in models], "ingress_deployment_config": ingress})


def _config(model: ServedModel) -> LLMConfig:
    from ray.serve.llm import LLMConfig

    precision = choose_dtype(model)
    engine: dict[str, Any] = {
        "max_model_len": longest(model),
        "kv_cache_memory_bytes": kv_cache_bytes(model, precision),  # given, vLLM needs no forward pass to find it out
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[precision],
        "enforce_eager": model.enforce_eager,
    }
    return LLMConfig(
        model_loading_config={"model_id": model.name, "model_source": str(model.path)},
        accelerator_config={"kind": "cpu"},
        placement_group_config={"bundles": [{"CPU": model.cpus}]},
        engine_kwargs=engine,
        runtime_env={"env_vars": _ENVIRONMENT},
        callback_config={"callback_class": "llm_ray.serve.replica.OwnCores", "callback_kwargs": {"cpus": model.cpus}},
        deployment_config={
            "num_replicas": 1,
            "max_constructor_retry_count": 1,  # what fails once at the start fails again
            "ray_actor_options": {"num_cpus": 0},  # the engine's CPUs are the bundle's
            "graceful_shutdown_timeout_s": 5,
        },
    )
