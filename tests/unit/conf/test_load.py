"""Loading a conf: what is right is read as written, what is wrong is told with its place and a way out."""

from __future__ import annotations

import contextlib
import subprocess
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_ray.conf.keys import FINETUNE
from llm_ray.conf.load import dump, load_finetune
from llm_ray.errors import ConfError
from tests.unit.conf.conftest import SMALL, error

ROOT = Path(__file__).parents[3]
Write = Callable[[str], Path]


message = partial(error, load_finetune)

# What is wrong with a conf: the lines that are added to SMALL (which has 5) or, if it begins with `name` or `#`, the
# whole conf; and the words that the message must have, separated by `; `. `:6:` is the line.
BROKEN = {
    "unknown key in a section": (
        "training:\n  learning_rat: 1e-3\n",
        ":7: training.learning_rat: no such key; mean training.learning_rate?",
    ),
    "key of another section at the top": (
        "learning_rate: 1e-3\n",
        ":6: learning_rate: no such key; mean training.learning_rate?",
    ),
    "key of another section": (
        "runtime:\n  epochs: 3\n",
        ":7: runtime.epochs: no such key; mean training.epochs?",
    ),
    "misspelled section": ("trainign:\n  epochs: 3\n", ":6: trainign: no such key; mean training?"),
    "key in capitals": ("Training:\n  epochs: 3\n", ":6: Training: no such key; mean training?"),
    "key with a dash": ("runtime:\n  max-failures: 3\n", ":7: ; mean runtime.max_failures?"),
    "key of the Hugging Face trainer": ("training:\n  num_train_epochs: 3\n", ":7: ; mean training.epochs?"),
    "key of llm-on-ray": ("num_training_workers: 2\n", ":6: ; mean runtime.workers?"),
    "key as after --set": (
        "tuning:\n  lora.r: 3\n",
        ":7: tuning.lora.r: no such key; in a file it is r: indented below tuning.lora:",
    ),
    "key like nothing": (
        "tracking:\n  zebra: 1\n",
        ":7: tracking.zebra: no such key; tracking has the keys tensorboard, log_every",
    ),
    "section like nothing": (
        "zebra: 1\n",
        ":6: zebra: no such key; a conf has the keys name, stages, runtime",
    ),
    "three levels down": (
        "tuning:\n  lora:\n    rang: 3\n",
        ":8: tuning.lora.rang: no such key; mean tuning.lora.r",
    ),
    "text for a number": (
        "training:\n  max_steps: four\n",
        ':7: training.max_steps is "four"; integer of at least 1',
    ),
    "text for a number or auto": (
        "training:\n  epochs: many\n",
        ':7: training.epochs is "many"; a number above 0 or auto',
    ),
    "a batch of sequences": (
        "training:\n  batch_size: 4\n  gradient_accumulation: 2\n",
        ":7: training.batch_size and training.gradient_accumulation counted packed sequences; "
        "training.global_batch_size; 8 × runtime.workers",
    ),
    "number too small": ("runtime:\n  workers: 0\n", ":7: runtime.workers is 0; at least 1"),
    "negative rate": ("training:\n  learning_rate: -1e-3\n", ":7: training.learning_rate is -0.001; a number above 0"),
    "infinite rate": ("training:\n  learning_rate: .inf\n", ":7: training.learning_rate is Infinity; a number above 0"),
    "fraction for an integer": ("training:\n  max_steps: 1.5\n", ":7: training.max_steps is 1.5; an integer"),
    "true for a number": ("runtime:\n  workers: true\n", ":7: runtime.workers is true; integer"),
    "number for a name": ("name: 7\nmodel: {base: b}\ndata: {train: train.jsonl}\n", ":1: name is 7; quotes: '7'"),
    "revision that YAML takes for a number": (
        "name: a\nmodel:\n  base: a/b\n  revision: 1234567\ndata: {train: train.jsonl}\n",
        ":4: model.revision is 1234567; quotes: '1234567'",
    ),
    "number or auto": (
        "runtime:\n  cpus_per_worker: all\n",
        ':7: runtime.cpus_per_worker is "all"; integer of at least 1 or auto',
    ),
    "choice misspelled": (
        "training:\n  schedule: cosin\n",
        ':7: training.schedule is "cosin"; cosine, linear or constant; mean cosine?',
    ),
    "choice in capitals": ("training:\n  precision: BF16\n", ':7: training.precision is "BF16"; mean bf16?'),
    "stage misspelled": ("stages:\n  - prepare\n  - trian\n", ':8: stages[1] is "trian"; mean train?'),
    "no stages": ("stages: []\n", ":6: stages is empty: name at least one of prepare"),
    "section twice": ("data:\n", ":6: data appears twice (first in line 4)"),
    "section without keys": (
        "training: fast\n",
        ':6: training is "fast"; a section with keys indented below training:',
    ),
    "list for a section": ("training:\n  - epochs: 3\n", ":6: training is [; a section"),
    "colon without blank": ("training:\n  epochs:3\n", ":6: training is; epochs: needs a space after the colon"),
    "list too long": ("training:\n  betas: [0.9, 0.99, 0.999]\n", ":7: training.betas is; a list of 2 numbers"),
    "required key in an optional section": (
        "training:\n  early_stopping: {}\n",
        ":7: training.early_stopping.patience is missing",
    ),
    "key twice": ("training:\n  epochs: 1\n  epochs: 2\n", ":8: training.epochs appears twice (first in line 7)"),
    "tab": ("training:\n\tepochs: 1\n", ":7: ; indent with spaces, not tabs"),
    "bad indentation": ("training:\n  epochs: 1\n   batch_size: 2\n", ":8: is not valid YAML"),
    "bracket not closed": ("stages: [prepare, train\n", "is not valid YAML"),
    "Jinja not closed": ("seed: {{ seed\n", "is not a valid Jinja template"),
    "no data": ("name: a\nmodel:\n  base: b\n", ": data.train is missing: Training data; --set data.train="),
    "data without train": ("name: a\nmodel: {base: b}\ndata:\n  format: text\n", ":3: data.train is missing"),
    "empty section that is required": ("name: a\nmodel:\ndata: {train: train.jsonl}\n", "model.base is missing"),
    "nothing required": ("name: a\n", "the conf has 2 errors; model.base is missing; data.train is missing"),
    "name with a blank": (
        "name: my run\nmodel: {base: b}\ndata: {train: train.jsonl}\n",
        ':1: name is "my run"; Letters, digits',
    ),
    "name that leaves the folder": (
        "name: ../../etc\nmodel: {base: b}\ndata: {train: train.jsonl}\n",
        ':1: name is "../../etc"',
    ),
    "empty list of data": ("name: a\nmodel: {base: b}\ndata:\n  train: []\n", ":4: data.train is empty"),
    "empty name of data": ("name: a\nmodel: {base: b}\ndata:\n  train: ''\n", ":4: data.train[0] is empty"),
    "number for data": (
        "name: a\nmodel: {base: b}\ndata:\n  train: 3\n",
        ":4: data.train is 3: it must be text or a list of texts",
    ),
    "no such file": (
        "name: a\nmodel: {base: b}\ndata:\n  train: trian.jsonl\n",
        ":4: data.train: no such file; confs/trian.jsonl or; elsewhere/trian.jsonl or; home/data/trian.jsonl; mean; "
        "confs/train.jsonl?",
    ),
    "one of the files": (
        "name: a\nmodel: {base: b}\ndata:\n  train:\n    - train.jsonl\n    - more.jsonl\n",
        ":6: data.train; more.jsonl",
    ),
    "no validation file": (
        "name: a\nmodel: {base: b}\ndata: {train: train.jsonl, validation: v.jsonl}\n",
        ":3: data.validation; v.jsonl",
    ),
    "no evaluation file": ("evaluation:\n  data: q.jsonl\n", ":7: evaluation.data; q.jsonl"),
    "whole number for a fraction": (
        "name: a\nmodel: {base: b}\ndata:\n  train: train.jsonl\n  validation: 20\n",
        ":5: data.validation is 20; between 0 and 1; null",
    ),
    "false for no validation": (
        "name: a\nmodel: {base: b}\ndata:\n  train: train.jsonl\n  validation: false\n",
        ":5: data.validation is false",
    ),
    "value of a free key": (
        "name: a\nmodel: {base: b}\ndata:\n  train: train.jsonl\n  columns: {text: 3}\n",
        ":5: data.columns.text is 3",
    ),
    "no model folder": (
        "name: a\nmodel:\n  base: ./my-model\ndata: {train: train.jsonl}\n",
        ":3: model.base: no such folder; my-model",
    ),
    "no chat template": (
        "name: a\nmodel:\n  base: b\n  chat_template: t.jinja\ndata: {train: train.jsonl}\n",
        ":4: model.chat_template: no such file; confs/t.jinja",
    ),
    "no processor file": (
        "name: a\nmodel: {base: b}\ndata:\n  train: train.jsonl\n  processor: ./p.py:P\n",
        ":5: data.processor: no such file; p.py",
    ),
    "processor without class": (
        "name: a\nmodel: {base: b}\ndata:\n  train: train.jsonl\n  processor: ./p.py\n",
        ":5: data.processor is ./p.py; ./p.py:MyProcessor",
    ),
    "epochs and steps": (
        "training:\n  epochs: 1\n  max_steps: 5\n",
        ":7: training.epochs and training.max_steps are both set",
    ),
    "foreign code": (
        "name: a\nmodel:\n  base: a/b\n  trust_remote_code: true\ndata: {train: train.jsonl}\n",
        ":4: model.trust_remote_code; add 'a/b' to model.trusted_models",
    ),
    "fsdp alone": ("training:\n  strategy: fsdp\n", ":7: training.strategy fsdp; runtime.workers is 1; use ddp"),
    "few bits and all weights": (
        "name: a\nmodel: {base: b, weights: int8}\ndata:\n  train: train.jsonl\ntuning:\n  method: full\n",
        ":2: model.weights int8; tuning.method full trains all of them: use tuning.method lora",
    ),
    "few bits and fsdp": (
        "name: a\nmodel: {base: b, weights: int4}\ndata:\n  train: train.jsonl\nruntime: {workers: 2}\ntraining:\n"
        "  strategy: fsdp\n",
        ":2: model.weights int4; training.strategy fsdp shards them: use training.strategy ddp",
    ),
    "few bits of a GGUF": (
        "name: a\nmodel: {base: b, weights: int4, gguf_file: m.gguf}\ndata:\n  train: train.jsonl\n",
        ":2: model.weights int4; model.gguf_file is a GGUF: import it first",
    ),
    "few bits and ipex": (
        "name: a\nmodel: {base: b, weights: int8}\ndata:\n  train: train.jsonl\ntraining:\n  accelerator: ipex\n",
        ":2: model.weights int8; training.accelerator ipex changes their layout: use accelerator torch",
    ),
    "ipex and all weights": (
        "training:\n  accelerator: ipex\ntuning:\n  method: full\n",
        ":7: training.accelerator ipex; use tuning.method lora and training.strategy ddp",
    ),
    "pretraining on questions": (
        "name: a\nmodel: {base: b}\ndata:\n  train: train.jsonl\n  format: alpaca\ntuning:\n  objective: pretrain\n",
        ":7: tuning.objective pretrain; data.format is alpaca",
    ),
    "answers in plain text": (
        "name: a\nmodel: {base: b}\ndata:\n  train: train.jsonl\n  format: text\n",
        ":5: tuning.objective sft; data.format is text",
    ),
    "early stopping without validation": (
        "name: a\nmodel: {base: b}\ndata:\n  train: train.jsonl\n  validation: null\ntraining:\n  early_stopping: "
        "{patience: 2}\n",
        ":7: training.early_stopping needs validation; data.validation is null",
    ),
    "kto with one row a step": (
        "tuning:\n  objective: kto\ntraining:\n  global_batch_size: 1\n",
        ":9: tuning.kto.loss kto compares each row with the others of its step; is 1: use 8 or more, or loss "
        "apo_zero_unpaired",
    ),
    "kto that learns from nothing": (
        "tuning:\n  kto:\n    desirable_weight: 0\n    undesirable_weight: 0\n",
        ":8: tuning.kto.desirable_weight and tuning.kto.undesirable_weight are both 0",
    ),
    "undefined variable": (
        "name: a\nmodel: {base: b}\ndata:\n  train: {{ train }}\n",
        ":4: data.train; variable train is not set; --set train=",
    ),
    "undefined environment variable": (
        "paths:\n  runs: {{ env.LLM_RAY_NOT }}/runs\n",
        ":7: paths.runs; environment variable LLM_RAY_NOT",
    ),
    "undefined variable in an expression": ("training:\n  seed: {{ seed + 1 }}\n", ":7:; variable seed is not set"),
    "sandbox": (
        "training:\n  seed: {{ ''.__class__.__mro__ }}\n",
        ":7: the template uses something the sandbox forbids",
    ),
    "include": ("{% include '/etc/passwd' %}\n", ":6: include, import and extends"),
    "a Python object": ("training: !!python/object/apply:os.system [id]\n", ":6: is not valid YAML for a conf"),
    "mere text": ("name\n", 'the conf is "name", not keys with values'),
    "nothing": ("# name: a\n", "the conf is empty"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_confs(case: str, write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLM_RAY_NOT", raising=False)
    text, words = BROKEN[case]
    file = write(text if text.startswith(("name", "#")) else SMALL + text)
    told = message(file)
    assert str(file) in told
    assert [word for word in words.split("; ") if word not in told] == [], told


def test_everything_wrong_is_told_at_once_by_line(write: Write) -> None:
    file = write(
        f"{SMALL}trainign: {{}}\ntraining:\n  max_steps: 0\n  lr: 1\nruntime:\n  mode: cloud\ncheckpoint:\n  keep: "
        f"{{{{ keep }}}}\n"
    )
    first, *lines = message(file).split("\n")
    assert first == "the conf has 5 errors:"
    assert [int(line.split(":")[1]) for line in lines] == [6, 8, 9, 11, 13]


def test_rules_between_sections_are_told_at_once_too(write: Write) -> None:
    told = message(
        write(f"{SMALL}  format: text\ntraining:\n  strategy: fsdp\n  early_stopping: {{patience: 1}}\n"),
        "data.validation=null",
    )
    for key in ("tuning.objective", "training.strategy", "training.early_stopping"):
        assert key in told


def test_lines_are_the_templates(write: Write) -> None:
    text = (
        "{# a comment\nover lines #}\n{% if false %}\nseed: 1\n{% endif %}\n"
        + SMALL
        + "{% for i in [1, 2] %}\n{% endfor %}\ntraining:\n  x: 1\n"
    )
    assert f":{text.count(chr(10))}: training.x" in message(write(text))


# Files ----------------------------------------------------------------------------------------------------------------


def test_no_such_conf(folder: Path) -> None:
    assert "Shipped: cluster, dpo, full, lora, pretrain, quickstart" in message("nowhere.yaml")
    assert "did you mean quickstart?" in message("qickstart")
    (folder / "support.yaml").touch()
    assert f"did you mean {folder}/support.yaml?" in message(folder / "suport.yaml")
    assert "this is a folder" in message(folder)


def test_unreadable_confs(folder: Path) -> None:
    (folder / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert "byte 9 is not UTF-8" in message(folder / "latin.yaml")


def test_a_byte_order_mark_does_no_harm(folder: Path) -> None:
    (folder / "windows.yaml").write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert load_finetune(folder / "windows.yaml").name == "trial"


def test_defaults(write: Write, folder: Path) -> None:
    conf = load_finetune(str(write(SMALL)))
    assert (conf.name, conf.model.base, conf.data.train) == (
        "trial",
        "smollm2-135m-instruct",
        (str(folder / "train.jsonl"),),
    )
    assert conf.paths.runs == folder.parent / "home" / "runs"
    assert conf.training.learning_rate == conf.training.epochs == conf.training.global_batch_size == "auto"


def test_sections_with_every_key_commented_out_have_their_defaults(write: Write) -> None:
    assert load_finetune(write(f"{SMALL}training:\n  # epochs: 3\ntuning:\n  lora:\n")) == load_finetune(write(SMALL))


def test_numbers_as_people_write_them(write: Write) -> None:
    conf = load_finetune(write(f"{SMALL}training:\n  learning_rate: 1e-3\n  eps: 1E-6\n  warmup: 100\n  epochs: 2\n"))
    assert (conf.training.learning_rate, conf.training.eps, conf.training.warmup, conf.training.epochs) == (
        1e-3,
        1e-6,
        100.0,
        2.0,
    )


@pytest.mark.parametrize(
    ("written", "value"), [("yes", True), ("no", False), ("on", True), ("off", False), ("true", True), ("False", False)]
)
def test_truth_as_people_write_it(write: Write, written: str, value: bool) -> None:
    assert load_finetune(write(f"{SMALL}  packing: {written}\n")).data.packing is value


# --set and variables --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.learning_rate=1e-3", "training", "learning_rate", 1e-3),
        ("training.learning_rate=2E-5", "training", "learning_rate", 2e-5),
        ("training.epochs=null", "training", "epochs", "auto"),
        ("training.max_grad_norm=", "training", "max_grad_norm", None),
        ("training.early_stopping.patience=2", "training", "early_stopping", {"patience": 2, "min_delta": 0.0}),
        ("training={seed: 7}", "training", "seed", 7),
        ("data.columns.prompt=question", "data", "columns", {"prompt": "question"}),
        ("data.processor_args={a: [1, b]}", "data", "processor_args", {"a": [1, "b"]}),
        ("data.system=Be kind=true", "data", "system", "Be kind=true"),
        ("data.packing=false", "data", "packing", False),
        ("tuning.lora.target_modules=[q_proj, v_proj]", "tuning", "lora", None),
        ("runtime.interface=eth0", "runtime", "interface", "eth0"),
    ],
)
def test_set(write: Write, override: str, section: str, key: str, value: object) -> None:
    found = load_finetune(write(f"{SMALL}training:\n  max_steps: null\n"), [override]).model_dump()[section][key]
    if key == "lora":
        assert found["target_modules"] == ("q_proj", "v_proj")
    else:
        assert found == value


def test_set_over_the_conf_and_the_last_one_wins(write: Write) -> None:
    conf = load_finetune(
        write(f"{SMALL}training:\n  epochs: 2\n"), ["training.epochs=3", "training.epochs=4", "name=other"]
    )
    assert (conf.training.epochs, conf.name) == (4.0, "other")


def test_variables_come_from_set_else_vars_else_default(write: Write, folder: Path) -> None:
    file = write(SMALL + "training:\n  seed: {{ seed | default(1) }}\n")
    first, second = folder / "first.yaml", folder / "second.yaml"
    first.write_text("seed: 2\nunused: {a: 1}\n")
    second.write_text("seed: 3\n")
    assert load_finetune(file).training.seed == 1
    assert load_finetune(file, vars_files=[first]).training.seed == 2
    assert load_finetune(file, vars_files=[first, second]).training.seed == 3
    assert load_finetune(file, ["seed=4"], [first, second]).training.seed == 4
    assert load_finetune(file, ["training.seed=5", "seed=4"], [first, second]).training.seed == 5


def test_a_variable_may_be_called_like_a_section(write: Write) -> None:
    file = write("name: trial\nmodel:\n  base: {{ model | default('a') }}\ndata: {train: train.jsonl}\n")
    assert load_finetune(file, ["model=b"]).model.base == "b"
    assert load_finetune(file, ["model.base=c"]).model.base == "c"


def test_a_key_that_is_set_needs_no_variable(write: Write, folder: Path) -> None:
    (folder.parent / "elsewhere" / "t.jsonl").touch()
    file = write(SMALL.replace("train.jsonl", "{{ train }}") + "# {{ comment }}\n")
    assert load_finetune(file, ["data.train=t.jsonl"]).data.train == (str(folder.parent / "elsewhere" / "t.jsonl"),)


def test_lists_as_variables(write: Write, folder: Path) -> None:
    (folder / "b #2.jsonl").touch()
    conf = load_finetune(
        write(SMALL.replace("train.jsonl", "{{ train | tojson }}")), ["train=[train.jsonl, 'b #2.jsonl']"]
    )
    assert conf.data.train == (str(folder / "train.jsonl"), str(folder / "b #2.jsonl"))


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.learning_rat=1", "did you mean training.learning_rate?"),
        ("sed=1", "did you mean seed?"),
        ("zebra=1", "its variables are: seed"),
        ("training.epochs", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("training.epochs=[1", "is not valid YAML"),
        ("training.epochs=many", '--set training.epochs=many: training.epochs is "many"'),
        ("training.lora.r=1", "did you mean tuning.lora.r?"),
        ("data.train=nowhere.jsonl", "--set data.train=nowhere.jsonl: data.train: no such file"),
    ],
)
def test_wrong_overrides(write: Write, override: str, words: str) -> None:
    told = message(write(SMALL + "training:\n  seed: {{ seed | default(1) }}\n"), override)
    assert told.startswith(f"--set {override}: ")
    assert words in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a\n", "names with values"),
        ("a: 1\na: 2\n", "v.yaml:2: a appears twice"),
        ("env: 1\n", "names with values, except env or shipped"),
    ],
)
def test_wrong_files_of_variables(write: Write, folder: Path, text: str, words: str) -> None:
    (folder / "v.yaml").write_text(text)
    assert words in message(write(SMALL), vars_files=(folder / "v.yaml",))
    assert "cannot be read" in message(write(SMALL), vars_files=(folder / "w.yaml",))


