"""A small finetune and its endpoint in the lab: what the playbooks are told, and what is seen of a run and of its
model."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_ray.serve.gateway.protect.keys import new_secret
from tests.lab.cluster import Cluster

_FACTS = ["belt", "seal", "valve", "fan"]
_CLIENT = """
import json, urllib.error, urllib.request
body = {"model": "MODEL", "messages": [{"role": "user", "content": "What is code 3?"}], "max_tokens": 8, "temperature": 0}
request = urllib.request.Request("http://ADDRESS:8000/v1/chat/completions", data=json.dumps(body).encode())
request.add_header("Authorization", "Bearer KEY")
request.add_header("Content-Type", "application/json")
try:
    print(urllib.request.urlopen(request, timeout=60).status)
except urllib.error.HTTPError as error:
    print(error.code)
except OSError:
    print(0)
"""


def llm_ray(cluster: Cluster, *arguments: str) -> str:
    """What the command says on the head, as an operator calls it there."""
    as_ray = "set -a; . /etc/llm-ray/ray.env; cd /; exec runuser -u ray --"
    start = "" if cluster.variables.get("llm_ray_runtime") == "docker" else as_ray
    return cluster.head.ssh(f"{start} /usr/local/bin/llm-ray {shlex.join(arguments)}", timeout=300).stdout


@dataclass
class Workflow:
    """The real small model of this machine, finetuned on rows of this machine, both copied to the shared storage."""

    cluster: Cluster
    folder: Path
    model: Path
    key: str = field(default_factory=new_secret)

    def __post_init__(self) -> None:
        rows = [
            {"prompt": f"What is code {n}?", "completion": f"Code {n} means the {_FACTS[n % 4]} is worn."}
            for n in range(24)
        ]
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        template = (self.cluster.bundle / "conf/finetune/cluster.yaml.j2").read_text()
        (self.cluster.bundle / "conf/finetune/codes.yaml.j2").write_text(
            template.replace("  # upload: true", "  upload: true")
        )
        served = (self.cluster.bundle / "conf/serve/cluster.yaml.j2").read_text()
        small = served.replace('default("vllm")', 'default("transformers")').replace(
            "    max_batch: 32", "    max_model_len: 256\n    max_batch: 4"
        )
        (self.cluster.bundle / "conf/serve/small.yaml.j2").write_text(small)

    def finetune(self, name: str, **settings: Any) -> list[str]:
        """Arguments for finetune.yml."""
        given = {
            "conf": "codes",
            "name": name,
            "model": str(self.model),
            "train": str(self.folder / "rows.jsonl"),
            "data.max_length": 64,
            "data.validation": None,
            "training.max_steps": 4,
            "training.global_batch_size": 4,
            "tuning.lora.r": 4,
            "checkpoint.every_steps": 2,
            "evaluation.samples": 2,
            "evaluation.max_new_tokens": 8,
        } | settings
        return ["-e", json.dumps(given)]

    def keys(self) -> list[str]:
        """Arguments for a playbook that opens an endpoint: the key in a vault."""
        password, keys = self.folder / "password", self.folder / "keys.yml"
        password.write_text("a password")
        keys.write_text(json.dumps({"llm_ray_api_keys": {"alice": self.key}, "llm_ray_serve_host": "0.0.0.0"}))  # noqa: S104
        vault = ["--vault-password-file", str(password)]
        subprocess.run(
            [Path(sys.executable).parent / "ansible-vault", "encrypt", *vault, keys], check=True, capture_output=True
        )
        return ["-e", f"@{keys}", *vault]

    def serve(self, name: str, **settings: Any) -> list[str]:
        """Arguments for serve.yml, with the key in a vault."""
        given = {"model": name, "engine": "transformers", f"models.{name}.max_model_len": 256} | settings
        return [*self.keys(), "-e", json.dumps(given)]

    def told(self, name: str) -> dict[str, Any]:
        """The run's run.json."""
        told: dict[str, Any] = json.loads(self.cluster.head.ssh(f"cat /srv/llm-ray/runs/{name}/run.json").stdout)
        return told

    def steps(self, name: str) -> int:
        """Steps that the run has noted."""
        said = self.cluster.head.ssh(f"grep -c '\"loss\"' /srv/llm-ray/runs/{name}/metrics.jsonl", check=False).stdout
        return int(said or 0)

    def losses(self, name: str) -> dict[int, float]:
        """The run's losses by step."""
        rows = map(json.loads, self.cluster.head.ssh(f"cat /srv/llm-ray/runs/{name}/metrics.jsonl").stdout.splitlines())
        return {row["step"]: row["loss"] for row in rows if "loss" in row}

    def ask(self, name: str, key: str = "") -> int:
        """The status that a client among the hosts, whom the firewall lets in, gets for a question; 0 for no answer."""
        code = (
            _CLIENT.replace("ADDRESS", self.cluster.head.address).replace("KEY", key or self.key).replace("MODEL", name)
        )
        return int(self.cluster.head.ssh(f"python3 - <<'END'\n{code}\nEND", check=False).stdout or 0)
