"""Every shipped template is a test case, and the generated reference is what the schema says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from llm_ray.conf import reference
from llm_ray.conf.keys import FINETUNE, SERVE, SWEEP, Keys
from llm_ray.conf.load import dump, load_finetune, load_serve, load_sweep, shipped
from llm_ray.errors import ConfError

LOAD: dict[str, Any] = {"finetune": load_finetune, "serve": load_serve, "sweep": load_sweep}
TEMPLATES = [(kind, name) for kind in LOAD for name in shipped(kind)]
# What a template needs to be given.
NEEDS = {
    **{("finetune", name): ["train=tickets.jsonl"] for name in ("lora", "full", "pretrain", "dpo", "cluster")},
    ("serve", "lora"): ["runs=support-bot"],
    ("sweep", "lora"): ["train=tickets.jsonl"],
}
each_template = pytest.mark.parametrize(("kind", "name"), TEMPLATES)
each_kind = pytest.mark.parametrize("keys", [FINETUNE, SERVE, SWEEP], ids=lambda keys: keys.kind)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the data that the templates' heads speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path / "home"))
    for name in ("tickets.jsonl", "pairs.jsonl", "host.pem", "host.key"):
        (tmp_path / name).touch()
    for name in ("manuals", "my-model", "my-adapter"):
        (tmp_path / name).mkdir()
    return tmp_path


def test_the_templates_that_are_promised() -> None:
    assert set(shipped("finetune")) == {"quickstart", "lora", "full", "pretrain", "dpo", "cluster"}
    assert set(shipped("serve")) == {"quickstart", "chat", "openvino", "lora", "autoscale", "models", "cluster"}
    assert set(shipped("sweep")) == {"lora"}


@each_template
def test_a_template_is_valid_with_what_it_needs(kind: str, name: str, here: Path) -> None:
    conf = LOAD[kind](name, NEEDS.get((kind, name), []))
    if kind == "finetune":
        assert conf.name == name
        assert conf.model.base == "smollm2-135m-instruct"
        assert all(Path(file).exists() for file in conf.data.train)
    elif kind == "sweep":
        assert (conf.config, conf.set["train"], conf.trials) == ("lora", "tickets.jsonl", 12)
    else:
        assert "smollm2-135m-instruct" in conf.models


@pytest.mark.parametrize(("kind", "name"), NEEDS)
def test_a_template_without_what_it_needs_says_how_to_give_it(kind: str, name: str, here: Path) -> None:
    variable = NEEDS[kind, name][0].partition("=")[0]
    with pytest.raises(ConfError, match=rf"yaml\.j2:\d+: .*--set {variable}=VALUE"):
        LOAD[kind](name)


@each_template
def test_the_commands_in_a_templates_head_load(kind: str, name: str, here: Path) -> None:
    commands = list(_commands(shipped(kind)[name].read_text(), kind, name))
    assert commands
    for overrides in commands:
        LOAD[kind](name, overrides)


def _commands(template: str, kind: str, name: str) -> Iterator[list[str]]:
    """The ``--set`` of each command in the head of a template that reads it; those of `… --set KEY=VALUE` with what is
    needed."""
    needed = [word for override in NEEDS.get((kind, name), []) for word in ("--set", override)]
    for line in template.splitlines():
        if line.startswith("#") and ((f"llm-ray {kind} " in line and f"--config {name}" in line) or "… --set" in line):
            command = line.partition("llm-ray")[2] or line.partition("…")[2] + " " + shlex.join(needed)
            words = shlex.split(command.split("  #")[0])
            yield [words[i + 1] for i, word in enumerate(words) if word == "--set"]


def test_variables_of_the_templates(here: Path) -> None:
    full = load_finetune("full", ["train=tickets.jsonl", "workers=2"])
    assert (full.training.strategy, full.runtime.workers) == ("fsdp", 2)
    cluster = load_finetune(
        "cluster", ["train=tickets.jsonl", "hosts=4", "address=10.0.0.1:6379", "interface=eth1", "method=full"]
    )
    assert (cluster.runtime.workers, cluster.runtime.interface, cluster.runtime.address) == (4, "eth1", "10.0.0.1:6379")
    assert (cluster.training.strategy, cluster.training.epochs) == ("fsdp", "auto")


def test_variables_of_the_serve_templates(here: Path) -> None:
    (chat,) = load_serve("chat", ["model=Qwen/Qwen3-0.6B", "engine=openvino"]).models.items()
    assert (chat[0], chat[1].model, chat[1].engine) == ("Qwen3-0.6B", "Qwen/Qwen3-0.6B", "openvino")
    assert set(load_serve("chat", ["model=./my-model/"]).models) == {"my-model"}
    assert set(load_serve("chat", ["model=./my-model", "name=qwen2.5", "models.qwen2.5.cpus=2"]).models) == {"qwen2.5"}
    assert set(load_serve("quickstart", ["run=quickstart"]).models) == {"smollm2-135m-instruct", "quickstart"}
    assert load_serve("lora", ["runs=[a, b]"]).models["smollm2-135m-instruct"].adapters == {"a": "a", "b": "b"}
    assert {model.weights for model in load_serve("models", ["engine=openvino", "weights=int4"]).models.values()} == {
        "int4"
    }
    assert {model.engine for model in load_serve("models").models.values()} == {"auto"}
    cluster = load_serve("cluster", ["certificate=host.pem", "certificate_key=host.key"])
    assert (cluster.endpoint.tls_certificate, cluster.endpoint.needs_keys) == (here / "host.pem", True)
    assert not load_serve("chat").endpoint.needs_keys


@each_template
def test_a_resolved_template_keeps_to_the_json_schema(kind: str, name: str, here: Path) -> None:
    conf = LOAD[kind](name, NEEDS.get((kind, name), []))
    jsonschema.validate(
        yaml.safe_load(dump(conf)),
        json.loads(reference.json_schema({"serve": SERVE, "sweep": SWEEP}.get(kind, FINETUNE))),
    )
    (here / "again.yaml").write_text(dump(conf))
    assert LOAD[kind]("again.yaml") == conf


# The reference --------------------------------------------------------------------------------------------------------


def test_the_reference_is_up_to_date() -> None:
    check = subprocess.run(
        [sys.executable, "-m", "llm_ray.conf.reference", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr


def test_drift_is_told_with_the_command_that_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    reference.update({"a.md": "new"}, "make it so", check=False)
    assert (tmp_path / "a.md").read_text() == "new"
    reference.update({"a.md": "new"}, "make it so", check=True)
    with pytest.raises(SystemExit, match=r"docs/reference/a\.md .* run `make it so`"):
        reference.update({"a.md": "newer"}, "make it so", check=True)
    assert (tmp_path / "a.md").read_text() == "new"


@each_kind
def test_every_key_is_documented(keys: Keys[Any]) -> None:
    page = reference.markdown(keys)
    for key in keys.table.values():
        if not key.section:
            assert key.text, key.name
            assert f"| `{key.name}` |" in page


@each_kind
def test_the_reference_says_nothing_of_this_machine(keys: Keys[Any]) -> None:
    assert str(Path.home()) not in reference.markdown(keys) + reference.json_schema(keys)


@each_kind
def test_the_smallest_conf_of_the_reference_is_one(keys: Keys[Any], here: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", reference.markdown(keys), re.DOTALL)
    (here / "support-bot.yaml").write_text(example)
    assert LOAD[keys.kind]("support-bot.yaml")


@each_kind
def test_keys_of_other_tools_lead_to_keys_of_the_conf(keys: Keys[Any]) -> None:
    assert [name for name in keys.elsewhere.values() if not keys.paths(name)] == []
    assert [name for name in keys.elsewhere if any(key.leaf == name for key in keys.table.values())] == [], (
        "these are keys themselves"
    )


@each_kind
def test_keys_are_those_of_the_schema(keys: Keys[Any]) -> None:
    assert {name for name in keys.table if "." not in name} == set(keys.model.model_fields)
