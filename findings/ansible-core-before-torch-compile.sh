#!/usr/bin/env bash
# ansible-core 2.19.14 and torch 2.13.0 in one process: a controller's plug-in, or a test, that uses both.
#
# Behaviour: importing ansible.module_utils.basic, as every module does, puts an object of a class of Ansible's in the place of
# sys.intern, for the whole process. torch's compiler, which many libraries import for a decorator alone (transformers does with any of
# its models), looks at sys.intern when it is imported, and takes built-in functions only: the import raises TypeError. The other way
# round, torch first, both work. So it depends on the order of imports whether a model can be made.
#
# Seen:
#   sys.intern is a SysInternPatch
#   after Ansible: TypeError: substitute_in_graph expects a function but got SysInternPatch
#   before Ansible: imported
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet ansible-core==2.19.14 torch==2.13.0
cd "$folder"
env/bin/python - <<'PYTHON'
import sys

import ansible.module_utils.basic

kind = type(sys.intern).__name__
print("sys.intern is a", kind)
assert sys.intern("text") == "text"
try:
    import torch._dynamo
except TypeError as error:
    told = str(error).replace(f"<class '{type(sys.intern).__module__}.{kind}'>", kind)
else:
    told = ""
print("after Ansible: TypeError:", told)
assert kind == "SysInternPatch" and told == f"substitute_in_graph expects a function but got {kind}", (kind, told)
PYTHON
env/bin/python - <<'PYTHON'
import torch._dynamo
import ansible.module_utils.basic

print("before Ansible: imported")
PYTHON
