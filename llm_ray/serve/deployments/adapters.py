"""Finds LoRA adapters by their names in the conf, and checks that they belong to the model they are served on.

An adapter holds differences from the weights of one model. On any other model it produces nonsense or kills the engine,
so it is rejected before anything is loaded if its layers do not match the model's, or if it is known to have been
trained on other weights.
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from llm_ray.conf.section import Paths
from llm_ray.errors import ModelError
from llm_ray.models.folder import read_json, weight_files
from llm_ray.models.load import file_digest, fingerprint
from llm_ray.models.openvino import adaptable_layers, is_openvino, lineage, original
from llm_ray.serve.models import text_config

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # ranks that vLLM supports
# Settings of PEFT's LoRA that vLLM does not support.
_BEYOND = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
    "trainable_token_indices",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "arrow_config",
)
# Values of init_lora_weights that leave the model's own weights unchanged.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica", "lora_ga")
_MERGED = "deploy the merged model"
PART = re.compile(r"(?:base_model\.model\.)?(?P<layer>.+)\.lora_(?P<side>embedding_A|embedding_B|A\.weight|B\.weight)")
# Copies of the model's own embeddings, which vLLM ignores.
_COPY = re.compile(r"(?:base_model\.model\.)?(?P<layer>(?:.+\.)?(?:embed_tokens|lm_head))\.base_layer\.weight")
_Shape = tuple[int, ...]


def find_adapter(name: str, called: str, paths: Paths) -> Path:
    """Returns an adapter's folder; `called` is a run or a folder. Raises ModelError."""
    folder = Path(called).expanduser()
    places = (
        [folder]
        if folder.is_absolute() or called.startswith(("./", "../"))
        else [paths.runs / called / "output" / "adapter", folder]
    )
    for place in places:
        if (place / CONFIG).is_file():
            if not (place / WEIGHTS).is_file():
                if pickles := sorted([*place.glob("adapter_model.bin"), *place.glob("adapter_model.pt")]):
                    raise ModelError(
                        f"adapter {name}: {place} stores its weights as pickle ({pickles[0].name}), which can run "
                        "code when loaded. If you trust them, save them as safetensors with peft's save_pretrained, "
                        "and use that folder"
                    )
                raise ModelError(f"adapter {name}: {place} has no {WEIGHTS}: copy the adapter again")
            return place.absolute()
    if (paths.runs / called).is_dir():
        raise ModelError(
            f"adapter {name}: the run {called} has no adapter (a full finetune, or not trained yet): deploy its model "
            "instead"
        )
    raise ModelError(
        f"adapter {name}: no run of this name, and no folder with {CONFIG}: "
        f"{' or '.join(str(p.absolute()) for p in places)}"
    )


def adapter_rank(name: str, folder: Path) -> int:
    """Returns an adapter's rank, rounded up to one that vLLM supports (for every engine). Raises ModelError."""
    config = read_json(folder / CONFIG)
    highest = max([config.get("r", 8), *(config.get("rank_pattern") or {}).values()])
    fitting = [rank for rank in _RANKS if rank >= highest]
    if not fitting:
        raise ModelError(
            f"adapter {name}: {folder} has rank {highest}, but at most {_RANKS[-1]} can be served: {_MERGED}"
        )
    return fitting[0]


def check_adapter(name: str, folder: Path, base: Path, paths: Paths) -> str | None:
    """Raises ModelError if the adapter cannot be served on the model in the folder `base`: its kind is not supported by
    the engine (OpenVINO for a folder in its form, else vLLM), it is damaged, has other layers, or was trained on other
    weights. Returns a warning if the weights it was trained on cannot be determined."""
    graph = base if is_openvino(base) else None
    if graph and lineage(graph).get("fingerprint") == fingerprint(original(graph)):
        base = original(graph)
    config = read_json(folder / CONFIG)
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise ModelError(f"adapter {name}: {folder} is of type {kind}, but only LORA can be served: {_MERGED}")
    beyond = [setting for setting in _BEYOND if config.get(setting)]
    if config.get("bias", "none") != "none":
        beyond.append("bias")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in _PLAIN_INITS:
        beyond.append(f"init_lora_weights: {start}, which changes the model's own weights,")
    made_on = (config.get("auto_mapping") or {}).get("base_model_class")
    kinds = read_json(base / "config.json").get("architectures") or []
    if made_on and kinds and made_on not in kinds and made_on.endswith("ForCausalLM"):
        raise ModelError(
            f"adapter {name}: {folder} was made for a {made_on} ({CONFIG}), but the model in {base} is a {kinds[0]}: "
            f"{_MERGED}"
        )
    if beyond:
        raise ModelError(
            f"adapter {name}: {folder} has {' and '.join(beyond)} ({CONFIG}), which cannot be served as an adapter: "
            f"{_MERGED}"
        )
    if not is_openvino(base):
        _check_layers(name, folder, base, config)
    if graph:
        _check_applied(name, folder, graph)
    return _check_origin(name, folder, base, config, paths)


