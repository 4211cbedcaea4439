"""Plans a serve conf before anything is loaded: the models' parameters, and whether they fit on the cluster.

models = plan(conf, reporter)     # folders, arithmetic and memory; ModelError for what cannot be served
place(models, nodes, deployed)    # cores; ServeError with the figures if they do not fit
"""

from __future__ import annotations

import importlib.util
import runpy
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llm_ray.conf.engines import ENGINES, WIDEST, EngineName
from llm_ray.conf.section import Paths
from llm_ray.conf.serve import ModelServing, ServeConf
from llm_ray.errors import ModelError, ServeError
from llm_ray.hardware import Precision, cpu_flags, has_bf16
from llm_ray.models.complete import check_complete
from llm_ray.models.convert import DEFAULT_WEIGHTS, find_conversion, openvino_folder
from llm_ray.models.folder import Weights, check_folder, check_tokenizer, read_json
from llm_ray.models.limits import check_tokenizer_fits, positions
from llm_ray.models.load import fingerprint, resolve
from llm_ray.models.openvino import is_openvino, openvino_weights
from llm_ray.models.registry import has_chat_template, import_model, template_text
from llm_ray.models.tokens import check_alike
from llm_ray.progress import Reporter
from llm_ray.serve.deployments.adapters import adapter_bytes, adapter_rank, check_adapter, find_adapter
from llm_ray.serve.deployments.engine import Choice, choose_engine
from llm_ray.serve.models import (
    DEFAULT_MAX_MODEL_LEN,
    SIZES,
    Adapter,
    ServedModel,
    Task,
    kv_cache_bytes,
    longest,
    made_for,
    sampling,
    writes,
)

# Memory of a replica besides weights and cache: Python, torch, vLLM's front end, and activations.
_PROGRAM_BYTES = 1_800 * 2**20
_GIB = 2**30
# Memory for adapters is reserved in steps of this number, so that adding a few needs no new replicas.
_ADAPTERS = 8
# Bytes per adapter parameter in OpenVINO, which computes adapters in single precision and uses up to 1.5 times as much.
_OPENVINO_ADAPTER_BYTES = 6
# Most useful number of cores, for models of fewer than so many billion parameters.
_CORES = ((0.5, 8), (2, 16), (8, 32))
# Marks of tool calls in chat templates, and vLLM's parser for each.
_TOOL_FORMS = (
    ("<|python_tag|>", "llama3_json"),
    ("[TOOL_CALLS]", "mistral"),
    ("<function=", "qwen3_coder"),
    ("functools", "phi4_mini_json"),
    ("<|tool_calls_section_begin|>", "kimi_k2"),
)


@dataclass(frozen=True)
class Node:
    """A host of the cluster: cores and memory that Ray manages there, in total and free."""

    host: str
    cpus: float
    memory: float
    free_cpus: float
    free_memory: float


def plan(conf: ServeConf, reporter: Reporter, only: Sequence[str] = ()) -> list[ServedModel]:
    """Returns the conf's models (or those named in `only`), with everything decided but their cores.

    Downloads models from the hub into the registry and converts models for engine openvino, unless already done. Raises
    ModelError.
    """
    if unknown := sorted(set(only) - set(conf.models)):
        raise ServeError(f"--only {unknown[0]}: the conf has no such model; it has {', '.join(conf.models)}")
    return [
        _planned(name, model, conf.paths, reporter) for name, model in conf.models.items() if not only or name in only
    ]


