"""Which adapters are served on a model, and which are refused before it is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from llm_ray.conf.section import Paths
from llm_ray.errors import ModelError
from llm_ray.models.load import fingerprint
from llm_ray.serve.deployments.adapters import adapter_bytes, adapter_rank, check_adapter, find_adapter

QUERY = "model.layers.{}.self_attn.q_proj"


def model(folder: Path, hidden: int = 8, layers: int = 2, prefix: str = "", number: float = 1, **config: Any) -> Path:
    """A model of attention queries alone."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 20} | config)
    )
    queries = {
        f"{prefix}{QUERY.format(i)}.weight": np.full((2 * hidden, hidden), number, np.float32) for i in range(layers)
    }
    others = {
        f"{prefix}model.norm.weight": np.ones(hidden, np.float32),
        f"{prefix}model.embed_tokens.weight": np.ones((20, hidden), np.float32),
    }
    save_file(queries | others, folder / "model.safetensors")
    return folder


def adapter(
    folder: Path,
    layers: tuple[str, ...] = (QUERY.format(1),),
    size: tuple[int, int] = (16, 8),
    more: dict[str, tuple[int, ...]] | None = None,
    **config: Any,
) -> Path:
    """An adapter of rank 2 on those layers, and tensors of those sizes."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "peft_type": "LORA"} | config))
    tensors = {tensor: np.ones(shape, np.float32) for tensor, shape in (more or {}).items()}
    for layer in layers:
        tensors[f"base_model.model.{layer}.lora_A.weight"] = np.ones((2, size[1]), np.float32)
        tensors[f"base_model.model.{layer}.lora_B.weight"] = np.ones((size[0], 2), np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(models=tmp_path / "models", runs=tmp_path / "runs")


def test_an_adapter_of_the_model_is_served(tmp_path: Path, paths: Paths) -> None:
    base = model(tmp_path / "base")
    assert check_adapter("a", adapter(tmp_path / "plain"), base, paths) is None
    transposed = adapter(tmp_path / "transposed", size=(8, 16))  # GPT-2 keeps its matrices so
    assert check_adapter("a", transposed, base, paths) is None
    seeing = model(tmp_path / "seeing", prefix="language_model.")  # a language part in a model that sees
    assert check_adapter("a", adapter(tmp_path / "other"), seeing, paths) is None
    head = adapter(
        tmp_path / "head",
        layers=("lm_head",),
        size=(20, 8),
        more={"base_model.model.lm_head.base_layer.weight": (20, 8)},
    )
    assert check_adapter("a", head, base, paths) is None  # which is tied to the embedding
    named = adapter(tmp_path / "named", base_model_name_or_path=str(base))
    assert check_adapter("a", named, base, paths) is None


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            {"size": (16, 12)},
            "changes model.layers.1.self_attn.q_proj with 16 x 12 numbers, but the model's has 16 x 8",
        ),
        ({"layers": (QUERY.format(7),)}, "which has no model.layers.7.self_attn.q_proj"),
        ({"layers": ("transformer.h.0.attn.c_attn",)}, "changes nothing in the model in"),
        (
            {"use_dora": True},
            r"has use_dora \(adapter_config.json\), which cannot be served as an adapter: deploy the merged model",
        ),
        ({"modules_to_save": ["lm_head"], "bias": "all"}, "has modules_to_save and bias"),
        ({"peft_type": "IA3"}, "is of type IA3"),
        (
            {"init_lora_weights": "pissa_niter_16"},
            "has init_lora_weights: pissa_niter_16, which changes the model's own weights",
        ),
        ({"init_lora_weights": "OLoRA"}, "has init_lora_weights: OLoRA"),
        ({"kasa_config": {"beta": 0.1}, "velora_config": {"scale": 1.0}}, "has kasa_config and velora_config"),
        ({"monteclora_config": {"num_samples": 8}}, "has monteclora_config"),
        (
            {"more": {f"base_model.model.{QUERY.format(1)}.lora_diag": (2,)}},
            r"has .*q_proj.lora_diag, which is not a plain LoRA matrix",
        ),
        (
            {"more": {f"base_model.model.{QUERY.format(1)}.lora_A.default.weight": (2, 8)}},
            r"lora_A.default.weight, which is not a plain LoRA matrix",
        ),
        (
            {"more": {"base_model.model.lm_head.base_layer.weight": (30, 8)}},
            "changes lm_head with 30 x 8 numbers, but the model's has 20 x 8",
        ),
        (
            {"layers": ("lm_head",), "size": (30, 8)},
            "changes lm_head with 30 x 8 numbers, but the model's has 20 x 8",
        ),
        (
            {"layers": ("model.layers.0.mlp.experts",)},
            r"changes experts \(model.layers.0.mlp.experts\), .* only on GPUs: deploy the merged",
        ),
        ({"layers": ("model.layers.0.mlp.experts.3.w1",)}, r"changes experts \(model.layers.0.mlp.experts.3.w1\)"),
        (
            {"auto_mapping": {"base_model_class": "Qwen2ForCausalLM"}},
            "was made for a Qwen2ForCausalLM .* is a LlamaForCausalLM",
        ),
    ],
    ids=str,
)
def test_an_adapter_of_another_model_or_kind_is_refused(
    made: dict[str, Any], message: str, tmp_path: Path, paths: Paths
) -> None:
    with pytest.raises(ModelError, match=message):
        check_adapter("a", adapter(tmp_path / "a", **made), model(tmp_path / "base"), paths)


def test_an_adapter_that_was_made_for_other_weights_is_refused(tmp_path: Path, paths: Paths) -> None:
    base, other = model(tmp_path / "base"), model(paths.models / "other", number=2)
    for name in (str(other), "other"):
        made = adapter(tmp_path / name.replace("/", "_"), base_model_name_or_path=name)
        with pytest.raises(ModelError, match=rf"was made for the model in {re.escape(str(other))}.*has other weights"):
            check_adapter("a", made, base, paths)
        assert check_adapter("a", made, other, paths) is None


def test_of_an_adapter_whose_model_is_not_here_the_names_are_compared(tmp_path: Path, paths: Paths) -> None:
    made = adapter(tmp_path / "a", base_model_name_or_path="Org/Model-1B")
    assert check_adapter("a", made, model(paths.models / "Org--Model-1B"), paths) is None
    assert check_adapter("a", made, model(tmp_path / "Model-1B"), paths) is None
    assert "made for Org/Model-1B" in str(check_adapter("a", made, model(tmp_path / "Model-3B"), paths))


def test_a_runs_adapter_is_found_and_belongs_to_what_it_was_trained_on(tmp_path: Path, paths: Paths) -> None:
    base = model(tmp_path / "base")
    made = adapter(paths.runs / "bot" / "output" / "adapter")
    trained = {"base": "base", "folder": str(base), "fingerprint": fingerprint(base), "gguf_file": None}
    (paths.runs / "bot" / "run.json").write_text(json.dumps({"model": trained}))
    assert find_adapter("a", "bot", paths) == made
    assert check_adapter("a", made, base, paths) is None
    with pytest.raises(ModelError, match=r"it was trained on base, .*or deploy the merged model \(bot\)"):
        check_adapter("a", made, model(tmp_path / "other", number=3), paths)


def test_a_damaged_adapter_is_refused(tmp_path: Path, paths: Paths) -> None:
    base, made = model(tmp_path / "base"), adapter(tmp_path / "a")
    weights = made / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ModelError, match=r"adapter a: .*adapter_model.safetensors is damaged or truncated"):
        check_adapter("a", made, base, paths)
    save_file({f"base_model.model.{QUERY.format(0)}.lora_A.weight": np.ones((2, 8), np.float32)}, weights)
    with pytest.raises(ModelError, match="has only half of"):
        check_adapter("a", made, base, paths)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda runs: None, "no run of this name, and no folder with adapter_config.json"),
        (lambda runs: (runs / "bot" / "output").mkdir(parents=True), "the run bot has no adapter"),
        (
            lambda runs: (adapter(runs / "bot" / "output" / "adapter") / "adapter_model.safetensors").unlink(),
            "has no adapter_model",
        ),
        (
            lambda runs: (made := adapter(runs / "bot" / "output" / "adapter") / "adapter_model.safetensors").rename(
                made.with_suffix(".bin")
            ),
            r"stores its weights as pickle \(adapter_model.bin\), which can run code",
        ),
    ],
)
def test_what_is_no_adapter_is_told(prepare: Any, message: str, paths: Paths) -> None:
    prepare(paths.runs)
    with pytest.raises(ModelError, match=message):
        find_adapter("a", "bot", paths)


def test_ranks_are_those_that_vllm_knows(tmp_path: Path) -> None:
    assert adapter_rank("a", adapter(tmp_path / "a", r=12)) == 16
    assert adapter_rank("a", adapter(tmp_path / "b", r=8, rank_pattern={"q_proj": 100})) == 128
    with pytest.raises(ModelError, match="has rank 2048, but at most 512 can be served"):
        adapter_rank("a", adapter(tmp_path / "c", r=2048))


def graph(folder: Path, base: Path, layers: tuple[str, ...] = (QUERY.format(0), QUERY.format(1)), **made: Any) -> Path:
    """A conversion of the model in the folder `base`, without weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes((base / "config.json").read_bytes())
    ports = "<input><port><dim>-1</dim><dim>8</dim></port><port><dim>16</dim><dim>8</dim></port></input>"
    nodes = "".join(
        f'<layer name="__module.{layer}/aten::linear/MatMul" type="MatMul"><data transpose_b="true" />{ports}</layer>'
        for layer in (*layers, "lm_head", "model.layers.0.mlp.experts.0.up_proj")
    )
    (folder / "openvino_model.xml").write_text(f"<net><layers>{nodes}</layers></net>")
    (folder / "llm-ray.json").write_text(json.dumps({"source": str(base), "fingerprint": fingerprint(base)} | made))
    return folder


