"""A folder that lacks weights, or holds them twice, is refused by every way in; what only looks so is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_ray.conf.finetune import Model
from llm_ray.conf.section import Paths
from llm_ray.conf.serve import ModelServing, ServeConf
from llm_ray.errors import ModelError
from llm_ray.models.complete import check_complete
from llm_ray.models.convert import convert_model
from llm_ray.models.folder import INDEX, check_folder
from llm_ray.models.load import check_model, find_base, load_model
from llm_ray.models.registry import import_model
from llm_ray.progress import Silent
from llm_ray.serve.deployments.plan import plan
from tests.full.architectures import small

SINGLE = "model.safetensors"


def made(folder: Path, kind: str, like: Path, **settings: object) -> Path:
    """A small model of architecture `kind`, with the tokenizer of `like`."""
    small(kind, **settings).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(like / file, folder)
    return folder


def change(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    weights = load_file(folder / SINGLE)
    change(weights)
    save_file(weights, folder / SINGLE, metadata={"format": "pt"})


def by_import(folder: Path, paths: Paths) -> object:
    return import_model(str(folder), "m", paths.models)


def by_dry_run_or_training(folder: Path, paths: Paths) -> object:
    return check_model(find_base(Model(base=str(folder)), paths))


def by_deploying(engine: str) -> Callable[[Path, Paths], object]:
    conf = {"engine": engine}
    return lambda folder, paths: plan(
        ServeConf(models={"m": ModelServing(model=str(folder), **conf)}, paths=paths), Silent()
    )


def by_converting(folder: Path, paths: Paths) -> object:
    return convert_model(folder, paths.models / "m-openvino", "int8", Silent())


WAYS = [
    by_import,
    by_dry_run_or_training,
    by_deploying("vllm"),
    by_deploying("transformers"),
    by_deploying("openvino"),
    by_converting,
]
each_way = pytest.mark.parametrize("way", WAYS, ids=["import", "train", "vllm", "transformers", "openvino", "convert"])


@each_way
@pytest.mark.parametrize(
    "name", ["lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
def test_a_weight_is_missing(
    tiny: Path, paths: Paths, smollm2: Path, way: Callable[[Path, Paths], object], name: str
) -> None:
    folder = made(tiny.with_name("untied"), "llama", smollm2, vocab_size=49152)
    change(folder, lambda weights: weights.pop(name))
    with pytest.raises(ModelError, match=rf"lacks 1 weights of a LlamaForCausalLM, such as {name}: it is incomplete"):
        way(folder, paths)
    assert not paths.models.exists() or not any(path.name.startswith("m") for path in paths.models.iterdir())


@each_way
def test_a_weight_is_of_another_size(tiny: Path, paths: Paths, way: Callable[[Path, Paths], object]) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    change(tiny, lambda weights: weights.update({name: torch.zeros(30, 16)}))
    with pytest.raises(
        ModelError,
        match=rf"1 of its weights differ in size from its config\.json, such as {name}, .* 30 x 16 .* 32 x 16",
    ):
        way(tiny, paths)


@each_way
def test_weights_are_there_twice(tiny: Path, sharded: Path, paths: Paths, way: Callable[[Path, Paths], object]) -> None:
    shutil.copy2(tiny / SINGLE, sharded)
    with pytest.raises(
        ModelError, match=r"contains its weights twice: model\.safetensors, and \d+ other file.*names \(model-"
    ):
        way(sharded, paths)


def test_other_weights_beside(tiny: Path) -> None:
    shutil.copy2(tiny / SINGLE, tiny / "model-00001-of-00002.safetensors")
    with pytest.raises(ModelError, match="contains its weights twice"):
        check_folder(tiny)
    (tiny / "model-00001-of-00002.safetensors").unlink()
    (tiny / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(tiny / SINGLE), SINGLE)}))
    check_folder(tiny)


@each_way
def test_a_head_of_its_own_where_the_configuration_ties_it(
    tiny: Path, paths: Paths, smollm2: Path, way: Callable[[Path, Paths], object]
) -> None:
    """transformers would read it, and vllm leave it aside."""
    folder = made(tiny.with_name("untied"), "llama", smollm2, vocab_size=49152)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    with pytest.raises(
        ModelError,
        match=r"lm_head\.weight differs from model\.embed_tokens\.weight, although its config\.json ties them",
    ):
        way(folder, paths)
    change(folder, lambda weights: weights.update({"lm_head.weight": weights["model.embed_tokens.weight"].clone()}))
    check_complete(folder)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_more_layers_than_the_configuration_has(tmp_path: Path, kind: str) -> None:
    small(kind).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    layers = "n_layer" if "n_layer" in config else "num_hidden_layers"
    (tmp_path / "config.json").write_text(json.dumps(config | {layers: config[layers] - 1}))
    with pytest.raises(
        ModelError, match=rf"has weights of more layers than its config\.json says, such as .*\.{config[layers] - 1}\."
    ):
        check_complete(tmp_path)


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json"])
def test_git_lfs_pointers(tiny: Path, name: str) -> None:
    (tiny / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    with pytest.raises(ModelError, match=rf"{name} is damaged or truncated: it is a Git LFS pointer.*git lfs pull"):
        check_folder(tiny)


@pytest.mark.parametrize("part", ["w1", "w2"])
def test_an_expert_is_missing(tmp_path: Path, part: str) -> None:
    small("mixtral").save_pretrained(tmp_path)
    name = f"model.layers.1.block_sparse_moe.experts.3.{part}.weight"
    change(tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(ModelError, match=r"experts|other sizes"):
        check_complete(tmp_path)


@pytest.mark.parametrize(
    "kind",
    [
        "gpt2",
        "mixtral",
        "qwen3_moe",
        "deepseek_v3",
        "gpt_oss",
        "granitemoe",
        "phi3",
        "gemma3_text",
        "mamba",
        "jamba",
        "bloom",
        "opt",
        "bert",
        "falcon",
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_whole_models(tmp_path: Path, kind: str, tied: bool) -> None:
    """Experts that are stacked, names that are changed, buffers, weights that are shared."""
    small(kind, tie_word_embeddings=tied).save_pretrained(tmp_path)
    check_complete(tmp_path)
    check_complete(tmp_path, causal=True)


def test_a_base_model_without_its_prefix(tiny: Path, paths: Paths) -> None:
    """Saved from inside; its embeddings are the head, too."""
    change(
        tiny,
        lambda weights: [weights.update({name.removeprefix("model."): weights.pop(name)}) for name in list(weights)],
    )
    check_complete(tiny, causal=True)
    load_model(find_base(Model(base=str(tiny)), paths), torch.float32)


def test_encoders_without_a_pooler(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=32, **sizes), add_pooling_layer=False).save_pretrained(tmp_path)
    check_complete(tmp_path)
    change(tmp_path, lambda weights: weights.pop("embeddings.word_embeddings.weight"))
    with pytest.raises(ModelError, match="lacks 1 weights of a BertModel"):
        check_complete(tmp_path)


def test_quantized_weights_have_names_of_their_own(tiny: Path) -> None:
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq", "bits": 4}}))
    change(
        tiny,
        lambda weights: weights.update(
            {"model.layers.0.mlp.up_proj.qweight": weights.pop("model.layers.0.mlp.up_proj.weight")}
        ),
    )
    check_complete(tiny)


def test_the_real_model_in_a_moment(smollm2: Path) -> None:
    import psutil

    check_complete(smollm2, causal=True)
    before = psutil.Process().memory_info().rss
    check_complete(smollm2, causal=True)
    assert psutil.Process().memory_info().rss - before < 100 * 2**20  # of 538 MB
