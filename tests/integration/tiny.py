"""Real models of random weights, which load and compute at once: for what does not ask for sense."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def llama(folder: Path, like: Path, **settings: float) -> Path:
    """A Llama of two layers, with other settings where some are given, and the tokenizer of the model in the folder
    `like`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 49152,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    # Large weights, so that the likeliest token is so by far, and each text goes on in a way of its own.
    config = LlamaConfig(**{"max_position_embeddings": 1024, "initializer_range": 0.5} | sizes | settings)
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(like / name, folder)
    return folder


def mixture(folder: Path, kind: str) -> Path:
    """A mixture of four experts of two layers, of type `kind`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    experts = {
        "num_local_experts": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "head_dim": 32,
    }
    config = AutoConfig.for_model(
        kind, **sizes, **experts, num_key_value_heads=2, initializer_range=0.5, max_position_embeddings=1024
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def adapter(
    folder: Path,
    base: Path,
    seed: int,
    std: float = 1.0,
    target_modules: Sequence[str] = ("q_proj", "v_proj"),
    **settings: Any,
) -> Path:
    """A LoRA adapter with random weights, large enough (`std`) to change every answer of the model in the folder
    `base`.

    `settings` are LoraConfig's.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(**{"r": 8, "target_modules": list(target_modules)} | settings),
    )
    for name, weights in model.named_parameters():
        if "lora_B" in name or "lora_embedding_" in name:
            torch.nn.init.normal_(weights, std=std)
    model.save_pretrained(folder)
    return folder


def bert(folder: Path, tokenizer: Path) -> Path:
    """A BERT in Sentence Transformers' form (the mean over the tokens, of length 1), and its tokenizer in a folder of
    its own or the same."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sleeps"]
    tokenizer.mkdir(parents=True, exist_ok=True)
    (tokenizer / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(tokenizer / "vocab.txt")).save_pretrained(tokenizer)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=64, **sizes)).save_pretrained(folder)
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [
        {"idx": n, "name": str(n), "path": "pooling", "type": f"sentence_transformers.models.{kind}"}
        for n, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "pooling").mkdir()
    (folder / "pooling/config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True})
    )
    return folder


def embedded(bert: Path, tokenizer: Path, text: str) -> list[float]:
    """The vector of a text, as transformers computes it."""
    from transformers import AutoTokenizer, BertModel

    model = BertModel.from_pretrained(bert).eval()
    with torch.no_grad():
        mean = model(**AutoTokenizer.from_pretrained(tokenizer)(text, return_tensors="pt")).last_hidden_state[0].mean(0)
    vector: list[float] = torch.nn.functional.normalize(mean, dim=0).tolist()
    return vector