# Paths ----------------------------------------------------------------------------------------------------------------


def test_data_is_looked_up_beside_the_conf_then_here_then_under_paths_data(write: Write, folder: Path) -> None:
    file = write(SMALL)
    places = [folder, folder.parent / "elsewhere", folder.parent / "home" / "data"]
    for place in places:
        (place / "train.jsonl").touch()
    for place in places:
        assert load_finetune(file).data.train == (str(place / "train.jsonl"),)
        (place / "train.jsonl").unlink()


def test_folders_absolute_paths_and_home(write: Write, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    (folder / "many").mkdir()
    conf = load_finetune(write(SMALL), [f"data.train=[{folder}/many, ~/train.jsonl]"])
    assert conf.data.train == (str(folder / "many"), str(folder / "train.jsonl"))


@pytest.mark.parametrize("name", ["tatsu-lab/alpaca", "org/set:config", "org/set:config:test", "org/set::test"])
def test_hub_ids_stay(write: Write, name: str) -> None:
    assert load_finetune(write(SMALL), [f"data.train={name}"]).data.train == (name,)


def test_a_missing_file_in_a_folder_that_is_there_is_no_hub_id(write: Write, folder: Path) -> None:
    (folder / "sets").mkdir()
    assert "no such file" in message(write(SMALL.replace("train.jsonl", "sets/tickets")))


def test_folders_of_the_conf_are_relative_to_it(write: Write, folder: Path) -> None:
    conf = load_finetune(write(SMALL + "paths:\n  runs: ./runs\n"), ["paths.models=m"])
    assert conf.paths.runs == folder / "runs"
    assert conf.paths.models == folder.parent / "elsewhere" / "m"


def test_models(write: Write, folder: Path) -> None:
    (folder / "smollm2-135m-instruct").mkdir()
    (folder / "mine").mkdir()
    (folder / "mine" / "config.json").touch()
    file = write(SMALL)
    assert load_finetune(file).model.base == "smollm2-135m-instruct"  # the folder beside it holds no model
    assert load_finetune(write(SMALL.replace("smollm2-135m-instruct", "mine"))).model.base == str(folder / "mine")
    assert load_finetune(file, [f"model.base={folder}/mine"]).model.base == str(folder / "mine")
    assert load_finetune(file, ["model.base=Qwen/Qwen3-0.6B"]).model.base == "Qwen/Qwen3-0.6B"


def test_chat_template_and_processor_beside_the_conf(write: Write, folder: Path) -> None:
    for name in ("t.jinja", "p.py"):
        (folder / name).touch()
    conf = load_finetune(write(SMALL.replace("data:", "  chat_template: t.jinja\ndata:") + "  processor: ./p.py:P\n"))
    assert conf.model.chat_template == folder / "t.jinja"
    assert conf.data.processor == f"{folder}/p.py:P"
    assert load_finetune(write(SMALL), ["data.processor=wikitext"]).data.processor == "wikitext"
    assert load_finetune(write(SMALL), ["data.processor=my.package:P"]).data.processor == "my.package:P"


def test_a_trusted_model_stays_trusted_when_its_path_is_made_absolute(write: Write, folder: Path) -> None:
    (folder / "mine").mkdir()
    trusting = SMALL.replace("smollm2-135m-instruct", "./mine\n  trust_remote_code: true\n  trusted_models: [./mine]")
    conf = load_finetune(write(trusting))
    assert conf.model.base in conf.model.trusted_models
    assert load_finetune(write(dump(conf))) == conf


@pytest.mark.parametrize("name", ["~no-such-user/x", "x" * 300, "\0", "my.yaml/x.json"])
@pytest.mark.parametrize("key", ["data.train", "evaluation.data", "model.chat_template", "data.processor"])
def test_names_that_no_file_can_have(write: Write, key: str, name: str) -> None:
    value = f"{name}.py:P" if key == "data.processor" else name
    assert f"{key}: no such file" in message(write(SMALL), f'{key}="{value}"'.replace("\0", "\\0"))
    message(name)


# The resolved conf ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "name=x",
        "data.system={{ not a variable }} {% nor a tag %} {# nor a comment",
        "data.system=no",
        "data.system='1e-3'",
        "data.system='a: b # c'",
        'data.system="two\\nlines\\n"',
        "model.revision='0123'",
        "training.early_stopping={patience: 3, min_delta: 1e-4}",
        "training.learning_rate=1e-5",
        "data.processor_args={a: {b: [1, 2.5, null, true, x]}}",
        "evaluation.samples=null",
        "tuning.lora.target_modules=[q_proj]",
        "stages=train",
        "runtime.cpus_per_worker=4",
    ],
)
def test_a_dumped_conf_loads_to_the_same(write: Write, folder: Path, override: str) -> None:
    name, _, value = override.partition("=")
    if "{{" in value:
        override = f"{name}='{value}'"
    conf = load_finetune(write(SMALL), [override])
    assert load_finetune(write(dump(conf))) == conf


