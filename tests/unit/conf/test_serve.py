"""Loading a serve conf: as for finetunes, and what is particular to models with names of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_ray.conf.keys import SERVE
from llm_ray.conf.load import dump, load_serve
from llm_ray.errors import ConfError
from tests.unit.conf.conftest import error

Write = Callable[[str], Path]

SMALL = """\
models:
  bot:
    model: smollm2-135m-instruct
"""
message = partial(error, load_serve)

# What is wrong with a conf: the lines that are added to SMALL (which has 3) or, if it begins with `models`, the whole
# conf; and the words that the message must have, separated by `; `. `:6:` is the line.
BROKEN = {
    "unknown key of a model": (
        "    max_batc: 4\n",
        ":4: models.bot.max_batc: no such key; mean models.bot.max_batch?",
    ),
    "key with a dash": ("    max-queue: 4\n", ":4: ; mean models.bot.max_queue?"),
    "key of vLLM": (
        "    max_num_seqs: 4\n",
        ":4: models.bot.max_num_seqs: no such key; mean models.bot.max_batch?",
    ),
    "option of vLLM": ("    tensor_parallel_size: 2\n", ":4: ; mean models.bot.engine_options.tensor_parallel_size?"),
    "arithmetic in vLLM's words": ("    dtype: bfloat16\n", ":4: ; mean models.bot.precision?"),
    "key of Ray Serve": ("    num_replicas: 2\n", ":4: ; mean models.bot.replicas?"),
    "section of Ray Serve": ("    autoscaling_config: {}\n", ":4: ; mean models.bot.autoscale?"),
    "key of llm-on-ray": ("cpus_per_worker: 24\n", ":4: cpus_per_worker: no such key; mean models.NAME.cpus?"),
    "section of llm-on-ray": (
        "model_description:\n  model_id_or_path: gpt2\n",
        ":4: model_description: no such key; models.NAME.model?",
    ),
    "key of another section": ("port: 9000\n", ":4: port: no such key; mean endpoint.port?"),
    "endpoint's key at a model": ("    port: 9000\n", ":4: models.bot.port: no such key; mean endpoint.port?"),
    "three levels down": (
        "    autoscale:\n      maximum: 3\n",
        ":5: models.bot.autoscale.maximum; mean models.bot.autoscale.max",
    ),
    "key like nothing": (
        "    zebra: 1\n",
        ":4: models.bot.zebra: no such key; models.bot has the keys model, tokenizer",
    ),
    "section like nothing": (
        "zebra: 1\n",
        ":4: zebra: no such key; a conf has the keys runtime, paths, endpoint, models",
    ),
    "choice misspelled": (
        "    engine: openvno\n",
        ':4: models.bot.engine is "openvno"; vllm, openvino or transformers; mean openvino?',
    ),
    "form of weights that is none": (
        "    engine: openvino\n    weights: int5\n",
        ':5: models.bot.weights is "int5"; fp32, bf16, int8, int4 or null',
    ),
    "number too small": ("    replicas: 0\n", ":4: models.bot.replicas is 0; at least 1"),
    "port too high": ("endpoint:\n  port: 99999\n", ":5: endpoint.port is 99999; at least 1 and at most 65535"),
    "text for a number": ("    cpus: all\n", ':4: models.bot.cpus is "all"; an integer of at least 1 or auto'),
    "true for a number": ("    cpus: true\n", ":4: models.bot.cpus is true; an integer"),
    "text for a list": ("endpoint:\n  cors_origins: https://a.b\n", ":5: endpoint.cors_origins is; a list of texts"),
    "model is mere text": (
        "models:\n  bot: smollm2\n",
        ':2: models.bot is "smollm2"; a section with keys indented below models.bot:',
    ),
    "colon without blank": ("models:\n  bot: model:x\n", ":2: models.bot is; model: needs a space after the colon"),
    "list of models": ("models:\n  - model: a\n", ":1: models is [; a section with keys indented below models:"),
    "empty model": ("models:\n  bot:\n", ":2: models.bot is null; a section"),
    "no models": ("models: {}\n", ":1: models is empty; by their name for clients"),
    "model without model": (
        "models:\n  bot:\n    cpus: 2\n",
        ":2: models.bot.model is missing: What to serve; --set models.bot.model=",
    ),
    "empty model name": ("models:\n  bot:\n    model: ''\n", ":3: models.bot.model is empty"),
    "model twice": ("  bot:\n    model: b\n", ":4: models.bot appears twice (first in line 2)"),
    "name with a blank": ("  my bot: {model: a}\n", ":4: models.my bot: 'my bot' is not a valid model name"),
    "number as name": ("  7: {model: a}\n", ":4: models: the name 7 must be text; quotes: '7'"),
    "name that is a path of the endpoint": (
        "  v1/x: {model: a}\n",
        ":4: models.v1/x: 'v1/x' is a path of the endpoint: choose",
    ),
    "adapter's name": ("    adapters:\n      my lora: a\n", ":5: models.bot: 'my lora' is not a valid model name"),
    "adapter called as the base": (
        "    adapters:\n      bot: a\n",
        ":5: models.bot.adapters.bot: the name is already used by models.bot:",
    ),
    "adapter called as another model": (
        "    adapters:\n      qwen2.5: a\n  qwen2.5: {model: b}\n",
        ":5: models.bot.adapters.qwen2.5: the name is already used by models.qwen2.5:",
    ),
    "adapter is a number": ("    adapters: {a: 3}\n", ":4: models.bot.adapters.a is 3"),
    "adapters on transformers": (
        "    engine: transformers\n    adapters: {a: b}\n",
        ":5: models.bot: adapters need engine vllm or openvino, but engine is transformers",
    ),
    "weights without OpenVINO": (
        "    engine: vllm\n    weights: int8\n",
        ":5: models.bot: weights needs engine openvino, but engine is vllm",
    ),
    "compiled OpenVINO": ("    compile: true\n    engine: openvino\n", ":4: models.bot: compile needs engine vllm"),
    "compiled adapters": (
        "    adapters: {a: b}\n    compile: true\n",
        ":5: models.bot: compile cannot be combined with adapters",
    ),
    "replicas twice": (
        "    replicas: 2\n    autoscale: {max: 3}\n",
        ":4: models.bot: replicas is 2, but autoscale is set too",
    ),
    "fewest above most": (
        "    autoscale:\n      min: 3\n",
        ":5: models.bot: autoscale.max is 1, less than autoscale.min, 3",
    ),
    "foreign code": (
        "    trust_remote_code: true\n",
        ":4: models.bot: trust_remote_code runs code; add 'smollm2-135m-instruct' to trusted_models",
    ),
    "certificate without key": (
        "endpoint:\n  tls_certificate: a.pem\n",
        ":5: endpoint.tls_certificate and endpoint.tls_key belong together",
    ),
    "no certificate": (
        "endpoint:\n  tls_certificate: a.pem\n  tls_key: b.pem\n",
        "the conf has 2 errors; :5: endpoint.tls_certificate: no such file; confs/a.pem; :6: endpoint.tls_key: no such "
        "file; confs/b.pem",
    ),
    "no folder": (
        "models:\n  bot:\n    model: ./my-model\n",
        ":3: models.bot.model: no such folder; confs/my-model or; elsewhere/my-model",
    ),
    "no tokenizer": ("    tokenizer: /no/where\n", ":4: models.bot.tokenizer: no such folder: /no/where"),
    "no adapter": ("    adapters:\n      a: ../ad\n", ":5: models.bot.adapters.a: no such folder"),
    "no chat template": ("    chat_template: t.jinja\n", ":4: models.bot.chat_template: no such file; confs/t.jinja"),
    "alias of what it lies in": (
        "models:\n  bot: &a\n    model: x\n    engine_options: *a\n",
        ":4: models.bot.engine_options is an alias (*) of an enclosing value",
    ),
    "undefined variable": ("    cpus: {{ cpus }}\n", ":4: models.bot.cpus; variable cpus is not set; --set cpus="),
    "sandbox": ("    cpus: {{ ''.__class__.__mro__ }}\n", ":4: the template uses something the sandbox forbids"),
    "section misspelled": ("models_: {}\n", "models_; mean models?"),
    "section of models without any": ("models:\n", ":1: models is null; a section"),
    "key as after --set": (
        "endpoint.port: 80\n",
        ":4: endpoint.port: no such key; in a file it is port: indented below endpoint:",
    ),
    "model's key as after --set": (
        "models.bot.cpus: 2\n",
        ":1: models.bot.cpus: no such key; in a file it is cpus: indented below models.bot:",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_confs(case: str, write: Write) -> None:
    text, words = BROKEN[case]
    file = write(text if text.startswith("models") else SMALL + text)
    told = message(file)
    assert str(file) in told
    assert [word for word in words.split("; ") if word not in told] == [], told


def test_what_a_conf_needs_at_least(write: Write) -> None:
    assert "it needs at least models.NAME.model" in message(write("# nothing\n"))
    assert "models.NAME.model is missing" in message(write("endpoint:\n  port: 80\n"))


def test_everything_wrong_is_told_at_once_by_line(write: Write) -> None:
    file = write(
        f"{SMALL}    cpu: 1\n    replicas: 0\n  v1: {{model: a}}\n  b:\n    engine: vlm\nendpoint:\n  tls_key: a\n"
    )
    first, *lines = message(file).split("\n")
    assert first == "the conf has 6 errors:"
    assert [int(line.split(":")[1]) for line in lines] == [4, 5, 6, 7, 8, 10]


# --set ----------------------------------------------------------------------------------------------------------------

TWO = """\
models:
  qwen2.5:
    model: a
    adapters: {x: x}
  qwen2:
    model: b
