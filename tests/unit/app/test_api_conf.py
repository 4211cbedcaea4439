"""What a job of the fine-tuning API may set of its conf, and what never."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_ray.app.api_conf import ALLOWED, REFUSED, conf_of
from llm_ray.conf.finetune import FinetuneConf
from llm_ray.conf.keys import FINETUNE
from llm_ray.conf.section import Paths
from llm_ray.serve.gateway.finetuning.service import Asked, Problem


def made(
    home: Path, rows: int = 300, validation: Path | None = None, form: str = "messages", **asked: Any
) -> FinetuneConf:
    (home / "rows.jsonl").touch()
    return conf_of(
        Asked("base", "file-1", **asked),
        run="ft-bot-1",
        base="base",
        paths=Paths.of(home),
        train=home / "rows.jsonl",
        form=form,
        rows=rows,
        validation=validation,
    )


def refused(home: Path, **asked: Any) -> tuple[str | None, str]:
    with pytest.raises(Problem) as caught:
        made(home, **asked)
    assert caught.value.status == 400
    return caught.value.param, str(caught.value)


def test_every_key_of_the_schema_is_allowed_or_refused() -> None:
    """A new key is refused until somebody has decided."""

    def told(name: str, keys: Any) -> bool:
        return any(name == key or name.startswith(f"{key}.") for key in keys)

    leaves = [name for name, key in FINETUNE.table.items() if not key.section]
    assert [name for name in leaves if not told(name, ALLOWED) and not told(name, REFUSED)] == []
    named = {*REFUSED, *ALLOWED}
    assert named <= set(FINETUNE.table), "what is no key"


@pytest.mark.parametrize("key", REFUSED)
def test_refused_keys_are_refused_with_dots_and_in_sections(key: str, tmp_path: Path) -> None:
    *above, leaf = key.split(".")
    nested: dict[str, Any] = {leaf: "x"}
    for section in reversed(above):
        nested = {section: nested}
    for given in ({key: "x"}, nested):
        param, message = refused(tmp_path, conf=given)
        assert param == f"conf.{key}"
        assert "a job cannot set it" in message


def test_no_file_of_the_host_is_named_as_validation(tmp_path: Path) -> None:
    for value in ("/etc/passwd", ["/etc/passwd"], {"a": 1}):
        assert (refused(tmp_path, conf={"data": {"validation": value}})[0] or "").startswith("conf.data.validation")
    assert made(tmp_path, conf={"data": {"validation": 0.1}}).data.validation == 0.1
    assert made(tmp_path, conf={"data.validation": None}).data.validation is None
    assert made(tmp_path, validation=tmp_path / "v.jsonl").data.validation == (str(tmp_path / "v.jsonl"),)


def test_preference_pairs_and_methods_go_together(tmp_path: Path) -> None:
    conf = made(tmp_path, form="openai_preference", method="dpo", beta=0.3)
    assert (conf.tuning.objective, conf.tuning.dpo.beta) == ("dpo", 0.3)
    assert made(tmp_path, form="preference", method="dpo").tuning.dpo.beta == 0.1
    orpo = made(tmp_path, form="preference", conf={"tuning": {"objective": "orpo"}})
    assert orpo.tuning.objective == "orpo"
    param, message = refused(tmp_path, form="preference")
    assert param == "training_file" and "set method.type to dpo" in message
    param, message = refused(tmp_path, method="dpo")
    assert param == "training_file" and "dpo learns from preference pairs" in message
    assert refused(tmp_path, form="preference", method="dpo", conf={"tuning.objective": "orpo"})[0] == (
        "conf.tuning.objective"
    )
    param, message = refused(tmp_path, form="messages", conf={"tuning.objective": "pretrain"})
    assert param == "training_file" and "learns from texts" in message
    param, message = refused(tmp_path, form="messages", conf={"tuning.objective": "kto"})
    assert param == "training_file" and "a job cannot learn from rated answers" in message


def test_keys_and_hyperparameters_make_the_conf(tmp_path: Path) -> None:
    conf = made(tmp_path, epochs=3, batch_size=8, seed=7, conf={"tuning.lora.r": 4, "training": {"weight_decay": 0.1}})
    assert (conf.training.epochs, conf.training.global_batch_size, conf.training.seed) == (3, 8, 7)
    assert (conf.tuning.lora.r, conf.training.weight_decay, conf.training.learning_rate) == (4, 0.1, "auto")
    assert (conf.name, conf.paths.runs, conf.data.train) == (
        "ft-bot-1",
        tmp_path / "runs",
        (str(tmp_path / "rows.jsonl"),),
    )


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    assert refused(tmp_path, conf={"training": {"epoch": 3}}) == (
        "conf.training.epoch",
        "conf.training.epoch: a job has no such key; did you mean training.epochs?",
    )
    assert refused(tmp_path, conf={"tuning": {"lora": {"r": "many"}}})[0] == "conf.tuning.lora.r"
    assert refused(tmp_path, epochs=3, conf={"training": {"epochs": 2}})[0] == "conf.training.epochs"
    assert "stands there twice" in refused(tmp_path, conf={"tuning.method": "full", "tuning": {"method": "lora"}})[1]
    assert refused(tmp_path, conf={"tuning": "full"})[0] == "conf.tuning"
    assert refused(tmp_path, conf={"data": "x"})[0] == "conf.data"


def test_a_multiplier_is_of_the_rate_that_auto_chooses(tmp_path: Path, smollm2: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "base").symlink_to(smollm2)
    once = made(tmp_path, rows=300, learning_rate_multiplier=1.0).training.learning_rate
    twice = made(tmp_path, rows=300, learning_rate_multiplier=2.0).training.learning_rate
    assert once == pytest.approx(0.0013, rel=0.01)
    assert twice == pytest.approx(2 * float(once))
    param, _ = refused(tmp_path, learning_rate_multiplier=2.0, conf={"training": {"learning_rate": 0.1}})
    assert param == "conf.training.learning_rate"
