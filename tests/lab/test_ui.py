"""ui.yml on a head of its own, in both runtimes: who gets in, what a restart leaves alone, who is kept out, and that it
goes without a trace."""

from __future__ import annotations

import json
import re
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.integration.tiny import llama
from tests.lab import cluster as lab_cluster
from tests.lab import docker
from tests.lab.cluster import Cluster
from tests.lab.page import PORT, Visitor, tunnel
from tests.lab.workflows import llm_ray
from tests.waiting import until

pytestmark = [pytest.mark.lab, pytest.mark.long]

PASSWORD = "several words together"  # noqa: S105
UNIT = "/etc/systemd/system/llm-ray-page.service"
TLS = "/etc/llm-ray-page"
_TRACES = (
    f"ls -d {UNIT} /run/llm-ray-page.started /opt/llm-ray /etc/llm-ray 2>/dev/null; docker ps --all --quiet "
    f"2>/dev/null; ss -Hltn 'sport = :{PORT}'; pgrep --list-full --full 'llm-ray "
    "[u]i|llm_ray.cli.[j]ob|llm_ray.ui.[a]part'"
)
_CERTIFICATE = f"""
umask 077; install --directory --owner=ray --mode=0700 {TLS}; cd {TLS}
openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=page -addext subjectAltName=IP:ADDRESS -keyout page.key -out page.pem 2>/dev/null
chown ray page.key page.pem
"""


@dataclass
class Made:
    """A head that has what the page finetunes, and the arguments that bring its users from a vault."""

    cluster: Cluster
    vault: list[str]
    runtime: str

    def play(self, *arguments: str, ok: bool = True, **variables: Any) -> lab_cluster.Run:
        return self.cluster.play("ui.yml", *self.vault, "-e", json.dumps(variables), *arguments, ok=ok)

    def holder(self) -> str:
        """The process that listens on the page's port; empty where none does."""
        return "".join(set(re.findall(r"pid=(\d+)", self.cluster.head.ssh(f"ss -Hltnp 'sport = :{PORT}'").stdout)))

    def page_pid(self) -> str:
        """Of the page itself, as the host counts it."""
        until(lambda: self.holder() != "", "the page", 120)
        return self.holder()

    def software(self, of: str) -> str:
        """What the page (its process) or the head runs: the folder of the environment, or the image."""
        head = self.cluster.head
        if self.runtime == "docker":
            name = "llm-ray-head" if of == "head" else "llm-ray-page"
            return head.ssh(f"docker container inspect --format {{{{.Image}}}} {name}").stdout.strip()
        pid = "$(systemctl show --value -p MainPID llm-ray-head)" if of == "head" else of
        return head.ssh(f"tr '\\0' '\\n' < /proc/{pid}/cmdline | grep -m 1 ^/").stdout.partition("/bin/")[0]

    def finetune_pid(self) -> str:
        return self.cluster.head.ssh("pgrep --full llm_ray.cli.[j]ob", check=False).stdout.strip()

    def steps(self, run: str) -> int:
        said = self.cluster.head.ssh(f"grep -c '\"loss\"' /srv/llm-ray/runs/{run}/metrics.jsonl", check=False).stdout
        return int(said or 0)

    def finetune(self, visitor: Visitor, run: str) -> None:
        """Start one on the page that would last for hours, and wait for its first steps."""
        fields = {
            "Data": "data/rows.jsonl",
            "Model": "tiny",
            "Name": run,
            "max_steps": "100000",
            "max_length": "64",
            "global_batch_size": "4",
            "validation": "null",
            "every_steps": "20",
        }
        events = visitor.press("Start", **fields)
        assert events[-1]["success"], events
        assert f"/runs?run={run}" in json.dumps(events), events
        until(lambda: self.steps(run) > 0, f"the steps of {run}", 300)