"""


@pytest.mark.parametrize(
    ("override", "name", "key", "value"),
    [
        ("models.qwen2.5.cpus=4", "qwen2.5", "cpus", 4),
        ("models.qwen2.cpus=4", "qwen2", "cpus", 4),
        ("models.qwen2.5.adapters.bot-1.0=run", "qwen2.5", "adapters", {"x": "x", "bot-1.0": "run"}),
        ("models.qwen2.5.adapters={}", "qwen2.5", "adapters", {}),
        ("models.qwen2.engine_options.block_size=32", "qwen2", "engine_options", {"block_size": 32}),
        ("models.qwen2.autoscale={max: 2}", "qwen2", "replicas", 1),
        ("models.org/new-1.0.model=c", "org/new-1.0", "model", "c"),
        ("models.new-1.0={model: c, cpus: 2}", "new-1.0", "cpus", 2),
        ("models.qwen2.tools=off", "qwen2", "tools", "off"),
    ],
)
def test_a_key_of_a_model_is_set(write: Write, override: str, name: str, key: str, value: object) -> None:
    models = load_serve(write(TWO), [override]).models
    assert getattr(models[name], key) == value
    assert set(models) == {"qwen2.5", "qwen2", name}


def test_a_name_of_the_conf_is_meant_before_a_shorter_one(write: Write) -> None:
    dotted = "models:\n  a.adapters.b:\n    model: a\n"
    assert load_serve(write(dotted), ["models.a.adapters.b.cpus=2"]).models["a.adapters.b"].cpus == 2
    shorter = load_serve(write("models:\n  a:\n    model: a\n"), ["models.a.adapters.b.cpus=run"])
    assert shorter.models["a"].adapters == {"b.cpus": "run"}


def test_all_models_are_set(write: Write) -> None:
    assert set(load_serve(write(TWO), ["models={a: {model: b}}"]).models) == {"a"}


def test_a_model_is_added_key_by_key(write: Write) -> None:
    model = load_serve(write(SMALL), ["models.qwen2.5.cpus=2", "models.qwen2.5.model=a"]).models["qwen2.5"]
    assert (model.model, model.cpus) == ("a", 2)


def test_what_is_set_for_one_model_is_not_set_for_others_that_share_a_section(write: Write) -> None:
    shared = "models:\n  a:\n    model: a\n    autoscale: &few {max: 2}\n  b:\n    model: b\n    autoscale: *few\n"
    models = load_serve(write(shared), ["models.a.autoscale.max=4"]).models
    assert [model.autoscale and model.autoscale.max for model in models.values()] == [4, 2]


def test_merged_sections(write: Write) -> None:
    merged = "models:\n  a: &a\n    model: a\n    cpus: 2\n    autoscale: {max: 2}\n  b:\n    <<: *a\n    model: b\n"
    models = load_serve(write(merged), ["models.b.autoscale.max=3"]).models
    assert (models["b"].model, models["b"].cpus) == ("b", 2)
    assert [model.autoscale and model.autoscale.max for model in models.values()] == [2, 3]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("models.bot.cpu=1", "did you mean models.bot.cpus?"),
        ("models.qwen2.5.cpu=1", "did you mean models.qwen2.5.cpus?"),
        ("models.bot.autoscal.min=1", "did you mean models.bot.autoscale.min?"),
        ("cpus_per_worker=1", "did you mean models.NAME.cpus?"),
        ("epochs=1", "is neither a key of the conf nor a variable of my.yaml"),
        ("models.bot.cpus", "write it as key=value"),
        ("models.bot.cpus=[1", "is not valid YAML"),
        ("models.bot.cpus=many", 'models.bot.cpus is "many"'),
        ("models.bot=x", 'models.bot is "x": it must be a section'),
        (
            "models.bto.cpus=2",
            "the conf has no models.bto (it has models.bot); to add it, give --set models.bto.model=… too",
        ),
        ("models.bot.model=./nowhere", "models.bot.model: no such folder"),
        ("models.bot.trust_remote_code=true", "models.bot: trust_remote_code runs code that comes with the model"),
        ("models.my bot.model=x", "'my bot' is not a valid model name"),
        ("endpoint.tls_key=x.pem", "endpoint.tls_certificate and endpoint.tls_key belong together"),
    ],
)
def test_wrong_overrides(write: Write, override: str, words: str) -> None:
    told = message(write(SMALL), override)
    assert told.startswith(f"--set {override}: ")
    assert words in told


# Paths ----------------------------------------------------------------------------------------------------------------


def test_names_stay_and_folders_become_absolute(write: Write, folder: Path) -> None:
    for name, marker in (
        ("smollm2-135m-instruct", ""),
        ("mine", "config.json"),
        ("adapter", "adapter_config.json"),
        ("words", "tokenizer.json"),
    ):
        (folder / name).mkdir()
        if marker:
            (folder / name / marker).touch()
    (folder.parent / "elsewhere" / "here").mkdir()
    conf = load_serve(
        write(f"""\
