"""The role page, run against a host that only stands for a head: what is refused before anything is changed, and what
the unit runs."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.ansible.conftest import ROOT, modules, playbook, stand_in
from tests.unit.ansible.test_playbooks import words

SECRET = "several words together"  # noqa: S105
NODE = {"stat": {"stat": {"exists": True}}, "systemd_service": {"status": {}}}


def page(folder: Path, head: dict[str, Any], *arguments: str, **variables: Any) -> subprocess.CompletedProcess[str]:
    inventory = {"all": {"vars": variables}, "ray_head": {"hosts": {"head": head | {"ansible_host": "127.0.0.1"}}}}
    return playbook(folder, inventory, *arguments, name="ui.yml")


def test_a_host_that_is_no_node_gets_no_page(tmp_path: Path) -> None:
    done = page(tmp_path, stand_in(tmp_path, "head"))
    assert done.returncode == 2, done.stdout
    assert "head: is not a node yet, nothing was changed: run site.yml, then this again" in words(done)
    assert set(modules(tmp_path, "head")) == {"setup", "stat"}


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"page_host": "0.0.0.0"}, "page_host = 0.0.0.0"),  # noqa: S104
        ({"page_origins": ["https://llm.example.org"]}, "page_origins = https://llm.example.org"),
    ],
)
def test_a_page_that_others_reach_has_a_user(tmp_path: Path, variables: dict[str, Any], named: str) -> None:
    done = page(tmp_path, stand_in(tmp_path, "head", **NODE), **variables)
    assert done.returncode == 2, done.stdout
    assert (
        f"head: {named}: other machines could reach a page that has no users: add one in a vault (page_users)"
        in words(done)
    )
    assert set(modules(tmp_path, "head")) == {"setup", "stat", "command"}


def test_the_one_who_holds_its_port_is_named(tmp_path: Path) -> None:
    done = page(
        tmp_path, stand_in(tmp_path, "head", **NODE, command={"rc": 0, "stdout": "python3 (process 42)", "stderr": ""})
    )
    assert done.returncode == 2, done.stdout
    assert "head: page_port = 7860: the port is used by python3 (process 42): stop it, or set another port" in words(
        done
    )


def test_a_key_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    files = {"page_tls_certificate": "/etc/page.pem", "page_tls_key": "/etc/page.key"}
    done = page(tmp_path, stand_in(tmp_path, "head", **NODE, command={"rc": 1, "stdout": ""}), **files)
    assert done.returncode == 2, done.stdout
    assert "head: page_tls_key = /etc/page.key: ray, who runs the page, cannot read it" in words(done)


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"page_host": "head.example.org"}, "page_host = \"head.example.org\": must be an address of the head"),
        ({"page_names": ["https://llm.example.org"]}, "page_names = \"https://llm.example.org\": must be a host's name"),
        ({"page_origins": ["llm.example.org"]}, "page_origins = \"llm.example.org\": must be a scheme and a name"),
        ({"page_trusted_proxy": "nginx"}, "page_trusted_proxy = \"nginx\": must be the proxy's address"),
        ({"page_tls_key": "page.key"}, "page_tls_key = \"page.key\": must be the absolute path"),
        ({"page_tls_certificate": "/etc/page.pem"}, "page_tls_key = \"\": is empty, and page_tls_certificate is given"),
        ({"page_max_upload_mib": 0}, "page_max_upload_mib = 0: must be 1 or more"),
        ({"page_port": 8000}, "page_port = 8000: is the port of llm_ray_serve_port too"),
        ({"page_port": 443}, "page_port = 443: must be a port between 1024 and 65535"),
        ({"page_hots": "0.0.0.0"}, "page_hots: no role has such a variable: did you mean page_host?"),  # noqa: S104
        (
            {"page_host": "10.0.0.1", "page_port": 7861, "firewall_served_ports": [8000, 7860]},
            "the firewall does not guard the page's port, 7861 (page_port), and page_host is 10.0.0.1",
        ),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_work_is_told_before_a_host_is_asked(tmp_path: Path, variables: dict[str, Any], said: str) -> None:
    done = page(tmp_path, stand_in(tmp_path, "head"), **variables)
    assert done.returncode == 2, done.stdout
    assert said in words(done)
    assert modules(tmp_path, "head") == []


def test_a_misspelt_argument_is_told(tmp_path: Path) -> None:
    done = page(tmp_path, stand_in(tmp_path, "head"), "-e", "page_usres={}")
    assert done.returncode == 2, done.stdout
    assert "-e page_usres: no such argument: did you mean -e page_users=…?" in words(done)


def test_a_refused_password_is_in_no_output(tmp_path: Path) -> None:
    refused = {
        "rc": 2,
        "stdout": json.dumps({"error": "the user alice: a password has 12 to 1024 characters"}),
        "stderr": "",
        "failed": True,
    }
    task = {"include_role": {"name": "page", "tasks_from": "users"}}
    (tmp_path / "play.yml").write_text(yaml.safe_dump([{"hosts": "head", "gather_facts": False, "tasks": [task]}]))
    users = {"page_users": {"alice": {"password": SECRET, "role": "admin"}}}
    inventory = {"ray_head": {"hosts": {"head": stand_in(tmp_path, "head", command=refused) | users}}}
    done = playbook(tmp_path, inventory, "-vvv", "--diff", name=str(tmp_path / "play.yml"))
    assert done.returncode == 2, done.stdout
    assert "head: page_users: the user alice: a password has 12 to 1024 characters" in words(done)
    assert SECRET not in done.stdout + done.stderr


def render(folder: Path, template: str, **variables: Any) -> str:
    """A template of the role, with a host's variables."""
    tasks = [{"include_vars": str(ROOT / f"roles/page/{part}/main.yml")} for part in ("defaults", "vars")] + [
        {"set_fact": variables},
        {"template": {"src": str(ROOT / "roles/page/templates" / template), "dest": str(folder / "made")}},
    ]
    play = {
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "tasks": tasks,
        "vars": {"ansible_become": False},
    }
    (folder / "render.yml").write_text(yaml.safe_dump([play]))
    done = playbook(folder, {}, name=str(folder / "render.yml"))
    assert done.returncode == 0, done.stdout
    return (folder / "made").read_text()


