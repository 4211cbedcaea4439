"""The schema of a serve conf: the endpoint, and the models that answer behind it.

As in ``llm_ray.conf.finetune``, the text under each field is its documentation.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from llm_ray.conf.engines import DEFAULT, ENGINES, EngineName, WeightForm, engines_with
from llm_ray.conf.section import AbsolutePath, Paths, Section

_PLAIN = r"[A-Za-z0-9][A-Za-z0-9._-]*(?:/[A-Za-z0-9][A-Za-z0-9._-]*)?"
# Names of models that the fine-tuning API has made are as OpenAI writes them: ft:BASE:SUFFIX:ID.
MODEL_NAME = re.compile(rf"(?:{_PLAIN}|ft:{_PLAIN}:[A-Za-z0-9._-]*:[A-Za-z0-9]+)")
# First parts of the endpoint's own paths, which a model's route /NAME would hide.
RESERVED_NAMES = frozenset(
    {"v1", "health", "ready", "metrics", "docs", "redoc", "openapi.json", "tokenize", "detokenize", "-"}
)


def _model_name(name: str) -> str:
    if not MODEL_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot be a model's name: letters, digits, '.', '_', '-', and one '/' in between (or "
            "ft:BASE:SUFFIX:ID)"
        )
    if name.partition("/")[0] in RESERVED_NAMES:
        raise ValueError(f"{name!r} is a path of the endpoint itself: choose another name")
    return name


ModelName = Annotated[str, AfterValidator(_model_name)]


class ServeRuntime(Section):
    """The Ray that serves."""

    mode: Literal["local", "cluster"] = "local"
    """`local` serves on this machine: Ray is started in the background if it does not run yet, and `llm-ray serve stop
    --all` ends it; `cluster` joins the running cluster at `address`."""
    address: str = "auto"
    """Address of the cluster (`mode: cluster`): `auto` on one of its nodes, else `host:port` of its head (GCS, port
    6379)."""


class Limits(Section):
    """What one API key may ask for, unless the key has limits of its own."""

    requests_per_minute: int | None = Field(None, ge=1)
    """Requests in any minute. Unset: as many as the models can answer."""
    concurrent: int | None = Field(None, ge=1)
    """Requests at the same time. Unset: as many as the models can answer."""
    max_tokens: int | None = Field(None, ge=1)
    """Tokens of one answer. Unset: as many as fit the model."""


class FinetuningApi(Section):
    """OpenAI's fine-tuning API on the endpoint: clients upload data, have models finetuned on it, and ask them."""

    enabled: bool = False
    """Answer `/v1/files` and `/v1/fine_tuning/jobs`. Only on one machine (`runtime.mode: local`); beyond loopback only
    with API keys."""
    max_file_mib: float = Field(512, gt=0)
    """Largest file that can be uploaded, in MiB; larger ones get 413."""
    max_stored_mib: float = Field(2048, gt=0)
    """All files of one API key together, in MiB; an upload beyond that gets 413."""
    max_jobs: int = Field(4, ge=1)
    """Jobs of one API key that wait or run; further ones get 429. One job runs at a time, in order of arrival."""


class Endpoint(Section):
    """The HTTP endpoint that all models share. What a conf does not say of it stays as the running endpoint has it; its
    host, port and TLS are settled when Ray Serve starts."""

    host: str = "127.0.0.1"
    """Address to listen at. Beyond loopback (`0.0.0.0`, or an address of this host) API keys are demanded."""
    port: int = Field(8000, ge=1, le=65535)
    """Port to listen at."""
    proxies: Literal["head", "every_node"] = "head"
    """Hosts of the cluster that answer HTTP: the head alone, or every one with a model on it (behind a load
    balancer)."""
    api_keys: Literal["auto", "on", "off"] = "auto"
    """Whether requests need an API key (`llm-ray serve keys add NAME`). `auto`: yes as soon as the endpoint listens
    beyond loopback."""
    tls_certificate: AbsolutePath | None = None
    """PEM file with the certificate (chain) for HTTPS."""
    tls_key: AbsolutePath | None = None
    """PEM file with the certificate's private key."""
    cors_origins: tuple[str, ...] = ()
    """Web pages of these origins (`https://chat.example.org`) may ask from a browser. Empty: none."""
    max_body_mib: float = Field(8, gt=0)
    """Largest request body, in MiB; larger ones get 413."""
    body_timeout_s: float = Field(30, gt=0)
    """Seconds within which a request's body has to arrive."""
    request_timeout_s: float = Field(600, gt=0)
    """Seconds within which a request has to be answered, waiting in the queue and for a replica to start included."""
    limits: Limits = Limits()
    finetuning: FinetuningApi = FinetuningApi()

    @model_validator(mode="after")
    def _check(self) -> Endpoint:
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise ValueError("endpoint.tls_certificate and endpoint.tls_key belong together: give both, or none")
        if self.too_open:
            raise ValueError(self.too_open)
        return self

    def over(self, running: Endpoint) -> Endpoint:
        """The running endpoint, with what this one says of it."""
        return running.model_copy(update={key: getattr(self, key) for key in self.model_fields_set})

    @property
    def on_loopback(self) -> bool:
        """Whether only this machine reaches the endpoint."""
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
        """Why the endpoint must not be served as it is: strangers could use it to train. Empty where that is not so."""
        if not self.finetuning.enabled or self.on_loopback or self.needs_keys:
            return ""
        return (
            f"endpoint.finetuning.enabled needs API keys on {self.host}, but endpoint.api_keys is off: set it to auto, "
            "or listen on 127.0.0.1"
        )