def _check_layers(name: str, folder: Path, base: Path, config: dict[str, Any]) -> None:
    """Raises ModelError for layers that the model lacks or has in another size, and for tensors that vLLM does not
    accept."""
    parts: defaultdict[str, dict[str, _Shape]] = defaultdict(dict)
    shapes, patterns = _layers(base)
    wanted = f"it was made for {config.get('base_model_name_or_path') or 'another model'}"
    for tensor, shape in _shapes(folder / WEIGHTS, f"adapter {name}: ").items():
        if found := PART.fullmatch(tensor):
            parts[found["layer"]][found["side"].removeprefix("embedding_")[0]] = shape
        elif copy := _COPY.fullmatch(tensor):
            _check_size(name, folder, base, copy["layer"], shape, shapes, wanted)
        else:
            raise ModelError(
                f"adapter {name}: {folder / WEIGHTS} has {tensor}, which is not a plain LoRA matrix and cannot be "
                f"served as an adapter: {_MERGED}"
            )
    matching = 0
    for layer, sides in parts.items():
        if not {"A", "B"} <= sides.keys():
            raise ModelError(f"adapter {name}: {folder / WEIGHTS} has only half of {layer}: copy the adapter again")
        if "experts" in layer.split("."):
            raise ModelError(
                f"adapter {name}: {folder} changes experts ({layer}), which vLLM supports in adapters only on GPUs: "
                f"{_MERGED}, or train without experts (tuning.lora.target_modules: [q_proj, k_proj, v_proj, o_proj])"
            )
        has = _check_size(name, folder, base, layer, (sides["B"][0], sides["A"][1]), shapes, wanted)
        if not has and any(re.sub(r"\d+", "#", end) in patterns for end in _ends(layer)):
            raise ModelError(
                f"adapter {name}: {folder} does not belong to the model in {base}, which has no {layer}; {wanted}"
            )
        matching += has
    if not matching and "quantization_config" not in read_json(base / "config.json"):
        raise ModelError(f"adapter {name}: {folder} changes nothing in the model in {base}; {wanted}")


def _check_applied(name: str, folder: Path, graph: Path) -> None:
    """Raises ModelError for layers to which OpenVINO would silently not apply the adapter: the head, embeddings, and
    layers named differently in its graph."""
    layers = adaptable_layers(graph)
    for tensor, shape in _shapes(folder / WEIGHTS, f"adapter {name}: ").items():
        part = PART.fullmatch(tensor)
        if part is None or part["layer"] not in layers:
            changed = part["layer"] if part else tensor
            raise ModelError(
                f"adapter {name}: {folder} changes {changed}, to which engine openvino cannot apply an adapter; engine "
                f"vllm can (engine: vllm, with the model in Hugging Face's form), or {_MERGED}"
            )
        out_size, in_size = layers[part["layer"]]
        if (shape[0] != out_size) if part["side"] == "B.weight" else (shape[1] != in_size):
            raise ModelError(
                f"adapter {name}: {folder} does not belong to the model in {graph}: it changes {part['layer']} with "
                f"{shape[0]} x {shape[1]} numbers, but the model's has {out_size} x {in_size}"
            )


def adapter_bytes(base: Path, rank: int, bytes_per_number: float) -> int:
    """Returns the memory of an adapter of this rank on all linear layers of the model in the folder `base`."""
    if is_openvino(base):
        sizes = [*adaptable_layers(base).values()]
    else:
        sizes = [
            shape
            for file in weight_files(base)
            for tensor, shape in _shapes(file).items()
            if len(shape) == 2 and re.search(r"\.\d+\.", tensor)
        ]
    return int(sum(map(sum, sizes)) * rank * bytes_per_number)


