#!/usr/bin/python
"""Manages packages with rpm and dnf, since Ansible's module needs bindings that RHEL 8 only has for a Python that
Ansible no longer supports."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: rpm_packages
short_description: Manage packages with the commands rpm and dnf
description: rpm is queried first, so that no mirror is contacted if nothing has to change.
author: LLM on Ray
options:
  names: {description: "Names of packages or of what they provide.", type: list, elements: str, required: true}
  state: {description: Desired state., choices: [present, absent], default: present, type: str}
"""
EXAMPLES = "- rpm_packages: {names: [nfs-utils, chrony]}"
RETURN = "packages: {description: Installed or removed packages., type: list, returned: always}"


def main():
    module = AnsibleModule(
        {
            "names": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    install = module.params["state"] == "present"
    changing = [name for name in module.params["names"] if installed(module, name) != install]
    if changing and not module.check_mode:
        command = ["dnf", "--assumeyes", "--quiet", "install" if install else "remove", *changing]
        status, out, error = module.run_command(command, environ_update={"LC_ALL": "C.UTF-8"})
        if status != 0:
            module.fail_json(msg=f"{' '.join(command)}: {(error or out).strip()}", rc=status)
    lines = "".join(f"{name}\n" for name in changing)
    diff = {"before": "" if install else lines, "after": lines if install else ""}
    module.exit_json(changed=bool(changing), packages=changing, diff=diff)


def installed(module, name):
    return module.run_command(["rpm", "--query", "--whatprovides", name])[0] == 0


if __name__ == "__main__":
    main()
