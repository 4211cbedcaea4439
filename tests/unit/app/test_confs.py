"""A form's fields come from the conf's schema, and its settings make a conf and come back from one."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from llm_ray.app.confs import ASKED, beyond, command_of, conf_of, dump, fields, settings_of
from llm_ray.conf.finetune import FinetuneConf, Training
from llm_ray.conf.keys import FINETUNE, Keys
from llm_ray.conf.section import Paths
from llm_ray.errors import ConfError

SETTINGS = {"train": "organisation/name", "model": "small", "name": "first"}


def test_every_key_has_a_field() -> None:
    leaves = {key.name for key in FINETUNE.table.values() if not key.section}
    assert leaves <= {field.name for field in fields()} | set(ASKED)
    assert all(field.text for field in fields())


def test_a_new_key_has_one_too() -> None:
    class NewTraining(Training):
        colour: Literal["red", "green"] = "red"
        """What it is painted in."""

    class NewConf(FinetuneConf):
        training: NewTraining = NewTraining()

    (found,) = (field for field in fields(Keys("finetune", NewConf, {})) if field.name == "training.colour")
    assert (found.section, found.text, found.default, found.choices) == (
        "training",
        "What it is painted in.",
        "red",
        ("red", "green"),
    )


def test_defaults_are_those_that_hold() -> None:
    defaults = {field.name: field.default for field in fields()}
    assert defaults["data.max_length"] == "1024"  # of the template, in place of the schema's 512
    assert defaults["training.learning_rate"] == "auto"
    assert (defaults["model.gguf_file"], defaults["training.compile"]) == ("", "false")


def test_settings_make_a_conf_and_a_command_and_come_back(tmp_path: Path) -> None:
    given = {
        "training.epochs": "2",
        "data.validation": "null",
        "data.columns": "{a: b}",
        "data.system": "Be brief: always.",
    }
    settings = SETTINGS | {
        name: f'"{value}"' if ":" in value and name != "data.columns" else value for name, value in given.items()
    }
    conf = conf_of(settings | {"training.seed": " "}, tmp_path)
    assert (conf.training.epochs, conf.data.validation, conf.data.columns) == (2, None, {"a": "b"})
    assert conf.paths == Paths.of(tmp_path)
    assert command_of(SETTINGS | {"training.epochs": "2", "training.seed": ""}) == (
        "llm-ray finetune --config lora --set train=organisation/name --set model=small --set name=first --set "
        "training.epochs=2"
    )
    assert conf_of(settings_of(dump(conf)), tmp_path) == conf


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("training:\n  epoch: 2", "training.epoch is not a key of a conf; did you mean training.epochs?"),
        ("a: [", "line "),
        ("just text", "no keys with values"),
        ("name: {{ env.HOME }}", "is a template"),
        ("name: a\nname: b", "line 2"),
    ],
)
def test_a_file_that_is_no_conf_is_refused(text: str, told: str) -> None:
    with pytest.raises(ConfError, match=told.replace("?", r"\?")):
        settings_of(text)


def test_what_only_an_admin_may_name(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    for folder in (mine, other):
        folder.mkdir()
        (folder / "rows.jsonl").write_text("{}")

    def told(**settings: str) -> str:
        named = {name.replace("__", "."): value for name, value in settings.items()}
        return "; ".join(beyond(conf_of(SETTINGS | named, tmp_path), [mine], Paths.of(tmp_path)))

    assert told(train=str(mine / "rows.jsonl")) == ""
    assert "not one of your files" in told(train=str(other / "rows.jsonl"))
    (mine / "link.jsonl").symlink_to(other / "rows.jsonl")
    assert "not one of your files" in told(train=str(mine / "link.jsonl"))
    assert "not one of your files" in told(evaluation__data=str(other / "rows.jsonl"))
    assert "not one of your files" in told(
        data__processor="join", data__processor_args=f"{{file: {other / 'rows.jsonl'}}}"
    )
    assert "data.processor runs code" in told(data__processor="os.path:join")
    assert "model.trust_remote_code" in told(model__trust_remote_code="true", model__trusted_models="[small]")
    (mine / "parts.yaml").write_text("task: parts\n")
    assert "is a task file, which can run code" in told(evaluation__tasks=str(mine / "parts.yaml"))
    assert told(evaluation__tasks="arc_easy") == ""
    assert "paths" in told(paths__runs=str(other))