def _check_size(
    name: str, folder: Path, base: Path, layer: str, size: _Shape, shapes: dict[str, set[_Shape]], wanted: str
) -> bool:
    """Returns whether the model has the layer. Raises ModelError if its size differs."""
    has = next((shapes[end] for end in _ends(layer) if end in shapes), None)
    if has and size not in has and size[::-1] not in has:
        sizes = " or ".join(f"{a} x {b}" for a, b in sorted(has))
        raise ModelError(
            f"adapter {name}: {folder} does not belong to the model in {base}: it changes {layer} with {size[0]} x "
            f"{size[1]} numbers, but the model's has {sizes}; {wanted}"
        )
    return bool(has)


def _layers(base: Path) -> tuple[dict[str, set[_Shape]], set[str]]:
    """Returns the sizes of the model's matrices by the ends of their names (prefixes differ between transformers
    releases and for multimodal models), and those ends with # for each number."""
    shapes: defaultdict[str, set[_Shape]] = defaultdict(set)
    for file in weight_files(base):
        for tensor, shape in _shapes(file).items():
            if len(shape) == 2 and tensor.endswith(".weight"):
                for end in _ends(tensor.removesuffix(".weight")):
                    shapes[end].add(shape)
    if "lm_head" not in shapes:  # tied to the embedding
        words = text_config(base).get("vocab_size")
        if tied := {shape for some in shapes.values() for shape in some if shape[0] == words}:
            shapes["lm_head"] = tied
    return shapes, {re.sub(r"\d+", "#", end) for end in shapes}


def _ends(layer: str) -> list[str]:
    """Returns the name, and the name without its first one, two, … parts, but never without the layer number."""
    parts = layer.split(".")
    numbered = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    return [".".join(parts[i:]) for i in range(numbered + 1)]


def _shapes(file: Path, whose: str = "") -> dict[str, _Shape]:
    try:
        with safe_open(file, framework="numpy") as tensors:
            return {tensor: tuple(tensors.get_slice(tensor).get_shape()) for tensor in tensors.offset_keys()}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{whose}{file} is damaged or truncated ({error}): copy it again") from error


def _check_origin(name: str, folder: Path, base: Path, config: dict[str, Any], paths: Paths) -> str | None:
    """Raises ModelError for an adapter that was trained on other weights; returns a warning if only the names
    differ."""
    run = folder.parent.parent / "run.json"
    trained = read_json(run).get("model") if run.is_file() and folder.parent.name == "output" else None
    if trained and trained.get("fingerprint") and not trained.get("gguf_file"):
        if trained["fingerprint"] != (lineage(base).get("fingerprint") if is_openvino(base) else fingerprint(base)):
            raise ModelError(
                f"adapter {name}: it was trained on {trained['base']}, but the model in {base} is a different one, "
                f"or its weights have changed: serve it on the model it was trained on, or {_MERGED} "
                f"({run.parent.name})"
            )
        return None
    origin = str(config.get("base_model_name_or_path") or "")
    named = Path(origin).expanduser()
    known = () if is_openvino(base) else (named.absolute(), paths.models / origin, paths.runs / origin / "output")
    for place in known if origin else ():
        if (place / "config.json").is_file():
            if _weights_digest(place) != _weights_digest(base):
                raise ModelError(
                    f"adapter {name}: {folder} was made for the model in {place} ({CONFIG}: "
                    f"base_model_name_or_path), but the one in {base} has other weights: serve it on the former, or "
                    f"{_MERGED}"
                )
            return None
    if origin and origin.replace("/", "--") != base.name and named.name != base.name.rpartition("--")[2]:
        return (
            f"adapter {name}: made for {origin} ({CONFIG}), assumed to be {base.name}: its answers are correct only "
            "on that model"
        )
    return None


def _weights_digest(folder: Path) -> str:
    """Returns a digest of the weight files only."""
    digest = hashlib.sha256()
    for file in sorted(weight_files(folder)):
        digest.update(file_digest(file))
    return digest.hexdigest()
