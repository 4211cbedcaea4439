"""A conf over real files in a temporary folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm_ray.conf.finetune import FinetuneConf

MakeConf = Callable[..., FinetuneConf]


@pytest.fixture
def make_conf(tmp_path: Path) -> MakeConf:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    base = tmp_path / "models" / "tiny"
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n# tiny\n")

    def make(name: str = "run", **sections: Any) -> FinetuneConf:
        paths = {"runs": tmp_path / "runs", "models": tmp_path / "models"}
        return FinetuneConf.model_validate(
            {"name": name, "paths": paths, "model": {"base": "tiny"}, "data": {"train": str(data)}} | sections
        )

    return make
