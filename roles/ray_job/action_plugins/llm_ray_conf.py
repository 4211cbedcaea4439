"""llm_ray_conf: renders and validates a conf on the machine that runs Ansible, with the inventory's variables and those
given by -e.

Variables given by -e that belong neither to the playbook nor to a role set variables of the template or keys of the
conf, as --set does.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible.utils.vars import load_extra_vars

# Variables of Ansible and the cluster, which are not settings of a conf; roles' variables begin with the role's name.
_PREFIXES = ("ansible_", "llm_ray_")


class ActionModule(ActionBase):
    """Entry point for Ansible."""

    TRANSFERS_FILES = False
    _requires_connection = False
    _VALID_ARGS = frozenset(
        ("kind", "conf", "arguments", "settings", "home", "nodes", "hosts", "variables", "unknown", "guarded", "bundle")
    )

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        try:
            from llm_ray.conf.load import find
            from llm_ray.conf.render import TemplateProblem, variables
            from llm_ray.conf.upload import Destination, finetune_for_cluster, serve_for_cluster
            from llm_ray.errors import LlmRayError
        except ImportError as error:
            raise AnsibleActionFail(
                f"the Python of this ansible-playbook lacks llm_ray ({error}): make setup, then "
                ".venv/bin/ansible-playbook"
            ) from error
        asked = self._task.args
        kind, conf = asked["kind"], str(asked["conf"])
        own = Path(asked["bundle"]) / "conf" / kind / f"{conf}.yaml.j2"
        destination = Destination(Path(asked["home"]), asked["nodes"], asked["hosts"])
        prefixes = (*_PREFIXES, *(f"{role.name}_" for role in Path(asked["bundle"], "roles").iterdir()))
        extra = {name: value for name, value in load_extra_vars(self._loader).items() if not name.startswith(prefixes)}
        given_by_e = {name: value for name, value in extra.items() if name not in asked["arguments"]}
        settings = [f"{name}={_text(value)}" for name, value in ((asked.get("settings") or {}) | given_by_e).items()]
        try:
            file = own if own.is_file() else find(conf, kind)
            try:
                used = variables(file.read_text(encoding="utf-8-sig"))
            except (TemplateProblem, UnicodeDecodeError, OSError):
                used = set()  # loading it reports the error
            known = {name: self._value(name, task_vars or {}) for name in used if name in (task_vars or {})} | asked[
                "variables"
            ]
            if (unknown := asked.get("unknown")) and "cpus_per_host" in used - given_by_e.keys() - (
                asked.get("settings") or {}
            ).keys():
                raise AnsibleActionFail(
                    f"{file.name} asks for cpus_per_host, and the cores of {', '.join(unknown)} are not known, for no "
                    "facts came from there: start it, set ray_node_cpus for it in the inventory, or give -e "
                    "cpus_per_host=…"
                )
            prepare = finetune_for_cluster if kind == "finetune" else serve_for_cluster
            prepared = prepare(file, settings, known, destination)
        except LlmRayError as error:
            raise AnsibleActionFail(str(error).replace("--set ", "-e ").replace("--config ", "-e conf=")) from None
        except OSError as error:
            raise AnsibleActionFail(f"{error.filename}: {error.strerror}") from None
        if kind == "serve" and asked.get("guarded") is not None:
            endpoint: Any = prepared.conf
            _check_port(endpoint.endpoint, asked["guarded"])
        return {
            "changed": False,
            "given": sorted(given_by_e),
            "file": os.path.relpath(file),
            "conf": prepared.text,
            "resolved": prepared.conf.model_dump(mode="json"),
            "sha256": prepared.sha256,
            "files": [
                {
                    "key": each.key,
                    "source": str(each.source),
                    "target": each.target,
                    "sha256": each.sha256,
                    "bytes": each.bytes,
                }
                for each in prepared.files
            ],
        }

    def _value(self, name: str, task_vars: dict[str, Any]) -> Any:
        return json.loads(json.dumps(self._templar.template(task_vars[name]), default=str))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _check_port(endpoint: Any, guarded: list[Any]) -> None:
    """Raises if an endpoint beyond loopback uses a port that the firewall does not guard. `guarded`: ports, or
    from-to."""
    ranges = [str(port).partition("-") for port in guarded]
    if not endpoint.on_loopback and not any(int(low) <= endpoint.port <= int(high or low) for low, _, high in ranges):
        raise AnsibleActionFail(
            f"endpoint.port is {endpoint.port}, none of the ports that the firewall guards "
            f"({', '.join(map(str, guarded))}), and endpoint.host is {endpoint.host}: set llm_ray_serve_port: "
            f"{endpoint.port} in the inventory, or add it to firewall_served_ports, and run site.yml --tags firewall"
        )