def test_the_unit_runs_the_page_as_ray_s_user_and_ends_it_alone(tmp_path: Path) -> None:
    variables = {
        "page_host": "0.0.0.0",  # noqa: S104
        "page_tls_certificate": "/etc/p.pem",
        "page_tls_key": "/etc/p.key",
        "page_names": ["a.example.org", "b.example.org:443"],
        "page_users": {"alice": {"password": SECRET}},
    }
    unit = render(tmp_path, "llm-ray-page.service.j2", **variables)
    (line,) = [line for line in unit.splitlines() if line.startswith("ExecStart=")]
    assert " ".join(line.split()) == (
        "ExecStart=/opt/llm-ray/current/bin/llm-ray ui --host 0.0.0.0 --port 7860 --max-upload-mib 2048 --tls-cert "
        "/etc/p.pem --tls-key /etc/p.key --allow-host a.example.org --allow-host b.example.org:443"
    )
    for setting in (
        "User=ray", "EnvironmentFile=/etc/llm-ray/ray.env", "KillMode=process", "OOMPolicy=continue", "Restart=on-failure",
        "NoNewPrivileges=yes", "ProtectSystem=strict", "ReadWritePaths=/var/lib/llm-ray /srv/llm-ray /dev/shm",
    ):  # fmt: skip
        assert setting in unit.splitlines()
    assert SECRET not in unit
    assert "PrivateTmp" not in [
        line.partition("=")[0] for line in unit.splitlines()
    ]  # its files would go from under finetunes


def test_with_docker_a_container_of_its_own_holds_it(tmp_path: Path) -> None:
    docker = {"ray_node_runtime": "docker", "page_tls_certificate": "/etc/p.pem", "page_tls_key": "/etc/p.key"}
    unit = render(tmp_path, "llm-ray-page.service.j2", **docker)
    assert "ExecStart=/opt/llm-ray/docker/bin/page run --host 127.0.0.1 --port 7860" in unit
    assert "User=" not in unit
    script = render(tmp_path, "docker-page.j2", **docker)
    assert "--volume /etc/p.pem:/etc/p.pem:ro --volume /etc/p.key:/etc/p.key:ro" in script
    assert "--cap-drop ALL" in script
    assert "--security-opt no-new-privileges" in script
    if shellcheck := shutil.which("shellcheck") or str(ROOT / ".venv/bin/shellcheck"):
        done = subprocess.run(
            [shellcheck, "--shell=sh", str(tmp_path / "made")], check=False, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout


def test_the_command_of_the_container_keeps_finetunes(tmp_path: Path) -> None:
    """What happens to the container, by a docker that notes what it is asked."""
    script = tmp_path / "page"
    script.write_text(
        render(tmp_path, "docker-page.j2", ray_node_runtime="docker").replace(
            "/etc/llm-ray/ray.env", str(tmp_path / "ray.env")
        )
    )
    script.chmod(0o755)
    (tmp_path / "ray.env").write_text("RAY_ADDRESS=10.0.0.1:6379\n")
    docker = tmp_path / "docker"
    docker.write_text(
        "#!/bin/sh\ncd " + str(tmp_path) + "\n"
        'case "$*" in\n'
        '*"{{.Image}} llm-ray-head") cat image ;;\n'
        "*Running*) cat state 2>/dev/null ;;\n"
        'run*) echo run >> log; for word; do case $word in llm-ray.settings=*) echo "true ${word#*=}" > state ;; esac; '
        "done ;;\n"
        '*) echo "$1" >> log ;;\nesac\n'
    )
    docker.chmod(0o755)

    def prepare() -> list[str]:
        (tmp_path / "log").unlink(missing_ok=True)
        subprocess.run(["sh", str(script), "prepare"], check=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
        return (tmp_path / "log").read_text().split() if (tmp_path / "log").exists() else []

    (tmp_path / "image").write_text("sha256:one\n")
    assert prepare() == ["stop", "rm", "run"]
    assert prepare() == []  # a restart of the page leaves all else in it alone
    (tmp_path / "image").write_text("sha256:two\n")
    assert prepare() == ["stop", "rm", "run"]
    (tmp_path / "ray.env").write_text("RAY_ADDRESS=10.0.0.2:6379\n")
    assert prepare() == ["stop", "rm", "run"]