@pytest.mark.parametrize("text", ["{% endraw %}{{ env.HOME }}", "{%- endraw -%}", "{%+endraw%}"])
def test_no_text_of_a_dumped_conf_leaves_its_raw_block(write: Write, text: str) -> None:
    """What follows it would be a template, which may ask for the environment."""
    conf = load_finetune(write(SMALL))
    with pytest.raises(ConfError, match="endraw"):
        dump(conf.model_copy(update={"data": conf.data.model_copy(update={"system": text})}))


# Anything at all ------------------------------------------------------------------------------------------------------

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from(["", "a", "train.jsonl", "~x/y", "a/b", "*", "p.py:P", "\0"])
)
NAMES = (
    st.sampled_from(sorted({part for name in FINETUNE.table for part in name.split(".")}))
    | st.text(max_size=3)
    | st.integers()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=20
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, VALUES, max_size=6))
def test_any_yaml_is_a_conf_or_a_conf_error(write: Write, data: dict[object, object]) -> None:
    file = write(
        yaml.safe_dump(
            {"name": "x", "model": {"base": "b"}, "data": {"train": "train.jsonl"}} | data, allow_unicode=True
        )
    )
    try:
        load_finetune(file)
    except ConfError as error:
        assert "my.yaml" in str(error)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.sampled_from([*"{}[]:%#'\"&*!|>-?@` \n\t", "{{", "}}", "{%", "%}", " x ", "data", ": ", "\n  "]), max_size=12
    ).map("".join)
)
def test_any_text_is_a_conf_or_a_conf_error(write: Write, text: str) -> None:
    with pytest.raises(ConfError, match=r"my\.yaml"):
        load_finetune(write(text))
    with contextlib.suppress(ConfError):
        load_finetune(write(SMALL + text))
    with contextlib.suppress(ConfError):
        load_finetune(write(SMALL), [text, f"name={text}", f"data.system={text}"])


def test_the_package_ships_each_template_of_the_project_and_none_of_a_users_own() -> None:
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"][
        "force-include"
    ]
    tracked = subprocess.run(
        ["git", "ls-files", "conf"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert told == {name: f"llm_ray/shipped/{name}" for name in tracked}


def test_the_nearest_of_variables_and_keys_is_what_was_meant(write: Write) -> None:
    text = SMALL + "training: {epochs: {{ epochs | default(1) }}}\n"
    with pytest.raises(ConfError, match=r"traning.epochs is neither .* did you mean training\.epochs\?"):
        load_finetune(write(text), ["traning.epochs=2"])
    with pytest.raises(ConfError, match=r"epoch is neither .* did you mean epochs\?"):
        load_finetune(write(text), ["epoch=2"])