models:
  name: {{model: smollm2-135m-instruct, tokenizer: words, adapters: {{a: adapter, b: support-bot, c: mine}}}}
  hub: {{model: Qwen/Qwen3-0.6B, tokenizer: gpt2}}
  folder: {{model: mine}}
  explicit: {{model: ./mine}}
  current: {{model: ./here}}
  absolute: {{model: "{folder}/smollm2-135m-instruct"}}
""")
    )
    models = conf.models
    assert [model.model for model in models.values()] == [
        "smollm2-135m-instruct",  # the folder beside it holds no model
        "Qwen/Qwen3-0.6B",
        f"{folder}/mine",
        f"{folder}/mine",
        f"{folder.parent}/elsewhere/here",
        f"{folder}/smollm2-135m-instruct",
    ]
    assert (models["name"].tokenizer, models["hub"].tokenizer) == (f"{folder}/words", "gpt2")
    assert models["name"].adapters == {"a": f"{folder}/adapter", "b": "support-bot", "c": "mine"}  # mine is no adapter
    assert load_serve(write(dump(conf))) == conf


def test_what_is_set_is_looked_up_here(write: Write, folder: Path) -> None:
    for place in (folder, folder.parent / "elsewhere"):
        (place / "mine").mkdir()
        (place / "t.jinja").touch()
    conf = load_serve(write(SMALL), ["models.bot.model=./mine", "models.bot.chat_template=t.jinja", "paths.runs=runs"])
    bot = conf.models["bot"]
    assert (bot.model, bot.chat_template) == (
        f"{folder.parent}/elsewhere/mine",
        folder.parent / "elsewhere" / "t.jinja",
    )
    assert conf.paths.runs == folder.parent / "elsewhere" / "runs"
    assert load_serve(write(f"{SMALL}    chat_template: t.jinja\n")).models["bot"].chat_template == folder / "t.jinja"


def test_a_trusted_model_stays_trusted_when_its_path_is_made_absolute(write: Write, folder: Path) -> None:
    (folder / "mine").mkdir()
    conf = load_serve(write("models: {bot: {model: ./mine, trust_remote_code: true, trusted_models: [./mine]}}\n"))
    assert conf.models["bot"].model in conf.models["bot"].trusted_models
    assert load_serve(write(dump(conf))) == conf


@pytest.mark.parametrize("name", ["~no-such-user/x", "x" * 300, "\0", "my.yaml/x.json"])
@pytest.mark.parametrize("key", ["model", "tokenizer", "chat_template", "adapters.a"])
def test_names_that_no_file_can_have(write: Write, key: str, name: str) -> None:
    override = f'models.bot.{key}="{name}"'.replace("\0", "\\0")
    if key == "chat_template":
        assert f"models.bot.{key}: no such file" in message(write(SMALL), override)
    else:
        assert load_serve(write(SMALL), [override])
    message(name)


# The resolved conf ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "endpoint.host=0.0.0.0",
        "endpoint.api_keys=on",
        "endpoint.cors_origins=['https://a.b', '{{ c }}']",
        "endpoint.limits={requests_per_minute: 60}",
        "models.bot.autoscale={min: 1, max: 4, target: 8}",
        "models.bot.adapters={a: b, qwen2.5: c}",
        "models.bot.tools=off",
        "models.bot.tools=hermes",
        "models.bot.cpus=4",
        "models.bot.engine_options={max_num_batched_tokens: 4096, compilation_config: {level: 3}, a: [1, null, true]}",
        "models.bot.tokenizer='7'",
        "models.qwen2.5.model='no'",
    ],
)
def test_a_dumped_conf_loads_to_the_same(write: Write, override: str) -> None:
    conf = load_serve(write(SMALL), [override])
    assert load_serve(write(dump(conf))) == conf


# Anything at all ------------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "a", "~x/y", "a/b", "*", "./x", "\0", "auto", "vllm"])
)
NAMES = (
    st.sampled_from(sorted({part for name in SERVE.table for part in name.split(".")}))
    | st.text(max_size=3)
    | st.integers()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=20
)
MODELS = st.dictionaries(NAMES, st.dictionaries(NAMES, VALUES, max_size=4) | VALUES, max_size=3)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, VALUES, max_size=4), MODELS)
def test_any_yaml_is_a_conf_or_a_conf_error(
    write: Write, data: dict[object, object], models: dict[object, object]
) -> None:
    file = write(yaml.safe_dump({"models": {"bot": {"model": "a"}} | models} | data, allow_unicode=True))
    try:
        load_serve(file)
    except ConfError as problem:
        assert "my.yaml" in str(problem)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from(["models", ".", "bot", "cpus", "autoscale", "NAME", "x", "", "=", "1", "{a: 1}"]), max_size=8
    ).map("".join)
)
def test_any_setting_is_a_conf_or_a_conf_error(write: Write, text: str) -> None:
    with contextlib.suppress(ConfError):
        load_serve(write(SMALL), [text, f"models.{text}=1", f"models.{text}={{model: a}}"])
    with contextlib.suppress(ConfError):
        load_serve(write(SMALL), [f"{text}={{model: a}}"])