def _planned(
    name: str, asked: ModelServing, paths: Paths, reporter: Reporter, choice: Choice | None = None
) -> ServedModel:
    source = _folder(asked.model, paths, reporter)
    tokenizer = _folder(asked.tokenizer, paths, reporter) if asked.tokenizer else None
    if tokenizer:
        check_tokenizer(tokenizer)
    engine, path, weights = _engine(name, asked, source, paths, reporter, choice)
    check_alike(tokenizer or path)
    _check_kind(asked, engine, path)
    check_tokenizer_fits(path, tokenizer or path)
    # The original of a conversion was checked when it was converted.
    converts = ENGINES[engine].converts
    empty = check_complete(path, trust_remote_code=asked.trust_remote_code) if not converts else None
    precision = _precision(asked, weights)
    most = min((limit for limit in (made_for(path), positions(empty) if empty else None) if limit), default=None)
    length = asked.max_model_len or min(longest(path, None), most or DEFAULT_MAX_MODEL_LEN)
    if most and length > most:
        raise ModelError(
            f"models.{name}.max_model_len is {length}, but the model supports {most} tokens: set at most that"
        )
    cache = int(asked.kv_cache_gib * _GIB) if asked.kv_cache_gib else kv_cache_bytes(path, precision, length)
    size = SIZES.get(weights.dtype, 4.0) if converts else SIZES[precision]
    template = asked.chat_template
    adapters = {called: find_adapter(called, adapter, paths) for called, adapter in asked.adapters.items()}
    ranks = [adapter_rank(called, folder) for called, folder in adapters.items()]
    for called, folder in adapters.items():
        if doubt := check_adapter(called, folder, path, paths):
            reporter.line(doubt)
    chat = bool(template) or has_chat_template(tokenizer or path)
    task: Task = "embeddings" if not writes(path, asked.engine_options) else "chat" if chat else "completions"
    return ServedModel(
        name=name,
        path=path,
        engine=engine,
        tokenizer=tokenizer,
        chat_template=template,
        precision=precision,
        max_model_len=length,
        max_batch=asked.max_batch,
        max_queue=asked.max_queue,
        kv_cache_bytes=cache,
        memory_bytes=int(weights.parameters * size * 1.1)
        + cache
        + _adapters_bytes(path, engine, precision, ranks)
        + _PROGRAM_BYTES,
        cpus=0 if asked.cpus == "auto" else asked.cpus,
        threads=_useful_cores(weights.parameters),
        replicas=asked.replicas,
        autoscale=asked.autoscale,
        adapters={called: Adapter(str(folder), fingerprint(folder)) for called, folder in adapters.items()},
        lora_rank=max(ranks, default=0),
        task=task,
        sampling=sampling(path) if asked.sampling_defaults == "model" else {},
        tool_parser=_tool_parser(asked.tools, tokenizer or path, template) if task == "chat" else None,
        trust_remote_code=asked.trust_remote_code,
        compile=asked.compile,
        engine_options=asked.engine_options,
        identity=fingerprint(path),
    )


def estimate(name: str, asked: ModelServing, paths: Paths, reporter: Reporter) -> ServedModel:
    """Returns the model as it would be served, with an estimate of its memory if it would have to be converted first.
    Raises ModelError."""
    source = _folder(asked.model, paths, reporter)
    choice = choose_engine(asked, source, paths.models)
    engine = choice.engine
    if not ENGINES[engine].converts or is_openvino(source) or find_conversion(source, asked.weights, paths.models):
        return _planned(name, asked, paths, reporter, choice)
    like = _planned(name, asked.model_copy(update={"engine": "transformers", "weights": None}), paths, reporter)
    ranks = [like.lora_rank] * len(like.adapters)
    adapters = _adapters_bytes(like.path, like.engine, like.precision, ranks)
    weights = like.memory_bytes - like.kv_cache_bytes - adapters - _PROGRAM_BYTES
    other = int(weights * SIZES[asked.weights or DEFAULT_WEIGHTS] / SIZES[like.precision]) - weights
    other += _adapters_bytes(like.path, engine, like.precision, ranks) - adapters
    return replace(like, engine=engine, memory_bytes=like.memory_bytes + other)


