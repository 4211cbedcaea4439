"""Whole and broken model folders: each broken one is refused with what is missing and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from llm_ray.errors import ModelError
from llm_ray.models.folder import INDEX, Weights, check_folder, weight_files


def test_whole(tiny: Path, sharded: Path) -> None:
    found = check_folder(tiny)
    assert found.dtype == "fp32"
    assert found.parameters > 49152 * 16
    assert check_folder(sharded) == found
    assert len(weight_files(sharded)) == len(list(sharded.glob("*.safetensors")))


def test_real_model(smollm2: Path) -> None:
    assert check_folder(smollm2) == Weights(134_515_008, "fp32")


def _cut(file: Path, length: int) -> None:
    with file.open("rb+") as stream:
        stream.truncate(length if length >= 0 else file.stat().st_size + length)


def _remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def _write(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    return write


def _only_tokenizer_config(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _adapter(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def _gguf_only(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "small.Q4.gguf").write_bytes(b"GGUF")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_remove("config.json"), ["no config.json", "is incomplete"]),
        (_write("config.json", '{"model_type": "lla'), ["config.json cannot be read", "copy it again"]),
        (_write("config.json", "[1, 2]"), ["config.json does not contain a JSON object"]),
        (_write("config.json", ""), ["config.json cannot be read"]),
        (_only_tokenizer_config, ["no tokenizer", "model.tokenizer"]),
        (_remove("model.safetensors"), ["no weights", "model.safetensors.index.json"]),
        (_pickle, ["pytorch_model.bin", "pickle", "save_pretrained"]),
        (_adapter, ["LoRA adapter", "org/base"]),
        (_gguf_only, ["small.Q4.gguf", "model.gguf_file", "llm-ray model import"]),
        (
            lambda folder: _cut(folder / "model.safetensors", -1),
            ["model.safetensors is damaged or truncated", "copy or download"],
        ),
        (
            lambda folder: _cut(folder / "model.safetensors", 100),
            ["model.safetensors is damaged or truncated (100 bytes"],
        ),
        (lambda folder: _cut(folder / "model.safetensors", 4), ["damaged or truncated (4 bytes"]),
        (lambda folder: _cut(folder / "model.safetensors", 0), ["damaged or truncated (0 bytes"]),
        (
            _write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"),
            ["damaged or truncated"],
        ),
    ],
)
def test_broken(tiny: Path, damage: Callable[[Path], object], words: list[str]) -> None:
    damage(tiny)
    with pytest.raises(ModelError) as caught:
        check_folder(tiny)
    assert str(tiny) in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model folder"):
        check_folder(tmp_path / "gone")


def test_missing_shard(sharded: Path) -> None:
    files = weight_files(sharded)
    files[1].unlink()
    with pytest.raises(
        ModelError, match=rf"is incomplete: of the {len(files)} files .* 1 are missing \({files[1].name}\)"
    ):
        check_folder(sharded)


def test_cut_shard(sharded: Path) -> None:
    shard = weight_files(sharded)[-1]
    _cut(shard, -8)
    with pytest.raises(ModelError, match=f"{shard.name} is damaged or truncated"):
        check_folder(sharded)


def test_shard_of_another_model(sharded: Path) -> None:
    first, second = weight_files(sharded)[:2]
    second.write_bytes(first.read_bytes())
    with pytest.raises(ModelError, match=rf"{second.name} lacks \d+ of the tensors that {INDEX} names"):
        check_folder(sharded)


def test_tensor_in_two_shards(sharded: Path) -> None:
    first, second = weight_files(sharded)[:2]
    tensors = load_file(first) | load_file(second)
    save_file(tensors, second, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=rf"{second.name} contains .* too, which {INDEX} assigns to {first.name}"):
        check_folder(sharded)


def test_shard_in_another_folder(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    file = weight_files(sharded)[0]
    (sharded / "more").mkdir()
    file.rename(sharded / "more" / file.name)
    moved = {tensor: f"more/{name}" if name == file.name else name for tensor, name in index["weight_map"].items()}
    (sharded / INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ModelError, match=rf"names more/{file.name}, which is in another folder"):
        check_folder(sharded)


@pytest.mark.parametrize("index", ["{}", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_index_without_weights(sharded: Path, index: str) -> None:
    (sharded / INDEX).write_text(index)
    with pytest.raises(ModelError, match="names no weights"):
        check_folder(sharded)


def test_dangling_link(tiny: Path) -> None:
    """As in a hub cache of which the blobs were not copied."""
    (tiny / "model.safetensors").unlink()
    (tiny / "model.safetensors").symlink_to(tiny / "blobs" / "gone")
    with pytest.raises(ModelError, match="no weights"):
        check_folder(tiny)


def test_tokenizer_from_elsewhere(tiny: Path) -> None:
    (tiny / "tokenizer.json").unlink()
    assert check_folder(tiny, tokenizer=False).dtype == "fp32"


def test_dtype(tiny: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    LlamaForCausalLM.from_pretrained(tiny, dtype=torch.bfloat16).save_pretrained(tiny)
    assert check_folder(tiny).dtype == "bf16"
    assert json.loads((tiny / "config.json").read_text())["dtype"] == "bfloat16"
