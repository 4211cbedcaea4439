"""A small conf; its model, found, and a run's folder, opened, as a finetune does it; a large model."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.models.load import Base, find_base
from llm_ray.runs.folder import RunFolder, open_run


def conf_of(home: Path, name: str, rows: Path) -> FinetuneConf:
    """Of a run in `home`, from its model `base`."""
    return FinetuneConf.model_validate(
        {
            "name": name,
            "model": {"base": "base"},
            "data": {"train": str(rows)},
            "paths": {"models": home / "models", "runs": home / "runs"},
        }
    )


def base_of(conf: FinetuneConf) -> Base:
    return find_base(conf.model, conf.paths)


def opened_run(conf: FinetuneConf, *, force: bool) -> contextlib.AbstractContextManager[RunFolder]:
    return open_run(conf, base_of(conf), force=force)


def large_model(folder: Path, billions: int) -> Path:
    """A model folder whose weights are holes of a file: whole, as far as can be seen without loading it."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "tokenizer.json").write_text("{}")
    size = billions * 10**9 * 2
    header = json.dumps({"weight": {"dtype": "BF16", "shape": [billions, 10**9], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    return folder
