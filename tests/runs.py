"""A small conf; its model, found, and a run's folder, opened, as a finetune does it."""

from __future__ import annotations

import contextlib
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
