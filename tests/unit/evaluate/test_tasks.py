"""Tasks of lm-eval: what a conf may name, when they count as done, and how their figures are shown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_ray.app.finetune import stage_inputs
from llm_ray.conf.finetune import Evaluation
from llm_ray.conf.load import load_finetune
from llm_ray.datafiles import is_task_path
from llm_ray.errors import ConfError
from llm_ray.evaluate.harness import check_installed, figures_of
from llm_ray.evaluate.stage import _write_report
from llm_ray.evaluate.tasks import _show, look_at_tasks, task_inputs
from llm_ray.progress import Silent
from llm_ray.runs.benchmarks import benchmark_lines, label, shown, whole
from tests.runs import base_of
from tests.unit.runs.conftest import MakeConf, make_conf

__all__ = ["make_conf"]

CONF = """\
name: trial
model: {base: smollm2-135m-instruct}
data: {train: train.jsonl}
evaluation:
  tasks: [%s]
"""
ROW = {
    "task": "arc_easy",
    "group": "",
    "metric": "acc",
    "filter": "none",
    "higher_is_better": True,
    "rows": 200,
    "fewshot": 0,
    "version": "1",
    "base": 0.25,
    "base_stderr": 0.0306,
    "finetuned": 0.5,
    "finetuned_stderr": None,
}
FOUND: dict[str, Any] = {  # as lm-eval 0.4.13 returns it
    "results": {
        "colours": {"alias": "colours", "sample_len": 8, "acc,none": 0.5, "acc_stderr,none": 0.1},
        "sums": {"alias": " - sums", "exact_match,strict": 0.25, "exact_match_stderr,strict": "N/A"},
        "all": {"alias": "all", "acc,none": 0.4, "acc_stderr,none": 0.05},
    },
    "groups": {"all": {"alias": "all", "acc,none": 0.4, "acc_stderr,none": 0.05}},
    "group_subtasks": {"all": ["sums"], "colours": []},
    "higher_is_better": {"colours": {"acc": True}, "sums": {"exact_match": True}},
    "n-samples": {"colours": {"original": 20, "effective": 8}, "sums": {"original": 9, "effective": 9}},
    "n-shot": {"colours": 2, "sums": 0},
    "versions": {"colours": 1.0, "sums": "Yaml"},
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path / "home"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    (tmp_path / "train.jsonl").write_text('{"prompt": "Q", "completion": "A"}\n')
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "parts.yaml").write_text("task: parts\ndataset_kwargs: {data_files: {test: parts.jsonl}}\n")
    return tmp_path


def conf_naming(folder: Path, tasks: str) -> Path:
    (folder / "my.yaml").write_text(CONF % tasks)
    return folder / "my.yaml"


@pytest.mark.parametrize(
    ("name", "local"),
    [
        ("arc_easy", False),
        ("mmlu", False),
        ("./a", True),
        ("a/b", True),
        ("a.yaml", True),
        ("~/a", True),
        ("a.yml", True),
    ],
)
def test_what_is_a_file_and_what_a_name(name: str, local: bool) -> None:
    assert is_task_path(name) is local


def test_files_are_found_beside_the_conf_and_names_stay(folder: Path) -> None:
    conf = load_finetune(conf_naming(folder, "arc_easy, tasks/parts.yaml, ./tasks"))
    assert conf.evaluation.tasks == ("arc_easy", str(folder / "tasks/parts.yaml"), str(folder / "tasks"))


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("./tasks/part.yaml", [":5: evaluation.tasks: no such task file or folder", "did you mean", "parts.yaml"]),
        ("arc_easy, arc_easy", ["evaluation.tasks names arc_easy twice"]),
        ('""', ["evaluation.tasks[0] is empty"]),
    ],
)
def test_what_cannot_be_a_task(folder: Path, tasks: str, words: list[str]) -> None:
    with pytest.raises(ConfError) as caught:
        load_finetune(conf_naming(folder, tasks))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("setting", [{"task_limit": 0}, {"task_fewshot": -1}])
def test_limits(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="greater than or equal"):
        Evaluation.model_validate(setting)


def test_without_lm_eval_the_command_that_installs_it_is_named(
    make_conf: MakeConf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_RAY_LM_EVAL_ENV", str(tmp_path / "none"))
    assert look_at_tasks(make_conf(), Silent()) == []
    with pytest.raises(
        ConfError, match=r"evaluation\.tasks needs lm-eval, which .*none does not contain.*setup-lm-eval"
    ):
        look_at_tasks(make_conf(evaluation={"tasks": ["arc_easy"]}), Silent())
    (tmp_path / "none" / "lm_eval-0.4.13.dist-info").mkdir(parents=True)
    (tmp_path / "none" / "lm_eval-0.4.13.dist-info" / "METADATA").write_text("Name: lm_eval\nVersion: 0.4.13\n")
    assert check_installed() == (tmp_path / "none", "0.4.13")


def test_a_change_of_what_a_task_reads_is_another_evaluation(make_conf: MakeConf, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    (tasks / "more").mkdir(parents=True)
    (tasks / "parts.yaml").write_text(
        "include: base\ntask: parts\ndataset_kwargs: {data_files: {test: more/*.jsonl, train: rows.csv}}\n"
        "doc_to_text: !function words.question\n"
    )
    read = {"base": "test_split: test\n", "more/a.jsonl": "{}\n", "rows.csv": "a\n", "words.py": "question = str\n"}
    for name, text in read.items():
        (tasks / name).write_text(text)
    conf = make_conf(evaluation={"tasks": [str(tasks / "parts.yaml")]})

    def evaluated() -> str:
        return stage_inputs(conf, base_of(conf))["evaluate"]

    before = evaluated()
    (tasks / "log.txt").write_text("not read")
    assert evaluated() == before
    for name, text in read.items():
        (tasks / name).write_text(text + "# changed\n")
        after = evaluated()
        assert after != before, name
        before = after
    (tasks / "more" / "b.jsonl").write_text("{}\n")
    assert evaluated() != before
    assert task_inputs(["arc_easy"]) == [[]]


def test_without_tasks_an_evaluation_is_what_it_was(make_conf: MakeConf) -> None:
    plain, limited = make_conf(), make_conf(evaluation={"task_limit": 3})
    assert stage_inputs(plain, base_of(plain)) == stage_inputs(limited, base_of(limited))


def test_figures_of_the_harness() -> None:
    rows = figures_of(FOUND)
    assert [(row["task"], row["group"], row["metric"], row["filter"]) for row in rows] == [
        ("all", "", "acc", "none"),
        ("colours", "", "acc", "none"),
        ("sums", "all", "exact_match", "strict"),
    ]
    colours, sums = rows[1:]
    assert (colours["value"], colours["stderr"], colours["rows"], colours["fewshot"]) == (0.5, 0.1, 8, 2)
    assert (sums["stderr"], sums["higher_is_better"], sums["version"]) == (None, True, "Yaml")


def test_how_figures_are_shown() -> None:
    part = ROW | {"task": "arc_part", "group": "arc_easy"}
    alone = ROW | {"task": "free", "group": "without_figures", "filter": "strict", "base": None}
    assert whole([ROW, part, alone]) == [ROW, alone]
    assert label(alone) == "free acc (strict)"
    assert (shown(None, None), shown(0.5, None), shown(0.25, 0.0306)) == ("–", "0.5", "0.25 ± 0.031")
    assert benchmark_lines([ROW, part]) == ["arc_easy acc: base 0.25 ± 0.031, finetuned 0.5"]


def test_the_report_has_a_table_of_them(make_conf: MakeConf) -> None:
    conf = make_conf(evaluation={"task_limit": 200, "task_chat_template": True})
    conf.run_dir.mkdir(parents=True)
    figures = {
        "base": {},
        "finetuned": {},
        "harness": "lm-eval 0.4.13",
        "tasks": [ROW, ROW | {"higher_is_better": None}],
    }
    _write_report(conf, figures, [], {"base": [], "finetuned": []})
    text = (conf.run_dir / "evaluation.md").read_text()
    assert "| arc_easy | acc, higher is better | 200 | 0 | 0.25 ± 0.031 | 0.5 |" in text
    assert "| arc_easy | acc | 200 |" in text
    assert (
        "Tasks of lm-eval 0.4.13, ± standard error; the first 200 rows of each task; prompts in the chat template."
        in text
    )
    _write_report(conf, figures | {"tasks": []}, [], {"base": [], "finetuned": []})
    assert "lm-eval" not in (conf.run_dir / "evaluation.md").read_text()


class Bar:
    def __init__(self) -> None:
        self.shown: tuple[int, int | None, str] = (0, None, "")

    def update(self, done: int, total: int | None = None, text: str = "") -> None:
        self.shown = done, total, text


def test_progress_counts_evaluations_and_tells_what_runs(tmp_path: Path) -> None:
    files = [tmp_path / f"{n}.json" for n in range(4)]
    files[0].touch()
    (tmp_path / ".base-0.progress").write_text('["/a/parts.yaml", 3, 24, "answers"]')
    (tmp_path / ".finetuned-0.progress").write_text('["arc_easy", 0, 0, ""]')
    (tmp_path / ".finetuned-1.progress").write_text("[")  # of storage that is read while it is written
    _show(bar := Bar(), files, len(files), tmp_path)
    assert bar.shown == (1, 4, "base: parts.yaml, 3 of 24 answers; finetuned: arc_easy")
