"""API keys: what is kept of them, and that changes hold at once."""

from __future__ import annotations

import json
import multiprocessing
import re
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from llm_ray.cli.main import cli
from llm_ray.conf.serve import Limits
from llm_ray.errors import ServeError
from llm_ray.serve.protect.keys import Keys, add_key, effective, list_keys, revoke_key


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve" / "keys.json"


def test_a_key_opens_and_its_secret_is_kept_nowhere(file: Path) -> None:
    key, secret = add_key(file, "alice", Limits(concurrent=2), ("m",))
    assert Keys(file).check(secret) == key
    assert secret not in file.read_text()
    assert secret.rpartition("-")[2] not in file.read_text()
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.fixture(scope="module")
def with_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[Keys, str]:
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    _, secret = add_key(path, "alice", Limits())
    return Keys(path), secret


@given(st.text())
def test_nothing_else_opens(with_one: tuple[Keys, str], guess: str) -> None:
    assert with_one[0].check(guess) is None


@pytest.mark.parametrize(
    "change", [lambda s: s[:-1], lambda s: s + "x", lambda s: s.replace("llmray", "other"), lambda s: s.upper(), lambda s: ""]
)
def test_nearly_the_same_does_not_open(with_one: tuple[Keys, str], change: object) -> None:
    assert with_one[0].check(change(with_one[1])) is None  # type: ignore[operator]


def test_changes_hold_at_once(file: Path) -> None:
    keys = Keys(file)
    assert keys.check("anything") is None
    _, first = add_key(file, "first", Limits())
    assert keys.check(first)
    _, second = add_key(file, "second", Limits())
    assert keys.check(first)
    assert keys.check(second)
    revoke_key(file, "first")
    assert keys.check(first) is None
    assert keys.check(second)


def test_a_key_expires(file: Path) -> None:
    _, secret = add_key(file, "old", Limits(), expires=time.time() - 1)
    assert Keys(file).check(secret) is None
    add_key(file, "old", Limits())  # its name is free again


@pytest.mark.parametrize("break_it", [lambda f: f.write_text("{"), lambda f: f.unlink(), lambda f: f.chmod(0o644)])
def test_a_file_that_cannot_be_trusted_opens_nothing(file: Path, break_it: object) -> None:
    _, secret = add_key(file, "alice", Limits())
    keys = Keys(file)
    assert keys.check(secret)
    time.sleep(0.01)
    break_it(file)  # type: ignore[operator]
    assert Keys(file).check(secret) is None
    if not file.exists() or file.read_text() == "{":
        assert keys.check(secret) is None


def test_a_readable_file_is_told(file: Path) -> None:
    add_key(file, "alice", Limits())
    file.chmod(0o644)
    with pytest.raises(ServeError, match=r"can be read by others \(mode 644\): chmod 600"):
        list_keys(file)


def test_a_damaged_file_is_told_and_not_overwritten(file: Path) -> None:
    add_key(file, "alice", Limits())
    file.write_text("nonsense")
    with pytest.raises(ServeError, match="holds no API keys"):
        add_key(file, "bob", Limits())
    assert file.read_text() == "nonsense"


def test_names_are_told_apart(file: Path) -> None:
    key, _ = add_key(file, "alice", Limits())
    with pytest.raises(ServeError, match="there is a key called alice already"):
        add_key(file, "alice", Limits())
    with pytest.raises(ServeError, match="no key called bob; there are: alice"):
        revoke_key(file, "bob")
    assert revoke_key(file, key.id) == key


def _add(path: Path, name: str) -> None:
    add_key(path, name, Limits())


def test_two_writers_lose_nothing(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add, args=(file, f"k{i}")) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert {key.name for key in list_keys(file)} == {f"k{i}" for i in range(8)}


def test_a_keys_own_limits_come_first(file: Path) -> None:
    key, _ = add_key(file, "alice", Limits(concurrent=2))
    assert effective(key, Limits(concurrent=9, max_tokens=5)) == Limits(concurrent=2, max_tokens=5)
    assert effective(None, Limits(concurrent=9)) == Limits(concurrent=9)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path))
    run = CliRunner().invoke
    added = run(cli, ["serve", "keys", "add", "alice", "--requests-per-minute", "60", "--expires", "30d", "--model", "m"])
    assert added.exit_code == 0
    assert re.fullmatch(r"llmray-[0-9a-f]{8}-[\w-]{43}\n", added.stdout)
    (told,) = json.loads(run(cli, ["serve", "keys", "list", "--json"]).stdout)
    assert (told["name"], told["models"], told["limits"]["requests_per_minute"], told["expired"]) == ("alice", ["m"], 60, False)
    assert added.stdout.strip() not in run(cli, ["serve", "keys", "list"]).output
    assert run(cli, ["serve", "keys", "revoke", "alice"]).exit_code == 0
    assert run(cli, ["serve", "keys", "revoke", "alice"]).exit_code == 1
    assert run(cli, ["serve", "keys", "add", "x", "--expires", "soon"]).exit_code == 2
