"""The command: finding verbs, messages and exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import llm_ray
from llm_ray.cli.main import COMMANDS, cli
from llm_ray.cli.options import config_options
from llm_ray.conf.load import load_finetune
from tests.unit.cli import failing

LLM_RAY = Path(sys.executable).parent / "llm-ray"


def run(*arguments: str) -> Result:
    """The command in this process."""
    return CliRunner().invoke(cli, arguments, prog_name="llm-ray")


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as users call it."""
    return subprocess.run(
        [LLM_RAY, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env={**os.environ, **environment},
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command that fails among the verbs, and a home that its report may go to."""
    monkeypatch.setitem(COMMANDS, "fail", ("tests.unit.cli.failing:fail", "Fails."))
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("LLM_RAY_DEBUG", raising=False)
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        ("conf", 2, "Error: my.yaml:3: data.train is missing\n"),
        ("train", 1, "Error: worker 1 was killed\n"),
        ("interrupt", 130, "\nInterrupted.\n"),
        ("abort", 1, "Aborted!\n"),
    ],
)
def test_failures(home: Path, failure: str, code: int, message: str) -> None:
    result = run("fail", failure)
    assert (result.exit_code, result.stderr, result.stdout) == (code, message, "")


@pytest.mark.parametrize(
    ("environment", "shown"), [({}, False), ({"LLM_RAY_DEBUG": "1"}, True), ({"PYTHONWARNINGS": "default"}, True)]
)
def test_what_libraries_warn_of_is_not_shown(environment: dict[str, str], shown: bool) -> None:
    """Neither here nor by processes that the command starts."""
    code = f"from llm_ray.cli import main; main.COMMANDS['fail'] = ('{failing.__name__}:fail', ''); main.main()"
    own = {**os.environ, "LLM_RAY_DEBUG": "0", "PYTHONPATH": str(Path(__file__).parents[3]), **environment}
    done = subprocess.run(
        [sys.executable, "-c", code, "fail", "warnings"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env=own,
    )
    assert done.returncode == 1
    if shown:
        assert done.stderr.count("raw words of Python") >= 2
    else:
        assert done.stderr == "Error: worker 1 was killed\n"


def test_wrong_use(home: Path) -> None:
    result = run("fail", "usage")
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: not so\n")
    assert run("fail").exit_code == 2
    assert run("fail", "conf", "--flag").exit_code == 2


@pytest.mark.parametrize(
    ("failure", "code", "error"),
    [
        ("conf", 2, "my.yaml:3: data.train is missing"),
        ("quoting", 1, "the log ends:\nValueError: no such row"),
        ("usage", 2, "not so"),
    ],
)
def test_programs_get_errors_as_json(home: Path, failure: str, code: int, error: str) -> None:
    result = run("--errors", "json", "fail", failure)
    assert (result.exit_code, result.stderr) == (code, "")
    assert json.loads(result.stdout) == {"error": error}


def test_a_defect_is_reported_in_a_file(home: Path) -> None:
    result = run("fail", "defect")
    assert result.exit_code == 1
    assert "Traceback" not in result.stderr
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "LLM_RAY_DEBUG=1" in result.stderr
    (report,) = (home / "logs").iterdir()
    assert str(report) in result.stderr
    assert "Traceback" in report.read_text()
    assert llm_ray.__version__ in report.read_text()


@pytest.mark.parametrize(
    ("failure", "told"),
    [("disk", "Error: /data/rows: No space left on device."), ("memory", "Error: not enough memory.")],
)
def test_what_the_machine_lacks_is_no_defect(home: Path, failure: str, told: str) -> None:
    result = run("fail", failure)
    assert result.exit_code == 1
    assert result.stderr.startswith(told)
    assert "a bug in" not in result.stderr and str(home / "logs") in result.stderr


def test_a_home_that_cannot_be_written_is_no_second_failure(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.write_text("a file where the folder would be")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    result = run("fail", "defect")
    assert result.exit_code == 1
    (report,) = (tmp_path / "temporary").iterdir()
    assert str(report) in result.stderr


@pytest.mark.parametrize("failure", ["conf", "defect"])
def test_debugging_shows_the_traceback(home: Path, monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    monkeypatch.setenv("LLM_RAY_DEBUG", "1")
    result = run("fail", failure)
    assert "Error: " in result.stderr
    assert "Traceback" in result.stderr


@pytest.mark.parametrize(
    ("typed", "meant"), [("finetun", "finetune"), ("fine-tune", "finetune"), ("modell", "model"), ("deploy", None)]
)
def test_unknown_verbs(typed: str, meant: str | None) -> None:
    result = run(typed)
    assert result.exit_code == 2
    assert f"No such command '{typed}'" in result.stderr
    assert meant is None or f"'{meant}'" in result.stderr


# As users call it -----------------------------------------------------------------------------------------------------


def test_version_and_help() -> None:
    assert process("--version").stdout == f"llm-ray, version {llm_ray.__version__}\n"
    helped = process("--help")
    assert helped.returncode == 0
    for verb in COMMANDS:
        assert f"\n  {verb}" in helped.stdout


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import json, sys\nfrom llm_ray.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    print(json.dumps(sorted({name.split('.')[0] for name in "
        "sys.modules})))"
    )
    shown = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    loaded = json.loads(shown.stdout.splitlines()[-1])
    assert not {"torch", "ray", "transformers", "datasets", "pydantic", "yaml", "jinja2", "vllm"} & set(loaded)


@pytest.mark.parametrize("verb", ["finetune", "data"])
def test_a_broken_conf_ends_a_verb_with_code_2(tmp_path: Path, verb: str) -> None:
    conf = tmp_path / "my.yaml"
    conf.write_text("name: my\nmodel: {base: b}\ndata:\n  trian: x\n")
    words = ["finetune", "--dry-run"] if verb == "finetune" else ["data", "preview"]
    done = process(*words, "--config", str(conf), LLM_RAY_HOME=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("Error: the conf has 2 errors:\n")
    assert f"{conf}:4: data.trian: no such key; did you mean data.train?" in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_no_conf_is_wrong_use() -> None:
    done = process("data", "preview")
    assert done.returncode == 2
    assert "--config" in done.stderr


# Every command --------------------------------------------------------------------------------------------------------


def commands(group: click.Command, context: click.Context) -> Iterator[tuple[str, click.Command]]:
    """Every command below `group` with its full name."""
    if isinstance(group, click.Group):
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            assert command, name
            inner = click.Context(command, parent=context, info_name=name)
            yield inner.command_path, command
            yield from commands(command, inner)


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_command_has_help_with_an_example(verb: str) -> None:
    context = click.Context(cli, info_name="llm-ray")
    command = cli.get_command(context, verb)
    assert command
    inner = click.Context(command, parent=context, info_name=verb)
    for path, each in [(f"llm-ray {verb}", command), *commands(command, inner)]:
        assert "llm-ray" in (each.help or ""), f"{path}: its help has no example"
        for parameter in each.params:
            assert not isinstance(parameter, click.Option) or parameter.help, f"{path} {parameter.opts}: no help"


def test_the_reference_is_up_to_date() -> None:
    check = subprocess.run(
        [sys.executable, "-m", "llm_ray.cli.reference", "--check"], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stderr


# Shared options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--config", "--config_path"])
def test_config_options_are_the_arguments_of_load_finetune(tmp_path: Path, flag: str) -> None:
    @click.command()
    @config_options
    def show(config: str, overrides: tuple[str, ...], vars_files: tuple[str, ...]) -> None:
        conf = load_finetune(config, overrides, vars_files)
        click.echo(f"{conf.name} {conf.training.epochs} {conf.training.seed}")

    (tmp_path / "train.jsonl").touch()
    (tmp_path / "v.yaml").write_text("seed: 3\n")
    (tmp_path / "my.yaml").write_text(
        "name: my\nmodel: {base: b}\ndata: {train: train.jsonl}\ntraining: {seed: {{ seed }}}\n"
    )
    arguments = [
        flag,
        str(tmp_path / "my.yaml"),
        "--set",
        "training.epochs=2",
        "--set",
        "name=other",
        "--vars",
        str(tmp_path / "v.yaml"),
    ]
    result = CliRunner().invoke(show, arguments)
    assert result.stdout == "other 2.0 3\n"
    assert CliRunner().invoke(show, []).exit_code == 2
