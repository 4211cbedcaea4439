"""Tokens and rows that a model has no numbers for are refused before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from llm_ray.app.finetune import look_ahead, plan_finetune
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.section import Paths
from llm_ray.conf.serve import ModelServing, ServeConf
from llm_ray.errors import ConfError, LlmRayError, ModelError
from llm_ray.models.limits import positions
from llm_ray.progress import Silent
from llm_ray.serve.deployments.plan import plan
from llm_ray.serve.models import ServedModel
from tests.full.architectures import small
from tests.runs import base_of


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        ("gpt2", 256),
        ("opt", 256),
        ("roberta", 254),
        ("gptj", 256),
        ("mpt", 256),
        ("ctrl", 256),
        ("bert", 256),
        ("llama", None),
        ("bloom", None),
    ],
)
def test_positions_are_those_that_can_be_computed(kind: str, most: int | None) -> None:
    model = small(kind)
    assert positions(model) == most

    def compute(tokens: int) -> None:
        ids = torch.arange(tokens)[None] % 80 + 5
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    compute(most or 300)
    if most:
        with pytest.raises((IndexError, RuntimeError)):
            compute(most + 1)


def made(folder: Path, kind: str, like: Path, **settings: object) -> Path:
    small(kind, **{"vocab_size": 49152} | settings).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy2(like / file, folder)
    return folder


def conf(base: Path, paths: Paths, **data: object) -> FinetuneConf:
    rows = base.with_name("rows.jsonl")
    rows.write_text(
        "".join(json.dumps({"prompt": f"{n} and {n}?", "completion": str(2 * n)}) + "\n" for n in range(20))
    )
    return FinetuneConf.model_validate(
        {
            "name": "small",
            "model": {"base": str(base)},
            "data": {"train": str(rows)} | data,
            "tuning": {"lora": {"r": 4}},
            "paths": paths.model_dump(mode="json"),
        }
    )


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_rows_longer_than_the_positions(tmp_path: Path, paths: Paths, smollm2: Path, kind: str) -> None:
    base = made(tmp_path / "m", kind, smollm2)
    look_ahead(checked := conf(base, paths, max_length=256), base_of(checked), ["train"], Silent())
    with pytest.raises(
        ConfError, match=r"data\.max_length is 257, but the model .* has positions for 256 tokens: set it to 256"
    ):
        look_ahead(checked := conf(base, paths, max_length=257), base_of(checked), ["train"], Silent())


def test_rotary_positions_go_on(tmp_path: Path, paths: Paths, smollm2: Path) -> None:
    look_ahead(
        checked := conf(made(tmp_path / "m", "llama", smollm2), paths, max_length=1024),
        base_of(checked),
        ["train"],
        Silent(),
    )


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (20, r"gives token \d+ \('.*'\) for a row of the data, and the model .* has embeddings for 20 tokens"),
        (2, r"pads with '<\|im_end\|>' \(token 2\)"),
    ],
)
def test_tokens_without_an_embedding(tmp_path: Path, paths: Paths, smollm2: Path, tokens: int, words: str) -> None:
    """The dry run says so, before any step is tried."""
    base = made(tmp_path / "m", "llama", smollm2, vocab_size=tokens)
    with pytest.raises(ModelError, match=words):
        plan_finetune(conf(base, paths), Silent())


def served(folder: Path, paths: Paths, **settings: object) -> ServedModel:
    return plan(
        ServeConf(models={"m": ModelServing.model_validate({"model": str(folder)} | settings)}, paths=paths), Silent()
    )[0]


@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_tokenizer_that_is_too_large_is_not_deployed(
    tmp_path: Path, paths: Paths, smollm2: Path, engine: str
) -> None:
    base = made(tmp_path / "m", "llama", smollm2, vocab_size=49151)
    with pytest.raises(
        ModelError,
        match=r"the tokenizer has 1 tokens for which the model .* has no embedding, such as .* \(49151;.*vocab_size 49151",
    ):
        served(base, paths, engine=engine)
    assert served(made(tmp_path / "whole", "llama", smollm2), paths, engine=engine).path == tmp_path / "whole"


def test_served_lengths_end_where_positions_do(tmp_path: Path, paths: Paths, smollm2: Path) -> None:
    base = made(tmp_path / "m", "roberta", smollm2)  # it begins to count behind the padding token
    assert served(base, paths).max_model_len == 254
    with pytest.raises(LlmRayError, match=r"max_model_len is 256, but the model supports 254 tokens"):
        served(base, paths, max_model_len=256)
