"""A run of a tiny real model with prepared data, and a checkpoint whose weights differ clearly from the base's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.train import checkpoint as checkpoints
from llm_ray.train.trained import _Named

Run = Callable[..., FinetuneConf]


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with tied embeddings, and a tokenizer of single bytes and blank lines; tests work on copies."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, TokenizersBackend

    folder = tmp_path_factory.mktemp("export") / "tiny"
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True, initializer_range=0.3)).save_pretrained(folder)
    (folder / "generation_config.json").unlink()
    tokens = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ"]
    backend = Tokenizer(models.BPE({token: n for n, token in enumerate(tokens)}, [("Ċ", "Ċ")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = TokenizersBackend(tokenizer_object=backend, eos_token="<end>")  # noqa: S106 (not a password)
    message = "{{ message['role'] + ': ' + message['content'] + '<end>' }}"
    prompt = "{% if add_generation_prompt %}assistant: {% endif %}"
    tokenizer.chat_template = f"{{% for message in messages %}}{message}{{% endfor %}}{prompt}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model for one test."""
    return Path(shutil.copytree(tiny_base, tmp_path / "tiny"))


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Run:
    """Returns the conf of a run on the tiny model with prepared data; `tuning` and other sections can be set."""

    def make(**sections: Any) -> FinetuneConf:
        conf = FinetuneConf.model_validate(
            {
                "name": "small",
                "model": {"base": str(base)},
                "data": {"train": "rows.jsonl"},
                "paths": {"runs": str(tmp_path / "runs"), "models": str(tmp_path / "models")},
            }
            | sections
        )
        (conf.run_dir / "prepared" / "validation").mkdir(parents=True)
        ids = [list(range(100, 140)), list(range(1, 299, 7))]
        table = {"input_ids": ids, "labels": ids, "lengths": [[len(row)] for row in ids]}
        with pa.OSFile(str(conf.run_dir / "prepared" / "validation" / "data.arrow"), "wb") as sink:
            batch = pa.RecordBatch.from_pydict(
                {name: pa.array(rows, pa.list_(pa.int32())) for name, rows in table.items()}
            )
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
        return conf

    return make


def trained(conf: FinetuneConf) -> tuple[torch.nn.Module, Path]:
    """The conf's model as in training, with changed trainable weights, and its checkpoint."""
    from llm_ray.models.load import load_model
    from llm_ray.train.model import add_adapters
    from tests.runs import base_of

    causal = load_model(base_of(conf), torch.float32, conf.model.weights, conf.tuning.lora.modules_to_save)
    model: torch.nn.Module = add_adapters(causal, conf.tuning.lora) if conf.tuning.method == "lora" else causal
    torch.manual_seed(1)
    learning = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for weights in learning:
            weights.add_(torch.randn_like(weights) * 0.2)
    named = _Named(model)
    path = checkpoints.save(
        conf.run_dir / "checkpoint", named, torch.optim.AdamW(learning), checkpoints.Progress(step=1), rank=0
    )
    return model.eval(), path


def write(folder: Path, **settings: object) -> None:
    """Writes a generation_config.json to the model's folder."""
    (folder / "generation_config.json").write_text(json.dumps(settings))
