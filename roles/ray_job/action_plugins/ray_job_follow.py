"""ray_job_follow: shows a job's output, line by line, until it ends. Takes the arguments of the module ray_job.

If the head does not answer for a while (during a restart), it is queried again. The job's result is not judged here.
"""

from __future__ import annotations

import time
from typing import Any

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

_PATIENCE = 180.0  # seconds without an answer
_PAUSE = 5.0
_KEPT = 20  # last lines to return

display = Display()


class ActionModule(ActionBase):
    """Entry point for Ansible."""

    TRANSFERS_FILES = False

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        super().run(tmp, task_vars)
        asked = dict(self._task.args) | {"state": "followed"}
        offset, partial, heard = 0, "", time.monotonic()
        last: list[str] = []
        while True:
            result = self._execute_module(
                module_name="ray_job", module_args=asked | {"offset": offset}, task_vars=task_vars
            )
            if result.get("failed") or result.get("unreachable"):
                if time.monotonic() - heard > _PATIENCE:
                    return result
                display.display(f"  ({str(result.get('msg', 'no answer')).strip()[-200:]}; asked again)")
                time.sleep(_PAUSE)
                continue
            heard, offset = time.monotonic(), result["offset"]
            *lines, partial = (partial + result["text"]).split("\n")
            ended = result["status"] not in ("PENDING", "RUNNING") and not result["more"]
            if ended and partial:
                lines.append(partial)
            for line in lines:
                display.display(f"  {line.rstrip()}")
            last = (last + [line.rstrip() for line in lines if line.strip()])[-_KEPT:]
            if ended:
                return result | {"text": "\n".join(last), "changed": False}
