#!/usr/bin/python
"""Files on the shared storage that are named by their contents: checks for one, or moves an uploaded copy there."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.ray_user import acting_as

DOCUMENTATION = """
module: shared_file
short_description: A file or folder on the shared storage, with its checksum
description:
  - Tells whether it exists and is complete. With source, moves that to its path if the checksum matches. Works as Ray's user, since mounted
    storage may be closed to root.
author: LLM on Ray
options:
  path: {description: Its path on the shared storage., type: path, required: true}
  sha256: {description: "Its SHA-256; for a folder, that of its files' checksums and names.", type: str, required: true}
  source: {description: Its uploaded copy on this host., type: path}
  user: {description: User that Ray runs as., type: str, required: true}
"""
EXAMPLES = "- shared_file: {path: /srv/llm-ray/data/uploads/ab/x.jsonl, sha256: ab…, user: ray}"
RETURN = "there: {description: Whether it is there now, type: bool, returned: always}"
_BLOCK = 1 << 20


def digest(path):
    """Returns the SHA-256 of a file; for a folder, of its files' checksums and names in the order of the names, as in
    llm_ray.conf.upload."""
    if os.path.isfile(path):  # noqa: PTH113
        made = hashlib.sha256()
        with open(path, "rb") as file:  # noqa: PTH123
            for block in iter(lambda: file.read(_BLOCK), b""):
                made.update(block)
        return made.hexdigest()
    found = {}
    for folder, _, names in os.walk(path, followlinks=True):
        for name in names:
            file = os.path.join(folder, name)  # noqa: PTH118
            found[os.path.relpath(file, path)] = digest(file)
    return hashlib.sha256("".join(f"{found[name]}  {name}\n" for name in sorted(found)).encode()).hexdigest()


def main():
    module = AnsibleModule(
        {
            "path": {"type": "path", "required": True},
            "sha256": {"type": "str", "required": True},
            "source": {"type": "path"},
            "user": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    path, sha256, source = (module.params[name] for name in ("path", "sha256", "source"))
    mark = f"{os.path.dirname(path)}/.{os.path.basename(path)}.sha256"  # noqa: PTH119, PTH120
    try:
        with acting_as(module.params["user"]):
            present = is_there(path, mark, sha256)
            right = present or not source or digest(source) == sha256
            if source and right and not present and not module.check_mode:
                put(source, path, mark, sha256)
    except KeyError:
        module.fail_json(msg=f"there is no user {module.params['user']}: ansible-playbook site.yml makes it")
    except OSError as error:
        module.fail_json(
            msg=f"{error.filename or path}: {error.strerror or error}: is the shared storage mounted, and has it room?"
        )
    if not right:
        module.fail_json(msg=f"{source} is not what was sent (its checksum differs): run this again")
    changed = bool(source) and not present
    module.exit_json(changed=changed, there=present or (changed and not module.check_mode))


def is_there(path, mark, sha256):
    try:
        with open(mark) as file:  # noqa: PTH123
            return file.read().split()[0] == sha256 and os.path.exists(path)  # noqa: PTH110
    except (OSError, IndexError):
        return False


def put(source, path, mark, sha256):
    """Copies atomically: the checksum file is written last. If another process was faster, its copy stays, since it may
    be in use."""
    folder, name = os.path.split(path)
    os.makedirs(folder, mode=0o750, exist_ok=True)  # noqa: PTH103
    own = tempfile.mkdtemp(prefix=f".{name}.", dir=folder)
    copy, old, new_mark = (os.path.join(own, what) for what in ("copy", "old", "mark"))  # noqa: PTH118
    try:
        if os.path.isdir(source):  # noqa: PTH112
            shutil.copytree(source, copy)
        else:
            shutil.copyfile(source, copy)
        if os.path.lexists(path) and digest(path) != sha256:
            os.rename(path, old)  # noqa: PTH104
        try:
            if not os.path.lexists(path):
                os.rename(copy, path)  # noqa: PTH104
        except OSError:  # another process created the folder
            if not os.path.lexists(path):
                raise
        with open(new_mark, "w") as file:  # noqa: PTH123
            file.write(f"{sha256}  {name}\n")
        os.replace(new_mark, mark)  # noqa: PTH105
    finally:
        shutil.rmtree(own)


if __name__ == "__main__":
    main()
