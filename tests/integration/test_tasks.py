"""Tasks of lm-eval before and after a finetune: the harness's own figures, told as they come, and not repeated."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llm_ray.apart import apart
from llm_ray.conf.finetune import Evaluation
from llm_ray.errors import LlmRayError
from llm_ray.evaluate.harness import check_installed, check_tasks
from llm_ray.runs.folder import ask_to_stop
from tests.integration.tiny import llama

LLM_RAY = str(Path(sys.executable).with_name("llm-ray"))
PATIENCE = 240
CONF = """
name: {{ name | default("parts") }}
model: {base: {{ model }}}
data: {train: rows.jsonl, validation: null, max_length: 96}
tuning: {lora: {r: 4}}
training: {max_steps: 4, global_batch_size: 4, learning_rate: 3e-2, precision: fp32}
evaluation: {samples: 2, max_new_tokens: 8, tasks: [./tasks, ./chats/continues.yaml]}
"""
DATA = """
dataset_path: json
dataset_kwargs: {data_files: {test: parts.jsonl}}
test_split: test
fewshot_split: test
doc_to_text: "Which part is {{number}}?\\nAnswer:"
"""
CHOICES = """
include: _data
task: parts_choices
output_type: multiple_choice
doc_to_choice: parts
doc_to_target: right
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: brier_score}]
metadata: {version: 3}
"""
ANSWERS = """
include: _data
task: parts_answers
output_type: generate_until
doc_to_target: !function words.sentence
generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: chrf}, {metric: exact_match}]
"""
CONTINUES = """
task: continues
dataset_path: json
dataset_kwargs: {data_files: {test: ../tasks/parts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "Code {{number}} is a worn {{parts[right]}}."
metric_list: [{metric: word_perplexity}]
"""
GROUP = """
group: all_parts
task: [parts_choices, parts_answers]
"""


@pytest.fixture(scope="module")
def home(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("tasks")
    llama(home / "tiny", smollm2, initializer_range=0.02)
    parts = ["belt", "seal", "fan"]
    rows = [
        {"prompt": f"What is code {n}?", "completion": f"Code {n} is a worn {part}."}
        for n, part in enumerate(parts * 4)
    ]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "conf.yaml.j2").write_text(CONF)
    for folder in ("tasks", "chats"):
        (home / folder).mkdir()
    docs = [{"number": n, "parts": parts, "right": n % 3} for n in range(24)]
    (home / "tasks" / "parts.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (home / "tasks" / "_data").write_text(DATA)
    (home / "tasks" / "choices.yaml").write_text(CHOICES)
    (home / "tasks" / "answers.yaml").write_text(ANSWERS)
    (home / "tasks" / "group.yaml").write_text(GROUP)
    (home / "tasks" / "words.py").write_text(
        "def sentence(doc):\n    return f\"Code {doc['number']} is a worn {doc['parts'][doc['right']]}.\"\n"
    )
    (home / "chats" / "continues.yaml").write_text(CONTINUES)
    return home


def command(home: Path, *arguments: str) -> list[str]:
    return [LLM_RAY, *arguments, "--config", "conf.yaml.j2", "--set", f"model={home / 'tiny'}"]


def surroundings(home: Path) -> dict[str, str]:
    return {**os.environ, "LLM_RAY_HOME": str(home), "HF_HUB_OFFLINE": "1", "HF_HOME": str(home / "cache")}


def finetune(home: Path, *arguments: str, code: int = 0) -> str:
    done = subprocess.run(
        [*command(home, "finetune"), *arguments],
        cwd=home,
        env=surroundings(home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def halted(home: Path) -> str:
    """What is told by a run that is stopped while its first task runs."""
    run = home / "runs" / "parts"
    with subprocess.Popen(
        command(home, "finetune"), cwd=home, env=surroundings(home), stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr
        lines: list[str] = []
        reader = threading.Thread(target=lambda: lines.extend(process.stderr or ()))
        reader.start()
        end = time.monotonic() + PATIENCE
        while not [*run.glob("tasks/.*.progress")] and time.monotonic() < end and process.poll() is None:
            time.sleep(0.05)
        ask_to_stop(run)
        code = process.wait(PATIENCE)
        reader.join()
    assert code == 130, lines
    return "".join(lines)


@pytest.fixture(scope="module")
def told(home: Path, halted: str) -> str:
    """What the same command tells that goes on."""
    return finetune(home)


def rows(home: Path, name: str = "parts") -> dict[tuple[str, str], dict[str, Any]]:
    result = json.loads((home / "runs" / name / "result.json").read_text())
    return {(row["task"], row["metric"]): row for row in result["evaluation"]["tasks"]}


def by_the_harness(home: Path, model: Path, task: str, folder: str) -> dict[str, float]:
    """What lm-eval's own command makes of a model's folder."""
    harness, _ = check_installed()
    output = home / "harness"
    settings = {
        "model": "hf",
        "model_args": f"pretrained={model},dtype=float32",
        "device": "cpu",
        "batch_size": "8",
        "tasks": task,
        "include_path": ".",
        "output_path": str(output / "result.json"),
    }
    options = [word for name, value in settings.items() for word in (f"--{name}", value)]
    subprocess.run(
        [sys.executable, "-m", "lm_eval", "run", *options],
        cwd=home / folder,
        env={**surroundings(home), "PYTHONPATH": str(harness)},
        capture_output=True,
        check=True,
    )
    (file,) = output.rglob("result*.json")
    found: dict[str, Any] = json.loads(file.read_text())["results"][task]
    file.unlink()
    return {key.removesuffix(",none"): value for key, value in found.items() if key.endswith(",none")}


@pytest.mark.long  # two starts of lm-eval's own command for each
@pytest.mark.parametrize(
    ("task", "folder", "metrics"),
    [
        ("parts_choices", "tasks", ["acc", "acc_norm", "brier_score"]),
        ("parts_answers", "tasks", ["chrf", "exact_match"]),
        ("continues", "chats", ["word_perplexity"]),
    ],
)
def test_the_figures_are_those_of_the_harnesss_own_command(
    home: Path, told: str, task: str, folder: str, metrics: list[str]
) -> None:
    figures = rows(home)
    for which, model in (("base", home / "tiny"), ("finetuned", home / "runs" / "parts" / "output")):
        own = by_the_harness(home, model, task, folder)
        for metric in metrics:
            row = figures[task, metric]
            assert row[which] == pytest.approx(own[metric], rel=1e-4), (which, metric)
            if isinstance(own.get(f"{metric}_stderr"), float):
                assert row[f"{which}_stderr"] == pytest.approx(own[f"{metric}_stderr"], rel=1e-3)
    assert figures[task, metrics[-1]]["base"] != figures[task, metrics[-1]]["finetuned"] or metrics[-1] == "exact_match"


def test_what_is_told_and_where_it_stands(home: Path, told: str) -> None:
    assert re.search(
        r"tasks of lm-eval 0\.4\.\d+, on the model before and after: .*tasks \(.*parts_answers.*\): 48", told
    )
    assert re.search(r"parts_choices acc: base 0\.\d+ ± [\d.]+, finetuned 0\.\d+", told)
    assert "tasks of lm-eval 4/4" in told, told
    choices = rows(home)["parts_choices", "acc"]
    assert (choices["rows"], choices["fewshot"], choices["version"]) == (24, 0, "3")
    run = home / "runs" / "parts"
    assert re.search(r"\| parts_choices .*\| acc, higher is better \| 24 \| 0 \| ", (run / "evaluation.md").read_text())
    card = (run / "output" / "README.md").read_text()
    assert "| parts_choices acc |" in card
    assert "Benchmarks with lm-eval 0.4." in card
    assert not [*(run / "tasks").glob(".*")], "progress is not kept"


@pytest.mark.long  # the stage evaluate once more
def test_what_is_known_is_not_evaluated_again(home: Path, told: str) -> None:
    files = sorted((home / "runs" / "parts" / "tasks").iterdir())
    made = {file: file.stat().st_mtime_ns for file in files}
    assert len(made) == 4
    # As after a break in the middle of the stage.
    for file in files:
        if file.name.startswith("finetuned"):
            file.unlink()
    lineage = json.loads((home / "runs" / "parts" / "run.json").read_text())
    del lineage["stages"]["evaluate"]["finished"]
    (home / "runs" / "parts" / "run.json").write_text(json.dumps(lineage))
    figures = rows(home)
    assert "2 of 4 evaluations are known from before" in finetune(home)
    for file, at in made.items():
        assert (file.stat().st_mtime_ns == at) == file.name.startswith("base")
    assert rows(home) == figures


def test_the_lock_has_all_that_lm_eval_needs() -> None:
    folder, _ = check_installed()
    added = {canonicalize_name(d.name): d for d in metadata.distributions(path=[str(folder)])}
    own = sysconfig.get_path("purelib")  # not sys.path, to which evaluating in this process adds
    here = {canonicalize_name(d.name) for d in metadata.distributions(path=[own])}
    assert not added.keys() & here, "a package of the environment's own would be hidden, or another version used"
    for distribution in added.values():
        for text in distribution.requires or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                assert canonicalize_name(needed.name) in added.keys() | here, f"{distribution.name} needs {needed}"


def test_a_request_to_stop_ends_it(halted: str) -> None:
    assert "stopped during the tasks of the evaluation as requested" in halted


def test_a_dry_run_says_what_is_wrong_with_a_task(home: Path) -> None:
    seen = finetune(home, "--dry-run", "--set", "name=wrong", "--set", "evaluation.tasks=arc_esy", code=2)
    assert "evaluation.tasks: lm-eval has no task, group or tag arc_esy; did you mean arc_easy?" in seen
    assert not (home / "runs" / "wrong").exists()


def test_what_cannot_be_run_is_told_with_its_name(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(home / "cache"))
    whole = CHOICES.replace("include: _data", DATA).replace("parts.jsonl", str(home / "tasks" / "parts.jsonl"))
    wrong = {
        "broken": ("task: [broken", r"broken\.yaml cannot be read: .*expected"),
        "none": ("dataset_path: json", r"none\.yaml has neither a task nor a group"),
        "lost": (
            whole.replace("parts.jsonl", "lost.jsonl"),
            r"lost\.yaml needs a file that is not here: .*lost\.jsonl",
        ),
        "column": (whole.replace("{{number}}", "{{numbre | upper(3)}}"), r"column\.yaml: "),
        "metric": (
            whole.replace("acc_norm", "acc_nrom"),
            r"metric\.yaml: .*acc_nrom not found in the evaluate library",
        ),
        "unsafe": (
            whole + "unsafe_code: true\n",
            r"unsafe\.yaml: the task parts_choices runs code that the model writes",
        ),
    }
    for name, (text, words) in wrong.items():
        (home / f"{name}.yaml").write_text(text)
        assert re.search(rf"evaluation\.tasks: .*{words}", reason(str(home / f"{name}.yaml"))), name
    hub = r"evaluation\.tasks: arc_easy needs data from the hub.*HF_HUB_OFFLINE disables downloads"
    assert re.search(hub, reason("arc_easy"))
    twice = reason(str(home / "tasks"), str(home / "tasks" / "choices.yaml"))
    assert re.search("both contain the task parts_choices: remove one of them", twice)


def reason(*tasks: str) -> str:
    with pytest.raises(LlmRayError) as caught, apart(check_tasks, Evaluation(tasks=tasks)) as work:
        work.result()
    return str(caught.value)
