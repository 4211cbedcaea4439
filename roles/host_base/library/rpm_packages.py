#!/usr/bin/python
"""Packages by the commands rpm and dnf: Ansible's module wants bindings, which RHEL 8 has for a Python that Ansible no
longer runs on."""

from __future__ import annotations

from ansible.module_utils.basic import AnsibleModule

DOCUMENTATION = """
module: rpm_packages
short_description: Packages by the commands rpm and dnf
description: rpm is asked first, so that nothing is asked of a mirror where all is as it should be.
author: LLM on Ray
options:
  names: {description: "Names of packages, or what they provide.", type: list, elements: str, required: true}
  state: {description: Whether they are to be there., choices: [present, absent], default: present, type: str}
"""
EXAMPLES = "- rpm_packages: {names: [nfs-utils, chrony]}"
RETURN = "packages: {description: Those that came or went., type: list, returned: always}"


def main():
    module = AnsibleModule(
        {
            "names": {"type": "list", "elements": "str", "required": True},
            "state": {"type": "str", "choices": ["present", "absent"], "default": "present"},
        },
        supports_check_mode=True,
    )
    comes = module.params["state"] == "present"
    changing = [name for name in module.params["names"] if installed(module, name) != comes]
    if changing and not module.check_mode:
        command = ["dnf", "--assumeyes", "--quiet", "install" if comes else "remove", *changing]
        status, out, error = module.run_command(command, environ_update={"LC_ALL": "C.UTF-8"})
        if status != 0:
            module.fail_json(msg=f"{' '.join(command)}: {(error or out).strip()}", rc=status)
    lines = "".join(f"{name}\n" for name in changing)
    diff = {"before": "" if comes else lines, "after": lines if comes else ""}
    module.exit_json(changed=bool(changing), packages=changing, diff=diff)


def installed(module, name):
    return module.run_command(["rpm", "--query", "--whatprovides", name])[0] == 0


if __name__ == "__main__":
    main()
