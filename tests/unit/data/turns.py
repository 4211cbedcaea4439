"""What tests of rows with answers to compare share: turns of a conversation, and rows as a conf converts them."""

from __future__ import annotations

from typing import Any

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.data.formats import Content, Formatter
from llm_ray.data.sources import Row


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def silent(line: str) -> None:
    pass


def converted(conf: FinetuneConf, values: dict[str, Any]) -> Content:
    """What becomes of a row with these values, line 7 of the conf's file."""
    (file,) = conf.data.train
    return Formatter(conf.data, conf.objective.reads)(Row(file, 7, values))