def test_an_adapter_is_served_on_what_its_model_was_converted_to(tmp_path: Path, paths: Paths) -> None:
    base = model(tmp_path / "base")
    ov = graph(tmp_path / "graph", base)
    named = adapter(tmp_path / "named", base_model_name_or_path=str(base))
    assert check_adapter("a", named, ov, paths) is None
    other = adapter(tmp_path / "of", base_model_name_or_path=str(model(tmp_path / "other", number=2)))
    with pytest.raises(ModelError, match="other weights"):
        check_adapter("a", other, ov, paths)
    with pytest.raises(ModelError, match=r"changes .* with 4 x 8 numbers, but the model's has 16 x 8"):
        check_adapter("a", adapter(tmp_path / "small", size=(4, 8)), ov, paths)
    with pytest.raises(ModelError, match="use_dora"):
        check_adapter("a", adapter(tmp_path / "dora", use_dora=True), ov, paths)
    alone = graph(tmp_path / "alone", base, source="/gone")
    assert "assumed to be" in str(check_adapter("a", named, alone, paths))  # the original is not here to compare
    with pytest.raises(ModelError, match=r"changes .* with 4 x 2 numbers, but the model's has 16 x 8"):
        check_adapter("a", tmp_path / "small", alone, paths)


@pytest.mark.parametrize("layer", ["lm_head", "model.embed_tokens", QUERY.format(0)])
def test_what_openvino_would_leave_out_is_refused(layer: str, tmp_path: Path, paths: Paths) -> None:
    base = model(tmp_path / "base")
    ov = graph(tmp_path / "graph", base, layers=(QUERY.format(1),))
    sides = {"model.embed_tokens": ("embedding_A", "embedding_B")}.get(layer, ("A.weight", "B.weight"))
    sizes = ((2, 20), (8, 2)) if "embed" in layer else ((2, 8), (20 if layer == "lm_head" else 16, 2))
    more = {f"base_model.model.{layer}.lora_{side}": size for side, size in zip(sides, sizes, strict=True)}
    folder = adapter(tmp_path / "a", more=more)
    assert check_adapter("a", folder, base, paths) is None
    with pytest.raises(ModelError, match=rf"a: .* changes {layer}, to which engine openvino .*; engine vllm can"):
        check_adapter("a", folder, ov, paths)


def test_the_memory_of_an_adapter_is_that_of_its_matrices(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    numbers = 2 * (16 + 8)
    assert adapter_bytes(base, 4, 2.0) == numbers * 4 * 2
    assert adapter_bytes(graph(tmp_path / "graph", base), 16, 8.0) == numbers * 16 * 8
