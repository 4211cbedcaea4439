"""API keys: what is kept of them, and that changes hold at once."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from llm_ray.cli.keys import _SCOPE
from llm_ray.cli.main import cli
from llm_ray.conf.serve import Limits
from llm_ray.errors import ConfError, ServeError
from llm_ray.serve.gateway.protect.keys import (
    Keys,
    Scope,
    add_key,
    effective,
    import_keys,
    list_keys,
    new_secret,
    revoke_key,
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "serve" / "keys.json"


def test_a_key_opens_and_its_secret_is_kept_nowhere(file: Path) -> None:
    key, secret = add_key(file, "alice", Limits(concurrent=2), ("m",))
    assert Keys(file).check(secret) == key
    assert secret not in file.read_text()
    assert secret.partition(key.id)[2][1:] not in file.read_text()
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
    "change",
    [lambda s: s[:-1], lambda s: s + "x", lambda s: s.replace("llmray", "other"), lambda s: s.upper(), lambda s: ""],
)
def test_nearly_the_same_does_not_open(with_one: tuple[Keys, str], change: object) -> None:
    assert with_one[0].check(change(with_one[1])) is None


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


def test_keys_of_a_vault_are_kept_and_exchanged_and_others_stay(file: Path) -> None:
    _, own = add_key(file, "own", Limits())
    first, second = new_secret(), new_secret()
    assert import_keys(file, {"alice": first, "bob": second}) == ["alice", "bob"]
    assert import_keys(file, {"alice": first, "bob": second}) == []
    keys = Keys(file)
    assert all(keys.check(secret) for secret in (own, first, second))
    other = new_secret()
    assert import_keys(file, {"alice": other}) == ["alice"]
    assert [bool(keys.check(secret)) for secret in (own, first, second, other)] == [True, False, True, True]
    assert other not in file.read_text()


def test_an_exchanged_key_keeps_its_limits(file: Path) -> None:
    add_key(file, "alice", Limits(concurrent=2), ("m",), expires=time.time() - 1)
    secret = new_secret()
    assert import_keys(file, {"alice": secret}) == ["alice"]
    key = Keys(file).check(secret)
    assert key
    assert (key.limits.concurrent, key.models, key.expires) == (2, ("m",), None)


@pytest.mark.parametrize("secret", ["", "sk-12345", "llmray-00000000-short", 7, None])
def test_what_is_no_key_is_refused(file: Path, secret: object) -> None:
    with pytest.raises(
        ConfError, match="alice was not created by llm-ray: create one with llm-ray serve keys generate"
    ) as error:
        import_keys(file, {"alice": secret})  # type: ignore[dict-item]
    assert not secret or str(secret) not in str(error.value)
    assert not file.exists()


def test_the_same_key_under_two_names_is_refused(file: Path) -> None:
    secret = new_secret()
    with pytest.raises(ConfError, match="two names have the same key"):
        import_keys(file, {"alice": secret, "bob": secret})
    import_keys(file, {"alice": secret})
    with pytest.raises(ServeError, match="already exists under the name alice"):
        import_keys(file, {"bob": secret})


def test_keys_come_by_standard_input(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(file.parents[1]))
    printed = CliRunner().invoke(cli, ["serve", "keys", "generate"]).output
    told = CliRunner().invoke(
        cli, ["serve", "keys", "import"], input=json.dumps({"alice": printed})
    )  # as a vault keeps what came by a pipe
    assert (told.exit_code, told.output) == (0, "kept: alice\n")
    made = printed.strip()
    assert Keys(file).check(made)
    assert (
        CliRunner().invoke(cli, ["serve", "keys", "import"], input=json.dumps({"alice": made})).output == "unchanged\n"
    )
    for wrong in ("{", "[]", '"x"'):
        told = CliRunner().invoke(cli, ["serve", "keys", "import"], input=wrong)
        assert told.exit_code == 2
        assert "standard input" in told.output


def _open_to_others(path: Path) -> None:
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:  # the clock of files is coarse
        path.chmod(0o640)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda f: f.write_text("{"), "contains no valid API keys"),
        (lambda f: f.write_text('{"a": {"id": "a"}}'), "contains no valid API keys"),
        (lambda f: f.unlink(), "does not exist: llm-ray serve keys add"),
        (_open_to_others, r"is open to others \(mode 640\): chmod 600"),
        (lambda f: f.rename(f.with_name("moved")) and f.mkdir(mode=0o700), "cannot be read: Is a directory"),
    ],
)
def test_a_file_that_cannot_be_trusted_opens_nothing_and_is_told_once(
    file: Path, caplog: pytest.LogCaptureFixture, break_it: Callable[[Path], object], said: str
) -> None:
    _, secret = add_key(file, "alice", Limits())
    before = Keys(file)
    assert before.check(secret)
    break_it(file)
    for keys in (before, Keys(file)):
        caplog.clear()
        assert [keys.check(secret) for _ in range(3)] == [None] * 3
        (record,) = caplog.records
        assert re.search(f"No API key is accepted: .*{said}", record.message)
        assert secret not in record.message


def test_a_file_that_is_mended_opens_again(file: Path) -> None:
    _, secret = add_key(file, "alice", Limits())
    keys = Keys(file)
    text = file.read_text()
    for broken in ("", "{", text[:-20]):
        file.write_text(broken)
        assert keys.check(secret) is None
        file.write_text(text)
        assert keys.check(secret)


def test_a_folder_in_which_others_can_exchange_the_file_is_not_trusted(file: Path) -> None:
    _, secret = add_key(file, "alice", Limits())
    file.parent.chmod(0o770)
    assert Keys(file).check(secret) is None
    with pytest.raises(ServeError, match=r"others can replace files in .* \(mode 770\): chmod 700"):
        list_keys(file)
    file.parent.chmod(0o755)
    assert Keys(file).check(secret)


def test_it_is_looked_at_once_for_a_request_and_read_when_it_changed(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, secret = add_key(file, "alice", Limits())
    keys = Keys(file)
    assert keys.check(secret)
    looked = []
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda path: looked.append(path) or stat(path))
    monkeypatch.setattr(Path, "open", None)
    assert keys.check(secret)
    assert looked == [file]


def test_a_file_that_is_open_to_others_is_told(file: Path) -> None:
    add_key(file, "alice", Limits())
    file.chmod(0o644)
    with pytest.raises(ServeError, match=r"is open to others \(mode 644\): chmod 600"):
        list_keys(file)


def test_a_damaged_file_is_told_and_not_overwritten(file: Path) -> None:
    add_key(file, "alice", Limits())
    file.write_text("nonsense")
    with pytest.raises(ServeError, match="contains no valid API keys"):
        add_key(file, "bob", Limits())
    assert file.read_text() == "nonsense"


def test_names_are_told_apart(file: Path) -> None:
    key, _ = add_key(file, "alice", Limits())
    with pytest.raises(ServeError, match="a key called alice already exists"):
        add_key(file, "alice", Limits())
    with pytest.raises(ServeError, match="no key called bob; there are: alice"):
        revoke_key(file, "bob")
    with pytest.raises(ServeError, match="already"):
        add_key(file, key.id, Limits())  # as a name it would hide the other's id
    assert revoke_key(file, key.id) == key


@pytest.mark.parametrize("name", ["", "  ", "two\nlines", "\x1b[2J", "x" * 65])
def test_names_that_cannot_be_shown_are_refused(file: Path, name: str) -> None:
    with pytest.raises(ConfError, match="is not a valid key name"):
        add_key(file, name, Limits())
    assert not file.exists()


def test_an_expired_key_and_its_successor_are_told_apart(file: Path) -> None:
    old, _ = add_key(file, "alice", Limits(), expires=time.time() - 1)
    new, secret = add_key(file, "alice", Limits())
    with pytest.raises(ServeError, match=f"2 keys are called alice: choose one by its id .*{old.id}, {new.id}"):
        revoke_key(file, "alice")
    assert revoke_key(file, old.id) == old
    assert Keys(file).check(secret) == new


def test_what_cannot_be_written_leaves_the_keys_as_they_were(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, secret = add_key(file, "alice", Limits())
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ServeError, match=r"keys\.json cannot be written: No space left on device"):
        add_key(file, "bob", Limits())
    assert file.read_bytes() == before
    assert {path.name for path in file.parent.iterdir()} == {"keys.json", "keys.lock"}
    assert Keys(file).check(secret)


@pytest.mark.root
def test_what_root_writes_belongs_to_the_owner_of_the_folder(file: Path) -> None:
    file.parent.mkdir(mode=0o700)
    os.chown(file.parent, 12345, 12346)
    add_key(file, "alice", Limits())
    assert {(path.stat().st_uid, path.stat().st_gid) for path in file.parent.iterdir()} == {(12345, 12346)}


def _add(path: Path, name: str) -> None:
    add_key(path, name, Limits())


def test_two_writers_lose_nothing(file: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_add, args=(file, f"k{i}")) for i in range(8)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    assert {key.name for key in list_keys(file)} == {f"k{i}" for i in range(8)}


def test_a_keys_own_limits_come_first(file: Path) -> None:
    key, _ = add_key(file, "alice", Limits(concurrent=2))
    assert effective(key, Limits(concurrent=9, max_tokens=5)) == Limits(concurrent=2, max_tokens=5)
    assert effective(None, Limits(concurrent=9)) == Limits(concurrent=9)


def test_the_commands_know_every_scope() -> None:
    assert tuple(_SCOPE.choices) == get_args(Scope)


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path))
    run = CliRunner().invoke
    added = run(
        cli, ["serve", "keys", "add", "alice", "--requests-per-minute", "60", "--expires", "30d", "--model", "m"]
    )
    assert added.exit_code == 0
    assert re.fullmatch(r"llmray-[0-9a-f]{8}-[\w-]{43}\n", added.stdout)
    (told,) = json.loads(run(cli, ["serve", "keys", "list", "--json"]).stdout)
    assert (told["name"], told["models"], told["limits"]["requests_per_minute"], told["expired"]) == (
        "alice",
        ["m"],
        60,
        False,
    )
    assert added.stdout.strip() not in run(cli, ["serve", "keys", "list"]).output
    assert run(cli, ["serve", "keys", "revoke", "alice"]).exit_code == 0
    assert run(cli, ["serve", "keys", "revoke", "alice"]).exit_code == 1
    for wrong in ("soon", "0d", "-1d", "30", "1y", "99999999d"):
        assert run(cli, ["serve", "keys", "add", "x", "--expires", wrong]).exit_code == 2
    assert run(cli, ["serve", "keys", "add", "x", "--concurrent", "0"]).exit_code == 2
    assert json.loads(run(cli, ["serve", "keys", "list", "--json"]).stdout) == []
