"""A run is asked to end by another process than the one that works in it; a run is deleted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_ray.app.runs import stop_run
from llm_ray.cli.main import cli
from llm_ray.errors import RunError, Stopped
from llm_ray.runs.folder import stop_file
from tests.runs import opened_run
from tests.unit.runs.conftest import MakeConf


def test_the_wish_is_there_until_the_run_has_ended(make_conf: MakeConf) -> None:
    conf = make_conf("trial")
    with pytest.raises(Stopped), opened_run(conf, force=False) as run:
        assert stop_run(conf.paths.runs, "trial").state == "running"
        assert stop_file(run.path).exists()
        raise Stopped("trial: stopped at step 3 of 8 as asked")
    assert not stop_file(conf.run_dir).exists()
    with opened_run(conf, force=False) as run:
        assert run.lineage()["state"] == "running"


def test_a_wish_that_outlived_its_run_stops_no_other(make_conf: MakeConf) -> None:
    conf = make_conf("trial")
    with opened_run(conf, force=False):
        pass
    stop_file(conf.run_dir).parent.mkdir()
    stop_file(conf.run_dir).touch()
    with opened_run(conf, force=False) as run:
        assert not stop_file(run.path).exists()


def test_there_must_be_something_to_stop(make_conf: MakeConf) -> None:
    conf = make_conf("trial")
    with opened_run(conf, force=False):
        with pytest.raises(RunError, match=r"trial has not stopped within 0 s"):
            stop_run(conf.paths.runs, "trial", wait=0.01)
        with pytest.raises(RunError, match=r"no run trail .*did you mean trial"):
            stop_run(conf.paths.runs, "trail")
    with pytest.raises(RunError, match="trial is not running"):
        stop_run(conf.paths.runs, "trial")
    assert not stop_file(conf.run_dir).exists()


def test_the_command(make_conf: MakeConf, tmp_path: Path) -> None:
    conf = make_conf("trial")
    asked = ["runs", "stop", "trial", "--runs", str(conf.paths.runs)]
    with opened_run(conf, force=False):
        assert CliRunner().invoke(cli, asked).output.startswith("trial is stopping")
        assert json.loads(CliRunner().invoke(cli, [*asked, "--json"]).output)["state"] == "running"
    refused = CliRunner().invoke(cli, asked)
    assert (refused.exit_code, "is not running" in refused.output) == (1, True)


def test_a_run_is_deleted_when_no_process_works_in_it(make_conf: MakeConf) -> None:
    kept, conf = make_conf("kept"), make_conf("trial")
    for one in (kept, conf):
        with opened_run(one, force=False):
            (one.run_dir / "output").mkdir()
    command = ["runs", "delete", "trial", "--runs", str(conf.paths.runs)]
    with opened_run(conf, force=False):
        refused = CliRunner().invoke(cli, [*command, "--yes"])
        assert (refused.exit_code, "in use by process" in refused.output) == (1, True)
    assert CliRunner().invoke(cli, command, input="n\n").exit_code == 1
    assert (conf.run_dir / "output").is_dir()
    assert CliRunner().invoke(cli, command, input="y\n").exit_code == 0
    assert [path.name for path in conf.paths.runs.iterdir() if path.name != ".queue"] == ["kept"]
    unknown = CliRunner().invoke(cli, command)
    assert (unknown.exit_code, "no run trial" in unknown.output) == (1, True)