def _adapters_bytes(path: Path, engine: EngineName, precision: Precision, ranks: Sequence[int]) -> int:
    """Returns the memory reserved for adapters, all at the highest rank and on all layers."""
    if not ranks:
        return 0
    number_bytes = _OPENVINO_ADAPTER_BYTES if ENGINES[engine].converts else SIZES[precision]
    return -(-len(ranks) // _ADAPTERS) * _ADAPTERS * adapter_bytes(path, max(ranks), number_bytes)


def _folder(called: str, paths: Paths, reporter: Reporter) -> Path:
    """Returns the folder of a run, registry name, folder, or hub id, which is downloaded if necessary. Raises
    ModelError."""
    location = resolve(called, paths)
    if location.folder:
        return location.folder
    name = called.replace("/", "--")
    if not (paths.models / name).is_dir():
        reporter.line(f"{called}: downloading into the model registry, as {name}")
        return import_model(called, name, paths.models)
    return paths.models / name


def _engine(
    name: str, asked: ModelServing, source: Path, paths: Paths, reporter: Reporter, choice: Choice | None
) -> tuple[EngineName, Path, Weights]:
    """Returns the engine, and the folder with weights in its form. If the conversion for `auto` fails, the unconverted
    model is served by another engine."""
    choice = choice or choose_engine(asked, source, paths.models)
    if asked.engine == "auto":
        reporter.line(f"{name}: engine {choice.engine} (auto: {choice.reason})")
    try:
        return choice.engine, *_weights(choice.engine, asked, source, paths, reporter)
    except ModelError as error:
        if asked.engine != "auto" or asked.weights or choice.engine == WIDEST or is_openvino(source):
            raise
        reporter.line(f"{name}: engine {WIDEST} instead: {error}", kind="warning")
        return WIDEST, *_weights(WIDEST, asked, source, paths, reporter)


def _weights(
    engine: EngineName, asked: ModelServing, source: Path, paths: Paths, reporter: Reporter
) -> tuple[Path, Weights]:
    """Returns the folder with weights in the engine's form, and their description."""
    if not ENGINES[engine].converts:
        return source, check_folder(source, tokenizer=not asked.tokenizer)
    folder = openvino_folder(source, asked.weights, paths.models, reporter)
    return folder, openvino_weights(folder)


def _check_kind(asked: ModelServing, engine: EngineName, path: Path) -> None:
    """Raises ModelError for a model type that transformers does not support, which no engine could load."""
    config = read_json(path / "config.json")
    if asked.trust_remote_code:
        return
    kind = config.get("model_type")
    if kind not in _known_kinds():
        if "auto_map" in config:
            raise ModelError(
                f"{path} has its own Python code: read it, and set trust_remote_code and trusted_models if you trust it"
            )
        raise ModelError(f"{path}: no engine supports models of type {kind} (config.json: model_type)")
    if ENGINES[engine].causal_only:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ModelError(
                f"{path}: a model of type {kind} does not generate text, which engine {engine} requires: use "
                f"engine {WIDEST}"
            )


def _known_kinds() -> Container[str]:
    """Returns the model types that transformers supports. Runs only the file with its table: importing the package
    would import torch, which takes seconds on a small host."""
    origin = importlib.util.find_spec("transformers").origin  # type: ignore[union-attr]
    kinds: Container[str] = runpy.run_path(str(Path(str(origin)).parent / "models/auto/auto_mappings.py"))[
        "CONFIG_MAPPING_NAMES"
    ]
    return kinds


def _precision(asked: ModelServing, weights: Weights) -> Precision:
    """Returns the precision. Weights stored in fp32 are not rounded to bf16 by default: it changes near ties of a small
    model."""
    if asked.precision != "auto":
        return asked.precision
    return "fp32" if weights.dtype == "fp32" or not has_bf16(cpu_flags()) else "bf16"


def _useful_cores(parameters: int) -> int:
    return next((cores for billions, cores in _CORES if parameters < billions * 1e9), 64)


def _tool_parser(tools: str, path: Path, template: Path | None) -> str | None:
    """Returns vLLM's name for the syntax of the model's tool calls; Hermes if the chat template shows none."""
    if tools != "auto":
        return None if tools == "off" else tools
    text = template_text(path, template)
    return next((parser for mark, parser in _TOOL_FORMS if mark in text), "hermes")


def place(
    models: Sequence[ServedModel], nodes: Sequence[Node], running: Mapping[str, ServedModel]
) -> list[ServedModel]:
    """Returns the models with their cores decided. Raises ServeError with the figures if one does not fit.

    `running` are the deployed models with their current replicas, whose resources are available to a new model of the
    same name. A model that is otherwise unchanged keeps its cores, so that it need not be restarted.
    """
    kept = {
        model.name: like
        for model in models
        if (old := running.get(model.name)) and (like := _with_cores_of(old, model))
    }
    try:
        return _place(models, nodes, running, kept)
    except ServeError:
        if not kept:
            raise
        return _place(models, nodes, running, {})


def _with_cores_of(old: ServedModel, model: ServedModel) -> ServedModel | None:
    """Returns the model with the cores of the deployed one, if its own are undecided and nothing else requires new
    replicas; else None."""
    like = replace(model, cpus=old.cpus, threads=old.threads)
    return like if model.cpus == 0 and like.version() == old.version() else None


def _place(
    models: Sequence[ServedModel],
    nodes: Sequence[Node],
    running: Mapping[str, ServedModel],
    kept: Mapping[str, ServedModel],
) -> list[ServedModel]:
    free = _free_without(models, nodes, running)
    placed: dict[str, ServedModel] = {}
    undecided = {model.name for model in models if model.cpus == 0 and model.name not in kept}
    waiting = [model for model in models if model.name in undecided]
    for model in sorted(models, key=lambda m: m.name in undecided):  # models that share the remaining cores come last
        chosen = kept.get(model.name, model)
        if model.name in undecided:
            most, total = max(room[0] for room in free), sum(room[0] for room in free)
            # One for each replica at start, and as many as also leave room for autoscaling's additional replicas.
            each = max(1, total // sum(map(_most_replicas, waiting))) if total >= sum(map(_replicas, waiting)) else 0
            cores = int(min(model.threads, most, each))
            waiting.remove(model)
            chosen = replace(model, cpus=cores, threads=int(min(model.threads, max(node.cpus for node in nodes))))
        _take(chosen, nodes, free)
        placed[model.name] = chosen
    return [placed[model.name] for model in models]


def fits_beside(models: Sequence[ServedModel], nodes: Sequence[Node]) -> bool:
    """Returns whether one more replica of each of these models fits beside everything that runs."""
    free = _free_without((), nodes, {})
    return all(_put(model, free) for model in models)


def beyond_room(models: Sequence[ServedModel], nodes: Sequence[Node], running: Mapping[str, ServedModel]) -> list[str]:
    """Returns a warning for each placed model whose `autoscale.max` exceeds the cluster's room."""
    free = _free_without(models, nodes, running)
    for model in models:
        for _ in range(_replicas(model)):
            _put(model, free)
    messages = []
    for model in models:
        left, fitting, most = [room.copy() for room in free], _replicas(model), _most_replicas(model)
        while fitting < most and _put(model, left):
            fitting += 1
        if fitting < most:
            messages.append(
                f"{model.name}: autoscale.max is {most}, but with what runs now the cluster has room for {fitting}: "
                "the others wait for room"
            )
    return messages


def _free_without(
    models: Sequence[ServedModel], nodes: Sequence[Node], running: Mapping[str, ServedModel]
) -> list[list[float]]:
    """Returns free cores and memory of each node, as if the models that are to be replaced were gone."""
    free = [[node.free_cpus, node.free_memory] for node in nodes]
    for model in models:
        if old := running.get(model.name):
            _release(old, nodes, free)
    return free


def _replicas(model: ServedModel) -> int:
    return max(model.autoscale.min, 1) if model.autoscale else model.replicas


def _most_replicas(model: ServedModel) -> int:
    return model.autoscale.max if model.autoscale else model.replicas


def _release(old: ServedModel, nodes: Sequence[Node], free: list[list[float]]) -> None:
    for _ in range(old.replicas):
        for node, room in zip(nodes, free, strict=True):
            if node.cpus - room[0] >= old.cpus and node.memory - room[1] >= old.memory_bytes:
                room[0] += old.cpus
                room[1] += old.memory_bytes
                break


def _take(model: ServedModel, nodes: Sequence[Node], free: list[list[float]]) -> None:
    for _ in range(_replicas(model)):
        if not _put(model, free):
            raise ServeError(_no_room(model, nodes, free, _replicas(model)))


def _put(model: ServedModel, free: list[list[float]]) -> bool:
    """Reserves room for one replica on the node with most free cores; returns False if none has room."""
    fitting = [room for room in free if room[0] >= model.cpus and room[1] >= model.memory_bytes]
    if fitting:
        room = max(fitting, key=lambda r: (r[0], r[1]))
        room[0] -= model.cpus
        room[1] -= model.memory_bytes
    return bool(fitting)


def _no_room(model: ServedModel, nodes: Sequence[Node], free: list[list[float]], replicas: int) -> str:
    have = "; ".join(
        f"{node.host} has {room[0]:g} of {node.cpus:g} CPUs and {max(0, room[1]) / _GIB:.1f} of "
        f"{node.memory / _GIB:.1f} GiB free"
        for node, room in zip(nodes, free, strict=True)
    )
    if all(
        node.memory < model.memory_bytes or room[1] < model.memory_bytes for node, room in zip(nodes, free, strict=True)
    ):
        advice = (
            "use a smaller max_model_len or kv_cache_gib, use engine openvino with int8 weights, or stop another "
            "model (llm-ray serve stop NAME)"
        )
    else:
        advice = (
            "give it fewer cpus or replicas, omit cpus to share cores, or stop another model (llm-ray serve stop NAME)"
        )
    each = f"{model.cpus} CPU(s) and {model.memory_bytes / _GIB:.1f} GiB (of which {model.kv_cache_bytes / _GIB:.1f} GiB cache)"
    return f"no room for {model.name}: {'each of its ' + str(replicas) + ' replicas' if replicas > 1 else 'it'} needs {each}, but {have}: {advice}"


def describe(model: ServedModel) -> str:
    """Returns a one-line summary of a model's parameters."""
    cores = f"{model.cpus} core(s)" if model.cpus else f"{model.threads} thread(s) on shared cores"
    count = (
        f"{model.autoscale.min}-{model.autoscale.max} replicas" if model.autoscale else f"{model.replicas} replica(s)"
    )
    cache = f"{model.kv_cache_bytes / _GIB:.2g} GiB cache"
    return f"{model.name}: engine {model.engine}, {model.precision}, {model.max_model_len} tokens, {cores}, {cache}, {count}"
