"""The serving engines: purpose, features, and the class of each core.

To add an engine, add an entry here and a core (`llm_ray.serve.engines.thread.Core`) in its own file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

EngineName = Literal["vllm", "openvino", "transformers"]
EngineChoice = Literal["auto", "vllm", "openvino", "transformers"]
"""Values of `engine` in a conf; `auto` is resolved when a deployment is planned
(`llm_ray.serve.deployments.engine`)."""
WeightForm = Literal["fp32", "bf16", "int8", "int4"]
WEIGHTS: tuple[WeightForm, ...] = get_args(WeightForm)


@dataclass(frozen=True)
class Engine:
    """Properties of an engine that are needed before anything is loaded."""

    title: str
    """Name and purpose, for users."""
    core: str
    """`module:class` of its core, imported only in replicas."""
    converts: bool = False
    """Whether it reads weights converted to its own form (`weights` of the conf) instead of the model's folder
    (`precision`)."""
    adapters: bool = False
    """Whether it serves LoRA adapters."""
    any_malloc: bool = True
    """Whether its process may preload a malloc (LD_PRELOAD), as Ray's workers do; otherwise it would crash."""
    compiles: bool = False
    """Whether it supports `compile`."""
    causal_only: bool = False
    """Whether it supports only models that transformers loads as causal models."""
    front_end: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """vLLM engine arguments that the front end needs for this core."""
    options_of_vllm: bool = False
    """Whether `engine_options` are vLLM's engine arguments."""

    @property
    def forms(self) -> tuple[str, ...]:
        """Available forms of the weights, the default first."""
        return ("int8", "int4", "bf16", "fp32") if self.converts else ("auto", "fp32", "bf16")


ENGINES: Mapping[EngineName, Engine] = MappingProxyType(
    {
        "vllm": Engine(
            title="vLLM: every feature, adapters",
            core="llm_ray.serve.engines.vllm:VllmCore",
            adapters=True,
            compiles=True,
            options_of_vllm=True,
        ),
        "openvino": Engine(
            title="OpenVINO: int8 and int4, the fastest on CPUs",
            core="llm_ray.serve.engines.openvino:OpenVinoCore",
            converts=True,
            adapters=True,
            any_malloc=False,
        ),
        "transformers": Engine(
            title="transformers: any causal model, the slowest",
            core="llm_ray.serve.engines.transformers:TransformersCore",
            causal_only=True,
            front_end=MappingProxyType({"hf_overrides": {"architectures": ["TransformersForCausalLM"]}}),
        ),
    }
)
WIDEST: EngineName = "vllm"
"""The engine that supports everything any engine does, though it is not the fastest."""
FASTEST: EngineName = "openvino"
"""The fastest engine on CPUs (docs/reference/benchmarks.md)."""


def forms(engine: EngineChoice) -> tuple[str, ...]:
    """Returns the available forms of the weights, the default first; with `auto` the engine decides."""
    return ("auto",) if engine == "auto" else ENGINES[engine].forms


def able(engine: EngineChoice, trait: str) -> bool:
    """Returns whether the engine has a trait; for `auto`, whether any engine has it."""
    return any(getattr(kind, trait) for name, kind in ENGINES.items() if engine in ("auto", name))


def engines_with(trait: str) -> str:
    """Returns the names of the engines with a trait, for messages: "vllm" or "vllm or openvino"."""
    return " or ".join(name for name, engine in ENGINES.items() if getattr(engine, trait))