@pytest.fixture(scope="module", params=["bare_metal", "docker"])
def made(
    request: pytest.FixtureRequest, lab_ready: None, smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Made]:
    runtime, folder = request.param, tmp_path_factory.mktemp("page")
    password, users = folder / "password", folder / "users.yml"
    password.write_text("a password")
    users.write_text(
        json.dumps(
            {
                "page_users": {
                    "alice": {"password": PASSWORD, "role": "admin"},
                    "eve": {"password": PASSWORD, "role": "viewer"},
                }
            }
        )
    )
    vault = ["--vault-password-file", str(password)]
    subprocess.run(
        [Path(sys.executable).parent / "ansible-vault", "encrypt", *vault, users], check=True, capture_output=True
    )
    with lab_cluster.cluster(
        {"ray_head": ["head"], "ray_workers": []}, **(docker.VARIABLES if runtime == "docker" else {})
    ) as cluster:
        if runtime == "docker":
            docker.prepare(cluster.head)
            docker.import_base(cluster)
        cluster.play("site.yml", timeout=3000)
        storage = cluster.lab.folder / "storage"
        rows = [{"prompt": f"What is code {n}?", "completion": f"Code {n} means the seal is worn."} for n in range(64)]
        (storage / "data/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (storage / "models/tiny").mkdir()
        llama(storage / "models/tiny", smollm2)
        cluster.head.ssh("chown -R ray: /srv/llm-ray/data /srv/llm-ray/models")
        yield Made(cluster, [*vault, "-e", f"@{users}"], runtime)
    if runtime == "docker":
        docker.clear_cgroups()


@pytest.fixture(scope="module")
def first(made: Made) -> lab_cluster.Run:
    return made.play()


def test_check_mode_leaves_no_page(made: Made) -> None:
    checked = made.play("--check", "--diff")
    assert "llm-ray ui" in checked.output or "bin/page run" in checked.output
    assert made.cluster.head.ssh(f"ls {UNIT}; ls /srv/llm-ray/ui", check=False).stdout == ""


def test_beyond_loopback_there_is_no_page_without_a_user(made: Made) -> None:
    refused = made.cluster.play("ui.yml", "-e", "page_host=0.0.0.0", ok=False)
    said = " ".join(refused.output.split())
    assert "head: page_host = 0.0.0.0: other machines could reach a page that has no users" in said
    assert refused.changed == 0
    assert made.cluster.head.ssh(f"ls {UNIT}", check=False).stdout == ""


def test_users_of_the_vault_sign_in_over_a_tunnel(made: Made, first: lab_cluster.Run) -> None:
    head = made.cluster.head
    assert PASSWORD not in first.output
    assert "ssh -L 7860:127.0.0.1:7860" in first.output
    assert head.ssh(f"ss -Hltn 'sport = :{PORT}'").stdout.split()[3] == f"127.0.0.1:{PORT}"
    with tunnel(head) as url:
        stranger = Visitor(url)
        assert stranger.http.get("/cluster").status_code == 303
        assert stranger.http.get("/config").status_code in (401, 403)
        assert stranger.sign_in("alice", "another one of words") == 401
        assert stranger.sign_in("alice", PASSWORD) == 303
        assert stranger.http.get("/cluster").status_code == 200
        assert Visitor(url, "evil.example.org:7860").http.get("/login").status_code == 421


def test_it_runs_as_ray_s_user_and_shows_no_secret(made: Made, first: lab_cluster.Run) -> None:
    head, pid = made.cluster.head, made.page_pid()
    assert head.ssh(f"stat -c %u /proc/{pid}").stdout.strip() == "1200"
    token = head.ssh("cat /etc/llm-ray/token").stdout.strip()
    seen = head.ssh(
        f"cat /proc/{pid}/cmdline /proc/{pid}/environ {UNIT}; journalctl --unit llm-ray-page --no-pager"
    ).stdout
    assert "--port" in seen
    assert token not in seen
    assert PASSWORD not in seen
    assert head.ssh("stat -c '%a %u' /srv/llm-ray/ui /srv/llm-ray/ui/users.json /srv/llm-ray/uploads").stdout.split("\n")[:3] == [
        "700 1200", "600 1200", "700 1200",
    ]  # fmt: skip
    status = head.ssh(f"grep -E 'NoNewPrivs|CapEff|CapBnd' /proc/{pid}/status").stdout.split()
    assert status[status.index("NoNewPrivs:") + 1] == "1"
    assert status[status.index("CapEff:") + 1] == "0" * 16
    if made.runtime == "bare_metal":
        said = head.ssh("systemd-analyze security --no-pager llm-ray-page").stdout
        exposure = re.search(r"exposure level for \S+: ([\d.]+)", said)
        assert exposure, said
        assert float(exposure[1]) <= 2.0, said
    else:
        (container,) = json.loads(head.ssh("docker inspect llm-ray-page").stdout)
        assert container["HostConfig"]["ReadonlyRootfs"]
        assert container["HostConfig"]["CapDrop"] == ["ALL"]


def test_a_second_run_changes_nothing(made: Made, first: lab_cluster.Run) -> None:
    before = made.page_pid()
    second = made.play()
    print(f"{made.runtime}: first run {first.seconds:.0f} s, second {second.seconds:.0f} s")
    assert second.changes() == []
    assert second.changed == 0
    assert made.page_pid() == before


def test_it_sees_the_cluster(made: Made, first: lab_cluster.Run) -> None:
    with tunnel(made.cluster.head) as url:
        visitor = Visitor(url)
        assert visitor.sign_in("eve", PASSWORD) == 303
        until(lambda: made.cluster.head.address in visitor.look(), "the head's address on the page", 120)


def test_a_finetune_goes_on_under_a_restart_and_a_kill(made: Made, first: lab_cluster.Run) -> None:
    head = made.cluster.head
    with tunnel(head) as url:
        visitor = Visitor(url)
        assert visitor.sign_in("alice", PASSWORD) == 303
        made.finetune(visitor, "long")
        job = made.finetune_pid()
        assert job
        for end in (
            "systemctl restart llm-ray-page",
            "kill -9 {page}",
            "systemctl stop llm-ray-page; systemctl start llm-ray-page",
        ):
            page, steps = made.page_pid(), made.steps("long")
            head.ssh(end.format(page=page))
            until(lambda page=page: made.holder() not in ("", page), f"the page after {end}", 120)
            until(lambda steps=steps: made.steps("long") > steps + 20, f"more steps after {end}", 120)
            assert made.finetune_pid() == job
        again = Visitor(url)
        assert visitor.http.get("/runs").status_code == 303  # sessions end with the page
        assert again.sign_in("eve", PASSWORD) == 303
        assert "long" in again.look()
    llm_ray(made.cluster, "runs", "stop", "long")
    until(lambda: made.finetune_pid() == "", "the end of the finetune")
    assert json.loads(head.ssh("cat /srv/llm-ray/runs/long/run.json").stdout)["state"] == "stopped"


def test_status_and_validate_know_it(made: Made, first: lab_cluster.Run, tmp_path: Path) -> None:
    assert re.search(r"head +llm-ray-page +active \(running\) +enabled", made.cluster.play("status.yml").output)
    report = tmp_path / "report.json"
    arguments = ["-e", f"validate_report={report}", "--skip-tags", "train,serve"]
    made.cluster.play("validate.yml", *arguments)
    assert [one["result"] for one in json.loads(report.read_text())["findings"] if one["check"] == "page"] == ["passed"]
    made.cluster.head.ssh("systemctl stop llm-ray-page")
    try:
        made.cluster.play("validate.yml", *arguments, ok=False)
    finally:
        made.cluster.head.ssh("systemctl start llm-ray-page")
    (failed,) = [one for one in json.loads(report.read_text())["findings"] if one["result"] == "failed"]
    assert failed["check"] == "page"
    assert "llm-ray-page is inactive" in failed["found"]


def test_the_one_who_has_its_port_is_named(made: Made, first: lab_cluster.Run) -> None:
    head = made.cluster.head
    head.ssh(f"systemctl stop llm-ray-page; systemd-run --unit=squatter python3 -m http.server --bind 127.0.0.1 {PORT}")
    until(lambda: made.holder() != "", "the squatter")
    try:
        refused = made.play(ok=False)
    finally:
        head.ssh("systemctl stop squatter")
    assert re.search(
        r"head: page_port = 7860: the port is used by python3 \(process \d+\)", " ".join(refused.output.split())
    )
    assert [line for line in made.play().changes() if "Start and enable the page" not in line] == []


def test_beyond_loopback_it_speaks_tls_to_admin_networks_alone(
    made: Made, first: lab_cluster.Run, tmp_path: Path
) -> None:
    head = made.cluster.head
    head.ssh(_CERTIFICATE.replace("ADDRESS", head.address))
    (tmp_path / "ca.pem").write_text(head.ssh(f"cat {TLS}/page.pem").stdout)
    opened: dict[str, Any] = {
        "page_host": "0.0.0.0",  # noqa: S104
        "page_tls_certificate": f"{TLS}/page.pem", "page_tls_key": f"{TLS}/page.key", "page_names": [head.address],
    }  # fmt: skip
    url, trust = f"https://{head.address}:{PORT}", ssl.create_default_context(cafile=str(tmp_path / "ca.pem"))
    made.play(**opened)
    with pytest.raises(httpx.TransportError):  # this machine is not in the cluster
        httpx.get(f"{url}/health", verify=trust, timeout=5, trust_env=False)
    made.play(**opened, llm_ray_admin_networks=[f"{made.cluster.lab.net.prefix}.1/32"])
    visitor = Visitor(url, f"{head.address}:{PORT}", verify=trust)
    assert visitor.sign_in("alice", PASSWORD) == 303
    assert visitor.http.get("/cluster").status_code == 200
    assert all(cookie.secure and cookie.name.startswith("__Host-") for cookie in visitor.http.cookies.jar)
    made.cluster.play(
        "validate.yml",
        "--skip-tags",
        "train,serve",
        "-e",
        json.dumps({"llm_ray_admin_networks": [f"{made.cluster.lab.net.prefix}.1/32"]}),
    )
    # A renewed certificate restarts it.
    before = made.page_pid()
    head.ssh(_CERTIFICATE.replace("ADDRESS", head.address))
    renewed = made.play(**opened)
    assert any("Restart the page" in line for line in renewed.changes())
    assert made.page_pid() != before
    made.play()
    assert head.ssh(f"ss -Hltn 'sport = :{PORT}'").stdout.split()[3] == f"127.0.0.1:{PORT}"


def test_an_upgrade_and_its_way_back_take_the_page_along(made: Made, first: lab_cluster.Run) -> None:
    module = made.cluster.bundle / "llm_ray" / "__init__.py"
    before, old = module.read_text(), made.cluster.ray("import llm_ray; print(llm_ray.__version__)").strip()
    pids = [made.page_pid()]
    try:
        module.write_text(before.replace(old, "9.9.9"))
        for arguments, runs in (([], "9.9.9"), (["-e", "rollback=true"], old)):
            made.cluster.play("upgrade.yml", *arguments, timeout=3000)
            pids.append(made.page_pid())
            assert pids[-1] not in pids[:-1]
            assert made.cluster.ray("import llm_ray; print(llm_ray.__version__)").strip() == runs
            assert made.software(pids[-1]) == made.software("head")
            with tunnel(made.cluster.head) as url:
                assert Visitor(url).sign_in("alice", PASSWORD) == 303
            assert made.cluster.play("upgrade.yml", *arguments).changes() == []
            assert made.page_pid() == pids[-1]
    finally:
        module.write_text(before)


def test_other_software_restarts_it(made: Made, first: lab_cluster.Run) -> None:
    head, before = made.cluster.head, made.page_pid()
    assert made.cluster.play("site.yml", "--tags", "page").changes() == []
    assert made.page_pid() == before
    if made.runtime == "docker":  # an image of the same contents, which is another one
        unit = "/etc/systemd/system/llm-ray-head.service"
        head.ssh(f"docker commit llm-ray-page other:lab && sed -i 's/sha256:[0-9a-f]*/other:lab/' {unit}", timeout=300)
        head.ssh("systemctl daemon-reload; systemctl restart llm-ray-head", timeout=300)
    else:
        head.ssh("cd /opt/llm-ray && ln -sfn $(readlink current) current.new && mv -T current.new current")
    changed = made.cluster.play("site.yml", "--tags", "page").changes()
    assert any("Restart the page" in line for line in changed), changed
    assert made.page_pid() != before


def test_reset_ends_a_finetune_with_a_checkpoint_and_leaves_nothing(made: Made, first: lab_cluster.Run) -> None:
    head, run = made.cluster.head, made.cluster.lab.folder / "storage/runs/last"
    with tunnel(head) as url:
        visitor = Visitor(url)
        assert visitor.sign_in("alice", PASSWORD) == 303
        made.finetune(visitor, "last")
    made.cluster.play("reset.yml", "-e", "confirm=llm-ray")
    assert head.ssh(_TRACES, check=False).stdout == ""
    assert json.loads((run / "run.json").read_text())["state"] == "stopped"
    assert any((run / "checkpoint").iterdir())
    assert (run.parents[1] / "ui/users.json").is_file()
    made.cluster.play("reset.yml", "-e", "confirm=llm-ray", "-e", "remove_data=true")
    assert [path.name for path in run.parents[1].iterdir()] == []
