"""Real tokenizers with several chat templates, and confs."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer, LlamaTokenizerFast, PreTrainedTokenizerBase

from llm_ray.conf.finetune import FinetuneConf

TEMPLATES = Path(__file__).parent / "templates"


@pytest.fixture(scope="session")
def tokenizer(smollm2: Path) -> PreTrainedTokenizerBase:
    """SmolLM2's own, with its own template (ChatML with a default system message)."""
    return AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="session")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    """Mistral 7B's, a SentencePiece model, from the package mistral_common."""
    import mistral_common

    folder = tmp_path_factory.mktemp("mistral")
    shutil.copy(Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1", folder / "tokenizer.model")
    tokenizer = LlamaTokenizerFast.from_pretrained(folder, add_bos_token=True)
    tokenizer.chat_template = (TEMPLATES / "mistral.jinja").read_text()
    return tokenizer


@pytest.fixture(scope="session")
def with_template(tokenizer: PreTrainedTokenizerBase) -> Callable[..., PreTrainedTokenizerBase]:
    """SmolLM2's tokenizer with a template from templates/ and the special tokens that it needs."""

    def make(template: str, *tokens: str, eos: str | None = None) -> PreTrainedTokenizerBase:
        made = copy.deepcopy(tokenizer)
        made.add_tokens([AddedToken(t, special=True, normalized=False) for t in tokens], special_tokens=True)
        if eos:
            made.eos_token = eos
        made.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
        return made

    return make


@pytest.fixture
def conf() -> Callable[..., FinetuneConf]:
    """Returns a conf with the given keys of `data`, `objective` and `seed`."""

    def make(
        train: Path | str | list[str], *, objective: str = "sft", seed: int = 42, evaluation: Any = None, **data: Any
    ) -> FinetuneConf:
        sources = train if isinstance(train, list) else [str(train)]
        return FinetuneConf.model_validate(
            {
                "name": "test",
                "model": {"base": "none"},
                "data": {"train": sources, **data},
                "tuning": {"objective": objective},
                "training": {"seed": seed},
                "evaluation": {"data": evaluation},
            }
        )

    return make


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., Path]:
    """Writes rows as JSON lines."""

    def write(rows: Iterable[object], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
