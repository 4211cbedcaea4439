"""The serving engines: what each is for, what it supports, and where its core is.

A new engine is an entry here, and a core (`llm_ray.serve.engines.thread.Core`) in a file of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

EngineName = Literal["vllm", "openvino", "transformers"]
EngineChoice = Literal["auto", "vllm", "openvino", "transformers"]
"""What a conf may say: one of them, or `auto`, for which a deployment's plan chooses
(`llm_ray.serve.deployments.engine`)."""
WeightForm = Literal["fp32", "bf16", "int8", "int4"]
WEIGHTS: tuple[WeightForm, ...] = get_args(WeightForm)


@dataclass(frozen=True)
class Engine:
    """What must be known about an engine before anything is loaded."""

    title: str
    """For users: its name and purpose."""
    core: str
    """`module:class` of its core, which is imported only in the replica."""
    converts: bool = False
    """It reads weights converted into its own form (`weights` of the conf), not the model's folder (`precision`)."""
    adapters: bool = False
    """It serves LoRA adapters along with their base."""
    any_malloc: bool = True
    """Its process may start with a preloaded malloc (LD_PRELOAD), as Ray's workers do; if not, that would end it."""
    compiles: bool = False
    """It supports `compile`."""
    causal_only: bool = False
    """It supports only models that transformers loads as causal models."""
    front_end: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """vLLM engine arguments that the front end needs for this core."""
    options_of_vllm: bool = False
    """`engine_options` are vLLM's engine arguments."""

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
"""The engine that does what any other does, if not as fast."""
FASTEST: EngineName = "openvino"
"""The engine that answers fastest on CPUs (docs/reference/benchmarks.md)."""


def forms(engine: EngineChoice) -> tuple[str, ...]:
    """What the weights may be computed in, the default first; with `auto` the engine decides that too."""
    return ("auto",) if engine == "auto" else ENGINES[engine].forms


def able(engine: EngineChoice, trait: str) -> bool:
    """Whether the engine has a trait; of `auto`, whether an engine that has it can be chosen."""
    return any(getattr(kind, trait) for name, kind in ENGINES.items() if engine in ("auto", name))


def engines_with(trait: str) -> str:
    """Names of the engines that have a trait, for a message: "vllm", "vllm or other"."""
    return " or ".join(name for name, engine in ENGINES.items() if getattr(engine, trait))