class Autoscale(Section):
    """Replicas that come and go with the load."""

    min: int = Field(0, ge=0)
    """Fewest replicas. 0: none when nobody asks; the next request starts one and waits for it."""
    max: int = Field(1, ge=1)
    """Most replicas."""
    target: float | None = Field(None, gt=0)
    """Requests at the same time that each replica should have; more start another one. Unset: half of `max_batch`."""
    idle_s: float = Field(300, ge=0)
    """Seconds of less load before a replica is taken away."""

    @model_validator(mode="after")
    def _check(self) -> Autoscale:
        if self.max < self.min:
            raise ValueError(f"autoscale.max is {self.max}, less than autoscale.min, {self.min}")
        return self


class ModelServing(Section):
    """One model as it is served."""

    model: str = Field(min_length=1)
    """What to serve: a run's name, a name in the model registry, a folder in Hugging Face (or OpenVINO) form, or a hub
    id."""
    tokenizer: str | None = None
    """Tokenizer other than the model's own: a folder, or a name in the model registry."""
    chat_template: AbsolutePath | None = None
    """A Jinja file with a chat template that replaces the model's own."""
    upload: bool = False
    """With serve.yml: the model, its adapters, `tokenizer` and `chat_template`, where they are files or folders, lie on
    the machine that Ansible runs on, and are copied to the shared storage, once. Elsewhere it has no effect."""
    engine: EngineName = DEFAULT
    """What computes: `vllm` (every feature, adapters), `openvino` (int8 and int4 weights: the fastest on CPUs),
    `transformers` (any causal model, the slowest)."""
    weights: WeightForm | None = None
    """Form of the weights for engine `openvino`; a model that is not converted yet is converted first. Unset: as the
    folder has them, int8 for one that is to be converted."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic. `auto`: that of the stored weights; bf16 only where the CPU multiplies it in hardware."""
    max_model_len: int | None = Field(None, ge=16)
    """Longest prompt and answer together, in tokens. Unset: the model's, at most 8192."""
    max_batch: int = Field(32, ge=1)
    """Requests that a replica computes at the same time; more wait in the queue."""
    max_queue: int = Field(128, ge=1)
    """Requests that may wait; more get 429."""
    kv_cache_gib: float | None = Field(None, gt=0)
    """Memory of a replica for the keys and values of running requests. Unset: room for 16384 tokens, and for two
    requests of the longest."""
    cpus: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Cores of a replica, its own. `auto`: as many free ones of a host as help a model of this size, at most 64, and no
    more than leave some for each of `autoscale.max` replicas; where none are free it shares those of others."""
    replicas: int = Field(1, ge=1)
    """Replicas, each with its own weights and cores. `autoscale` replaces it."""
    autoscale: Autoscale | None = None
    """Replicas that come and go with the load, down to none."""
    adapters: dict[ModelName, str] = Field(default_factory=dict)
    """LoRA adapters on this base model (engine `vllm`), each under a model name of its own: name: run or folder. They
    can be changed without a restart where there is at least one from the beginning."""
    sampling_defaults: Literal["model", "openai"] = "model"
    """What samples the answer to a request that does not say: `model`, temperature, top_p, penalties and most new
    tokens as the model's generation_config.json has them, which `llm-ray serve status` shows; `openai`, temperature 1
    and nothing else."""
    tools: Literal["auto", "off"] | str = "auto"
    """How tool calls are read from answers: `auto` (as the model's chat template writes them), `off`, or the name of
    one of vLLM's tool parsers."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Refused unless the model is named in `trusted_models` as well."""
    trusted_models: tuple[str, ...] = ()
    """Models (as written in `model`) whose own code may run."""
    compile: bool = False
    """Compile the model first (engine `vllm`, no adapters): starts slower, answers faster. Needs a C++ compiler on
    every host."""
    engine_options: dict[str, Any] = Field(default_factory=dict)
    """Further options of the engine, by its own names: vLLM's engine arguments, OpenVINO's properties."""

    @model_validator(mode="after")
    def _check(self) -> ModelServing:
        wrong = []
        engine = ENGINES[self.engine]
        if self.adapters and not engine.adapters:
            able = engines_with("adapters")
            wrong.append(
                f"adapters are served by engine {able} alone, but engine is {self.engine}: set engine: {able}, or "
                "deploy the merged model"
            )
        if self.weights and not engine.converts:
            able = engines_with("converts")
            wrong.append(
                f"weights is for engine {able}, but engine is {self.engine}: set engine: {able}, or use precision"
            )
        if self.compile and not engine.compiles:
            wrong.append(f"compile is for engine {engines_with('compiles')}, but engine is {self.engine}")
        if self.compile and self.adapters:
            wrong.append("compile does not go together with adapters: vLLM's CPU engine compiles no model with LoRA")
        if self.autoscale and self.replicas != 1:
            wrong.append(f"replicas is {self.replicas}, and autoscale is there too: give one of them")
        if self.trust_remote_code and self.model not in self.trusted_models:
            wrong.append(
                "trust_remote_code runs code that comes with the model: to allow it, read that code and add "
                f"{self.model!r} to trusted_models"
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
    """The models, by the name that clients ask for (the `model` of a request, and the route `/NAME`)."""

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
        for name in self.models:  # part of file names, in which a slash becomes --
            if (other := flat.setdefault(name.replace("/", "--"), name)) != name:
                wrong.append(
                    f"models.{name}: its name cannot be told from that of models.{other}: give one of them another"
                )
        for name, model in self.models.items():
            for adapter in model.adapters:
                key = f"models.{name}.adapters.{adapter}"
                if adapter in owner:
                    wrong.append(f"{key}: the name is taken already, by {owner[adapter]}: give one of them another")
                owner[adapter] = key
        if wrong:
            raise ValueError("\n".join(wrong))
        return self
