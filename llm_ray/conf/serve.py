"""The schema of a serve conf: the endpoint and its models.

As in ``llm_ray.conf.finetune``, the text under each field is its documentation.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from llm_ray.conf.engines import EngineChoice, WeightForm, able, engines_with
from llm_ray.conf.section import AbsolutePath, Paths, Section

_PLAIN = r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?"
# Models created by the fine-tuning API have names in OpenAI's form: ft:BASE:SUFFIX:ID.
MODEL_NAME = re.compile(rf"(?:{_PLAIN}|ft:{_PLAIN}:[A-Za-z0-9._-]*:[A-Za-z0-9]+)")
# First path segments of the endpoint's own routes, which a model's route /NAME would shadow.
RESERVED_NAMES = frozenset(
    {"v1", "health", "ready", "metrics", "docs", "redoc", "openapi.json", "tokenize", "detokenize", "-"}
)


def _model_name(name: str) -> str:
    if not MODEL_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is not a valid model name: use letters, digits, '.', '_', '-', and one '/' in between (or "
            "ft:BASE:SUFFIX:ID)"
        )
    if name.partition("/")[0] in RESERVED_NAMES:
        raise ValueError(f"{name!r} is a path of the endpoint: choose another name")
    return name


ModelName = Annotated[str, AfterValidator(_model_name)]


class ServeRuntime(Section):
    """The Ray cluster that serves."""

    mode: Literal["local", "cluster"] = "local"
    """`local` serves on this machine: Ray is started in the background if needed, and `llm-ray serve stop --all` stops
    it; `cluster` joins the running cluster at `address`."""
    address: str = "auto"
    """Address of the cluster (`mode: cluster`): `auto` on one of its nodes, else `host:port` of its head (GCS, port
    6379)."""


class Limits(Section):
    """Limits of each API key that has none of its own."""

    requests_per_minute: int | None = Field(None, ge=1)
    """Requests per minute. Unset: unlimited."""
    concurrent: int | None = Field(None, ge=1)
    """Concurrent requests. Unset: unlimited."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens per answer. Unset: as many as fit the model's context."""


class FinetuningApi(Section):
    """OpenAI's fine-tuning API on the endpoint: clients upload data, finetune models on it, and query them."""

    enabled: bool = False
    """Serve `/v1/files` and `/v1/fine_tuning/jobs`. Only on one machine (`runtime.mode: local`); beyond loopback only
    with API keys."""
    max_file_mib: float = Field(512, gt=0)
    """Largest file that can be uploaded, in MiB; larger ones get 413."""
    max_stored_mib: float = Field(2048, gt=0)
    """Total size of an API key's files, in MiB; uploads beyond that get 413."""
    max_jobs: int = Field(4, ge=1)
    """Waiting and running jobs per API key; more get 429. One job runs at a time, in order of arrival."""


