"""Users of the page: what is kept of them, and that changes hold at once."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from llm_ray.cli.main import cli
from llm_ray.errors import ConfError
from llm_ray.ui.users import Role, UserError, Users, add_user, change_user, import_users, list_users, revoke_user

PASSWORD = "several words together"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "ui" / "users.json"


def test_a_password_opens_and_is_kept_nowhere(file: Path) -> None:
    user = add_user(file, "alice", PASSWORD, Role.ADMIN)
    assert Users(file).check("alice", PASSWORD) == user
    assert PASSWORD not in file.read_text()
    assert json.loads(file.read_text())["alice"]["hash"].startswith("$argon2id$")
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)


@pytest.mark.parametrize(
    ("name", "password"), [("alice", PASSWORD + "x"), ("alice", ""), ("Alice", PASSWORD), ("bob", PASSWORD), ("", "")]
)
def test_nothing_else_opens(file: Path, name: str, password: str) -> None:
    add_user(file, "alice", PASSWORD, Role.USER)
    assert Users(file).check(name, password) is None


def test_a_name_that_nobody_has_takes_as_long(file: Path) -> None:
    add_user(file, "alice", PASSWORD, Role.USER)
    users = Users(file)

    def seconds(name: str) -> float:
        began = time.thread_time()
        users.check(name, "something else entirely")
        return time.thread_time() - began

    known, unknown = (min(seconds(name) for _ in range(3)) for name in ("alice", "nobody"))
    assert 0.5 < unknown / known < 2
    assert unknown > 0.005  # a hash, not a look-up


def test_changes_hold_at_once(file: Path) -> None:
    users = Users(file)
    assert not users.any()
    first = add_user(file, "alice", PASSWORD, Role.USER)
    assert users.find("alice") == first
    changed = change_user(file, "alice", role=Role.VIEWER)
    found = users.find("alice")
    assert found == changed and found.role is Role.VIEWER and found.stamp != first.stamp
    change_user(file, "alice", password="another one of words")
    assert users.check("alice", PASSWORD) is None
    assert users.check("alice", "another one of words")
    revoke_user(file, "alice")
    assert users.find("alice") is None


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "Alice", "a b", "a" * 33, "local", "é", "a\n"])
def test_what_is_no_name_is_refused(file: Path, name: str) -> None:
    with pytest.raises(ConfError, match="is not a valid user name"):
        add_user(file, name, PASSWORD, Role.USER)
    assert not file.exists()


@pytest.mark.parametrize("password", ["", "short", "x" * 1025])
def test_what_is_no_password_is_refused(file: Path, password: str) -> None:
    with pytest.raises(ConfError, match="a password has 12 to 1024 characters"):
        add_user(file, "alice", password, Role.USER)


def test_names_are_told_apart(file: Path) -> None:
    add_user(file, "alice", PASSWORD, Role.USER)
    with pytest.raises(UserError, match="a user called alice already exists"):
        add_user(file, "alice", PASSWORD, Role.ADMIN)
    for change in (lambda: revoke_user(file, "bob"), lambda: change_user(file, "bob", role=Role.ADMIN)):
        with pytest.raises(UserError, match="no user called bob; there are: alice"):
            change()


def test_a_file_that_cannot_be_trusted_opens_nothing(file: Path) -> None:
    add_user(file, "alice", PASSWORD, Role.ADMIN)
    file.chmod(0o644)
    assert Users(file).find("alice") is None
    with pytest.raises(UserError, match=r"is open to others \(mode 644\): chmod 600"):
        list_users(file)


def test_each_role_covers_those_before_it() -> None:
    assert [[role.covers(least) for least in Role] for role in Role] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path))

    def told(*arguments: str, stdin: str = "") -> tuple[int, str]:
        result = CliRunner().invoke(cli, ["ui", "users", *arguments], input=stdin)
        return result.exit_code, result.output

    assert told("list") == (0, "There are no users: llm-ray ui users add NAME\n")
    assert told("add", "alice", "--role", "admin", stdin=PASSWORD + "\n") == (0, "Added alice, role admin.\n")
    assert told("add", "bob", stdin=PASSWORD + "\n") == (0, "Added bob, role user.\n")
    assert told("role", "bob", "viewer") == (0, "bob now has the role viewer.\n")
    assert told("list") == (0, "alice  admin\nbob    viewer\n")
    assert told("password", "bob", stdin="tiny\n")[0] == 2
    assert told("revoke", "bob") == (0, "bob can no longer use the page.\n")
    assert [user["name"] for user in json.loads(told("list", "--json")[1])] == ["alice"]
    assert told("revoke", "bob") == (1, "Error: no user called bob; there are: alice\n")
    assert told("add", "carol")[0] == 2  # no password came
    assert "--password" not in told("add", "--help")[1]
    assert Users(tmp_path / "ui" / "users.json").check("alice", PASSWORD)


def test_beyond_loopback_nothing_starts_without_a_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(tmp_path))
    result = CliRunner().invoke(cli, ["ui", "--host", "0.0.0.0", "--port", "0"])
    assert result.exit_code == 2
    assert "there are no users yet: create the first with llm-ray ui users add NAME --role admin" in result.output


def test_an_import_adds_and_changes_and_leaves_the_rest(file: Path) -> None:
    first = {name: add_user(file, name, PASSWORD, Role.USER) for name in ("alice", "bob", "carol", "dan")}
    wanted = {
        "alice": (PASSWORD, Role.USER),
        "bob": (PASSWORD, Role.ADMIN),
        "carol": ("another one of words", Role.USER),
        "eve": (PASSWORD, Role.VIEWER),
    }
    assert import_users(file, wanted) == ["bob", "carol", "eve"]
    found = {user.name: user for user in list_users(file)}
    assert {name: user.role for name, user in found.items()} == {
        "alice": Role.USER, "bob": Role.ADMIN, "carol": Role.USER, "dan": Role.USER, "eve": Role.VIEWER,
    }  # fmt: skip
    assert {name for name in first if found[name] != first[name]} == {
        "bob",
        "carol",
    }  # a stamp is another: their sessions end
    assert found["bob"].hash == first["bob"].hash
    assert Users(file).check("carol", "another one of words")
    assert import_users(file, wanted) == []
    assert {user.name: user for user in list_users(file)} == found


def test_an_import_that_is_refused_changes_nothing(file: Path) -> None:
    for wanted in (
        {"alice": (PASSWORD, Role.USER), "bob": ("short", Role.USER)},
        {"alice": (PASSWORD, Role.USER), "Bob": (PASSWORD, Role.USER)},
    ):
        with pytest.raises(ConfError, match=r"[Bb]ob"):
            import_users(file, wanted)
    assert list_users(file) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("no json", "is not JSON"),
        ("[]", "has no users"),
        ('{"bob": "several words together"}', "the user bob: "),
        ('{"bob": {"password": 123456789012}}', "the user bob: "),
        ('{"bob": {"password": "several words together", "rolle": "admin"}}', "the user bob: "),
        (
            '{"bob": {"password": "several words together", "role": "root"}}',
            "the user bob: the role must be one of viewer, user, admin",
        ),
        ('{"bob": {"password": "short"}}', "the user bob: a password has 12"),
    ],
)
def test_users_on_standard_input_that_are_none_are_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, given: str, said: str
) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(file.parents[1]))
    done = CliRunner().invoke(cli, ["ui", "users", "import"], input=given)
    assert done.exit_code != 0
    assert said in f"{done.output}{done.exception}"
    assert "words together" not in f"{done.output}{done.exception}"
    assert list_users(file) == []


def test_users_on_standard_input_are_kept(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_RAY_HOME", str(file.parents[1]))
    given = json.dumps({"alice": {"password": PASSWORD, "role": "admin"}, "bob": {"password": PASSWORD}})
    runs = [CliRunner().invoke(cli, ["ui", "users", "import"], input=given).output for _ in range(2)]
    assert runs == ["kept: alice, bob\n", "unchanged\n"]
    assert {user.name: user.role for user in list_users(file)} == {"alice": Role.ADMIN, "bob": Role.USER}
