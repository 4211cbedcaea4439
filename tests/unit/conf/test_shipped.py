"""Every shipped template is a test case, and the generated reference is what the schema says."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
import yaml

from llm_ray.conf import reference
from llm_ray.conf.keys import FINETUNE
from llm_ray.conf.load import dump, load_finetune, shipped
from llm_ray.conf.schema import FinetuneConf
from llm_ray.errors import ConfError

TEMPLATES = shipped("finetune")
WITH_DATA = [name for name in TEMPLATES if name != "quickstart"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with the data that the templates' heads speak of."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path / "home"))
    (tmp_path / "tickets.jsonl").touch()
    (tmp_path / "manuals").mkdir()
    (tmp_path / "my-model").mkdir()
    return tmp_path


def test_the_templates_that_are_promised() -> None:
    assert set(TEMPLATES) == {"quickstart", "lora", "full", "pretrain", "cluster"}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_valid_with_what_it_needs(name: str, here: Path) -> None:
    conf = load_finetune(name, [] if name == "quickstart" else ["train=tickets.jsonl"])
    assert conf.name == name
    assert conf.model.base == "smollm2-135m-instruct"
    assert all(Path(file).exists() for file in conf.data.train)


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_template_without_its_data_says_how_to_give_it(name: str, here: Path) -> None:
    with pytest.raises(ConfError, match=r"yaml\.j2:\d+: data\.train: .*--set train=VALUE"):
        load_finetune(name)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_commands_in_a_templates_head_load(name: str, here: Path) -> None:
    commands = list(_commands(TEMPLATES[name].read_text()))
    assert commands
    for overrides in commands:
        load_finetune(name, overrides)


def _commands(template: str) -> Iterator[list[str]]:
    """The ``--set`` of each command in a template's head."""
    for line in template.splitlines():
        if line.startswith("#") and "--config" in line:
            words = shlex.split(line.partition("llm-ray")[2].split("  #")[0])
            yield [words[i + 1] for i, word in enumerate(words) if word == "--set"]


def test_variables_of_the_templates(here: Path) -> None:
    full = load_finetune("full", ["train=tickets.jsonl", "workers=2"])
    assert (full.training.strategy, full.runtime.workers) == ("fsdp", 2)
    cluster = load_finetune("cluster", ["train=tickets.jsonl", "hosts=4", "address=10.0.0.1:6379", "interface=eth1", "method=full"])
    assert (cluster.runtime.workers, cluster.runtime.interface, cluster.runtime.address) == (4, "eth1", "10.0.0.1:6379")
    assert (cluster.training.strategy, cluster.training.gradient_accumulation) == ("fsdp", 2)


@pytest.mark.parametrize("name", WITH_DATA)
def test_a_resolved_template_keeps_to_the_json_schema(name: str, here: Path) -> None:
    text = dump(load_finetune(name, ["train=tickets.jsonl"]))
    jsonschema.validate(yaml.safe_load(text), json.loads(reference.json_schema()))
    (here / "again.yaml").write_text(text)
    assert load_finetune("again.yaml") == load_finetune(name, ["train=tickets.jsonl"])


# The reference -------------------------------------------------------------------------------------------------------------


def test_the_reference_is_up_to_date() -> None:
    check = subprocess.run([sys.executable, "-m", "llm_ray.conf.reference", "--check"], capture_output=True, text=True, check=False)
    assert check.returncode == 0, check.stderr


def test_drift_is_told_with_the_command_that_mends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "FOLDER", tmp_path)
    reference.update({"a.md": "new"}, "make it so", check=False)
    assert (tmp_path / "a.md").read_text() == "new"
    reference.update({"a.md": "new"}, "make it so", check=True)
    with pytest.raises(SystemExit, match=r"docs/reference/a\.md .* run `make it so`"):
        reference.update({"a.md": "newer"}, "make it so", check=True)
    assert (tmp_path / "a.md").read_text() == "new"


def test_every_key_is_documented() -> None:
    page = reference.markdown()
    for key in FINETUNE.table.values():
        if not key.section:
            assert key.text, key.name
            assert f"| `{key.name}` |" in page


def test_the_reference_says_nothing_of_this_machine() -> None:
    assert str(Path.home()) not in reference.markdown() + reference.json_schema()


def test_the_smallest_conf_of_the_reference_is_one(here: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", reference.markdown(), re.DOTALL)
    (here / "support-bot.yaml").write_text(example)
    assert load_finetune("support-bot.yaml").name == "support-bot"


def test_keys_of_other_tools_lead_to_keys_of_the_conf() -> None:
    assert set(FINETUNE.elsewhere.values()) <= set(FINETUNE.table)


def test_keys_are_those_of_the_schema() -> None:
    assert {name for name in FINETUNE.table if "." not in name} == set(FinetuneConf.model_fields)
    assert FINETUNE.paths("data.columns.anything")
    assert not FINETUNE.paths("data.anything")
    assert not FINETUNE.paths("name.anything")