class Endpoint(Section):
    """The HTTP endpoint that all models share. Unset keys keep the running endpoint's values; host, port and TLS are
    fixed when Ray Serve starts."""

    host: str = "127.0.0.1"
    """Address to listen on. Beyond loopback (`0.0.0.0`, or an address of this host) API keys are required."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen on."""
    proxies: Literal["head", "every_node"] = "head"
    """Hosts of the cluster that accept HTTP requests: only the head, or every host with a model (behind a load
    balancer)."""
    api_keys: Literal["auto", "on", "off"] = "auto"
    """Whether requests need an API key (`llm-ray serve keys add NAME`). `auto`: only if the endpoint listens beyond
    loopback."""
    tls_certificate: AbsolutePath | None = None
    """PEM file with the certificate (chain) for HTTPS."""
    tls_key: AbsolutePath | None = None
    """PEM file with the certificate's private key."""
    cors_origins: tuple[str, ...] = ()
    """Origins (`https://chat.example.org`) whose web pages may call the endpoint from a browser. Empty: none."""
    max_body_mib: float = Field(8, gt=0)
    """Largest request body, in MiB; larger ones get 413."""
    body_timeout_s: float = Field(30, gt=0)
    """Seconds within which a request's body must arrive."""
    request_timeout_s: float = Field(600, gt=0)
    """Seconds within which a request must be answered, including the wait in the queue and for a replica to start."""
    limits: Limits = Limits()
    finetuning: FinetuningApi = FinetuningApi()

    @model_validator(mode="after")
    def _check(self) -> Endpoint:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("endpoint.tls_certificate and endpoint.tls_key belong together: set both or neither")
        if self.too_open:
            raise ValueError(self.too_open)
        return self

    def over(self, running: Endpoint) -> Endpoint:
        """Returns the running endpoint updated with the keys set here."""
        return running.model_copy(update={key: getattr(self, key) for key in self.model_fields_set})

    @property
    def on_loopback(self) -> bool:
        """Whether the endpoint is reachable only from this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def needs_keys(self) -> bool:
        """Whether requests need an API key."""
        return self.api_keys == "on" or (self.api_keys == "auto" and not self.on_loopback)

    @property
    def too_open(self) -> str:
        """Why this endpoint is too open to be served, namely if strangers could start finetunes; empty if it is not."""
        if not self.finetuning.enabled or self.on_loopback or self.needs_keys:
            return ""
        return (
            f"endpoint.finetuning.enabled needs API keys on {self.host}, but endpoint.api_keys is off: set it to auto, "
            "or listen on 127.0.0.1"
        )


class Autoscale(Section):
    """Number of replicas that follows the load."""

    min: int = Field(0, ge=0)
    """Minimum replicas. 0: none while idle; the next request starts one and waits for it."""
    max: int = Field(1, ge=1)
    """Maximum replicas."""
    target: float | None = Field(None, gt=0)
    """Target number of concurrent requests per replica; more start another one. Unset: half of `max_batch`."""
    idle_s: float = Field(300, ge=0)
    """Seconds of lower load before a replica is removed."""

    @model_validator(mode="after")
    def _check(self) -> Autoscale:
        if self.max < self.min:
            raise ValueError(f"autoscale.max is {self.max}, less than autoscale.min, {self.min}")
        return self


class ModelServing(Section):
    """One served model."""

    model: str = Field(min_length=1)
    """What to serve: a run's name, a name in the model registry, a folder in Hugging Face (or OpenVINO) form, or a hub
    id."""
    tokenizer: str | None = None
    """Tokenizer other than the model's own: a folder, or a name in the model registry."""
    chat_template: AbsolutePath | None = None
    """A Jinja file with a chat template that replaces the model's own."""
    upload: bool = False
    """With serve.yml: if the model, its adapters, `tokenizer` and `chat_template` are files or folders, they are on the
    machine that runs Ansible and are copied to the shared storage once. Otherwise it has no effect."""
    engine: EngineChoice = "auto"
    """The engine: `vllm` (all features, adapters), `openvino` (int8 and int4 weights: the fastest on CPUs),
    `transformers` (any causal model, the slowest). `auto`: `openvino` if the model is converted or can be (`make
    setup-convert`); `vllm` for adapters, embeddings, `compile`, a `precision`, `engine_options`, and models that cannot
    be converted."""
    weights: WeightForm | None = None
    """Form of the weights for engine `openvino`; the model is converted first if needed. Unset: as in the folder, or
    int8 for a model to be converted."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic. `auto`: that of the stored weights; bf16 only if the CPU multiplies it in hardware."""
    max_model_len: int | None = Field(None, ge=16)
    """Maximum length of prompt and answer together, in tokens. Unset: the model's, at most 8192."""
    max_batch: int = Field(32, ge=1)
    """Requests that a replica computes concurrently; more wait in the queue."""
    max_queue: int = Field(128, ge=1)
    """Requests that may wait in the queue; more get 429."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Memory per replica for the keys and values of running requests. Unset: enough for 16384 tokens, and for two
    requests of maximum length."""
    cpus: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Dedicated cores per replica. `auto`: as many free cores of a host as are useful for a model of this size, at most
    64, and few enough to leave some for each of `autoscale.max` replicas; if none are free, it shares those of
    others."""
    replicas: int = Field(1, ge=1)
    """Replicas, each with its own weights and cores. `autoscale` replaces it."""
    autoscale: Autoscale | None = None
    """Number of replicas that follows the load, down to none."""
    adapters: dict[ModelName, str] = Field(default_factory=dict)
    """LoRA adapters on this base model (engines `vllm` and `openvino`), each under its own model name: `name: run or
    folder`. They can be changed without a restart if there was at least one from the start."""
    sampling_defaults: Literal["model", "openai"] = "model"
    """Sampling parameters of requests that do not set them: `model`, temperature, top_p, penalties and maximum new
    tokens of the model's generation_config.json, which `llm-ray serve status` shows; `openai`, only temperature 1."""
    tools: Literal["auto", "off"] | str = "auto"
    """How tool calls are parsed from answers: `auto` (in the syntax of the model's chat template), `off`, or the name
    of one of vLLM's tool parsers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Refused unless `trusted_models` lists the model as well."""
    trusted_models: tuple[str, ...] = ()
    """Models (as written in `model`) whose own code may run."""
    compile: bool = False
    """Compile the model first (engine `vllm`, no adapters): slower start, faster answers. Needs a C++ compiler on every
    host."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """More options of the engine, by its own names: vLLM's engine arguments, OpenVINO's properties."""

    @model_validator(mode="after")
    def _check(self) -> ModelServing:
        wrong = []
        if self.adapters and not able(self.engine, "adapters"):
            names = engines_with("adapters")
            wrong.append(
                f"adapters need engine {names}, but engine is {self.engine}: set engine to one of these, or deploy the "
                "merged model"
            )
        if self.weights and not able(self.engine, "converts"):
            names = engines_with("converts")
            wrong.append(
                f"weights needs engine {names}, but engine is {self.engine}: set engine: {names}, or use precision"
            )
        if self.compile and not able(self.engine, "compiles"):
            wrong.append(f"compile needs engine {engines_with('compiles')}, but engine is {self.engine}")
        if self.engine == "auto" and self.weights and self.compile:
            wrong.append(
                f"weights needs engine {engines_with('converts')}, but compile needs engine {engines_with('compiles')}: "
                "keep one of them"
            )
        if self.compile and self.adapters:
            wrong.append(
                "compile cannot be combined with adapters: vLLM's CPU engine does not compile models with LoRA"
            )
        if self.autoscale and self.replicas != 1:
            wrong.append(f"replicas is {self.replicas}, but autoscale is set too: keep one of them")
        if self.trust_remote_code and self.model not in self.trusted_models:
            wrong.append(
                f"trust_remote_code runs code that comes with the model: read that code, and add {self.model!r} to "
                "trusted_models to allow it"
            )
        if wrong:
            raise ValueError("\n".join(wrong))
        return self


class ServeConf(Section):
    """An endpoint and its models."""

    runtime: ServeRuntime = ServeRuntime()
    paths: Paths = Field(default_factory=Paths)
    endpoint: Endpoint = Endpoint()
    models: dict[ModelName, ModelServing] = Field(min_length=1)
    """The models, by their name for clients (the `model` of a request, and the route `/NAME`)."""

    @model_validator(mode="after")
    def _check(self) -> ServeConf:
        wrong = []
        if self.endpoint.finetuning.enabled and self.runtime.mode == "cluster":
            wrong.append(
                "endpoint.finetuning.enabled is for an endpoint on one machine (runtime.mode: local), but runtime.mode is "
                "cluster: leave it out, and finetune on the cluster with finetune.yml or llm-ray finetune"
            )
        owner = {name: f"models.{name}" for name in self.models}
        flat: dict[str, str] = {}
        for name in self.models:  # in file names, a slash becomes --
            if (other := flat.setdefault(name.replace("/", "--"), name)) != name:
                wrong.append(f"models.{name}: its name is too similar to that of models.{other}: rename one of them")
        for name, model in self.models.items():
            for adapter in model.adapters:
                key = f"models.{name}.adapters.{adapter}"
                if adapter in owner:
                    wrong.append(f"{key}: the name is already used by {owner[adapter]}: rename one of them")
                owner[adapter] = key
        if wrong:
            raise ValueError("\n".join(wrong))
        return self
