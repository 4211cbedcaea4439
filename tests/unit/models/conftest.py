"""Tiny real models: a Llama of two layers with SmolLM2's tokenizer, whole or in shards, and a GGUF written by the gguf
package."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_ray.conf.section import Paths


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """Empty folders of models, data and runs."""
    return Paths(models=tmp_path / "models", data=tmp_path / "data", runs=tmp_path / "runs")


@pytest.fixture(scope="session")
def tiny_source(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model folder; tests copy it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(smollm2 / name, folder)
    return folder


@pytest.fixture
def tiny(tiny_source: Path, tmp_path: Path) -> Path:
    """A whole model folder of this test's own."""
    return Path(shutil.copytree(tiny_source, tmp_path / "tiny"))


@pytest.fixture
def sharded(tiny: Path, tmp_path: Path) -> Path:
    """The same model, its weights in several files with an index."""
    from transformers import LlamaForCausalLM

    folder = tmp_path / "sharded"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    LlamaForCausalLM.from_pretrained(tiny).save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.fixture(scope="session")
def write_gguf() -> Callable[..., Path]:
    """Writes a small Llama with a byte-level tokenizer, two tokens that end, and a licence, as a GGUF. Given may be the
    name of its rule for splitting text, and its merges."""
    return _write_gguf


def _write_gguf(file: Path, rule: str = "gpt-2", merges: tuple[str, ...] = ("h e",)) -> Path:
    import gguf
    import numpy
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [
        "<|end_of_text|>",
        "<|eot_id|>",
        "<|begin_of_text|>",
        *sorted(ByteLevel.alphabet()),
        *(merge.replace(" ", "") for merge in merges),
    ]
    special = [gguf.TokenType.CONTROL] * 3
    width, hidden, layers = 32, 64, 2
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_license("mit")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([*special, *[gguf.TokenType.NORMAL] * (len(tokens) - len(special))])
    writer.add_token_merges(list(merges))
    if rule:
        writer.add_tokenizer_pre(rule)
    writer.add_eos_token_id(0)
    writer.add_eot_token_id(1)
    writer.add_bos_token_id(2)
    writer.add_chat_template("{% for message in messages %}{{ message['content'] + '<|eot_id|>' }}{% endfor %}")
    random = numpy.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, random.standard_normal(shape).astype(numpy.float32))

    add("token_embd.weight", len(tokens), width)
    add("output_norm.weight", width)
    add("output.weight", len(tokens), width)
    for layer in range(layers):
        for part in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{part}.weight", width)
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{part}.weight", width, width)
        for part in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{part}.weight", hidden, width)
        add(f"blk.{layer}.ffn_down.weight", width, hidden)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file
