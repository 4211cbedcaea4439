"""Every keyword of a JSON schema against each engine: documents that break it are put in the model's mouth, and must
not come out.

    make test-full TESTS=tests/full/test_schemas.py

The model says what it is told. Documents are tokens of it: after the prompt, which is a token that asks for a document,
that document is likeliest by far, and then the end. An answer that is the document was allowed by the schema.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llm_ray.cluster import local_ray
from llm_ray.conf.engines import EngineName
from llm_ray.progress import Silent
from llm_ray.serve.models import ServedModel
from tests.schemas import OBEYED

ENGINES: tuple[EngineName, ...] = ("vllm", "openvino", "transformers")
END = "<|end|>"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def texts(document: Any) -> list[str]:
    """How an answer may write a document: its properties in any order."""
    if not isinstance(document, dict):
        return [json.dumps(document)]
    return [json.dumps(dict(order)) for order in itertools.permutations(document.items())]


SAID = sorted({text for _, right, wrong in OBEYED.values() for document in right + wrong for text in texts(document)})
# The tokens: the end, all bytes, the documents, and one for each that asks for it.
ASKED = {text: f"<|{number}|>" for number, text in enumerate(SAID)}
WORDS = [END, *sorted(BYTES.alphabet()), *(BYTES.pre_tokenize_str(text)[0][0] for text in SAID), *ASKED.values()]
VOCABULARY = {word: number for number, word in enumerate(dict.fromkeys(WORDS))}


def parrot(folder: Path) -> None:
    """A Llama that computes nothing but its embedding and its head: after what asks for a document comes the document,
    else the end."""
    tokenizer = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = BYTES, decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END).save_pretrained(folder)
    size = -(-(len(SAID) + 1) // 64) * 64
    sizes = {
        "hidden_size": size,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": size // 64,
        "head_dim": 64,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(VOCABULARY), max_position_embeddings=128, eos_token_id=0, **sizes)
    )
    embedding, head = torch.zeros(2, len(VOCABULARY), size)
    for column, (text, asked) in enumerate(ASKED.items(), 1):
        embedding[VOCABULARY[asked], column] = head[VOCABULARY[BYTES.pre_tokenize_str(text)[0][0]], column] = 1
    embedding[:, 0], head[0, 0] = 1, 0.5
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(head)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)


@dataclass
class Served:
    """The model in an engine."""

    server: Any
    runner: asyncio.Runner

    def says(self, text: str, schema: Any) -> str:
        """The answer where a document is asked for."""
        from llm_ray.serve.gateway.requests import Completion

        asked = {
            "prompt": [VOCABULARY[ASKED[text]]],
            "max_tokens": 8,
            "temperature": 0.0,
            "model": "m",
            "structured_outputs": {"json": schema},
        }
        return self.runner.run(self._answer(Completion.model_validate(asked)))

    async def _answer(self, request: Any) -> str:
        async for answer in await self.server.completions(request):
            assert not getattr(answer, "error", None), answer.error
            return str(answer.choices[0].text)
        raise AssertionError


@pytest.fixture(scope="module")
def ray() -> Iterator[None]:
    with local_ray(2):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "parrot"
    parrot(folder)
    return folder


@pytest.fixture(scope="module", params=ENGINES)
def served(request: pytest.FixtureRequest, ray: None, folder: Path) -> Iterator[Served]:
    from llm_ray.models.convert import openvino_folder
    from llm_ray.serve.replica.server import ModelServer

    engine = request.param
    path = openvino_folder(folder, "fp32", folder.parent, Silent()) if engine == "openvino" else folder
    model = ServedModel(
        "m", path, engine=engine, max_model_len=128, kv_cache_bytes=2**26, max_batch=4, threads=1, task="completions"
    )
    with asyncio.Runner() as runner:
        server = ModelServer(model)
        runner.run(server.start())
        yield Served(server, runner)
        server.engine._engine_client.shutdown()


def broken(served: Served, name: str) -> Iterator[str]:
    """Documents that come out though the schema forbids them, or in no order though it allows them."""
    schema, right, wrong = OBEYED[name]
    if schema == {}:  # the same as no request for a form
        return
    for document in wrong:
        yield from (f"{name}: {text} came out" for text in texts(document) if served.says(text, schema) == text)
    for document in right:
        if not any(served.says(text, schema) == text for text in texts(document)):
            yield f"{name}: {document} did not"


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_every_keyword_is_enforced_whatever_was_asked_before(served: Served, order: str) -> None:
    names = [*OBEYED] if order == "forwards" else [*OBEYED][::-1]
    faults = [fault for name in names for fault in broken(served, name)]
    assert not faults, "\n".join(faults)
