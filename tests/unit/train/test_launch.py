"""Which failures of workers are retried, and how they are reported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist
from ray.exceptions import ActorDiedError
from ray.train import WorkerGroupError

from llm_ray.conf.finetune import FinetuneConf
from llm_ray.errors import ModelError
from llm_ray.train.launch import Recurring, _explain


@pytest.fixture
def conf(tmp_path: Path) -> FinetuneConf:
    (tmp_path / "bot").mkdir()
    return FinetuneConf.model_validate(
        {"name": "bot", "model": {"base": "m"}, "data": {"train": "rows.jsonl"}, "paths": {"runs": str(tmp_path)}}
    )


LOST = RuntimeError(
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3456"
)


@pytest.mark.parametrize(
    ("failures", "words"),
    [
        ([IndexError("index out of range in self")], "worker 0 of bot failed: IndexError: index out of range in self"),
        ([LOST, IndexError("index out of range in self")], "worker 1 of bot failed: IndexError"),
        ([RuntimeError("mat1 and mat2 shapes cannot be multiplied (15x96 and 64x96)")], "mat1 and mat2"),
        ([ModelError("the model is half a model")], "half a model"),
        ([NotImplementedError("no kernel")], "no kernel"),
    ],
)
def test_what_recurs(conf: FinetuneConf, failures: list[Exception], words: str) -> None:
    error = _explain(WorkerGroupError("failed", dict(enumerate(failures))), conf)
    assert isinstance(error, Recurring)
    assert words in str(error)
    assert "A retry would fail the same way" in str(error)
    assert "run the same command to continue" not in str(error)


@pytest.mark.parametrize(
    "failures",
    [
        [LOST],
        [ActorDiedError(), IndexError("list index out of range")],
        [MemoryError("no memory"), LOST],
        [RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")],
        [dist.DistNetworkError("The client socket has failed to connect")],
        [RuntimeError("Timed out waiting 1800000ms for recv operation to complete")],
        [OSError(28, "No space left on device"), LOST],
        [ConnectionResetError("reset")],
    ],
)
def test_what_another_try_may_mend(conf: FinetuneConf, failures: list[Exception]) -> None:
    error = _explain(WorkerGroupError("failed", dict(enumerate(failures))), conf)
    assert not isinstance(error, Recurring)
    assert "run the same command to continue from the last one" in str(error)
