"""Ends validate.yml with exit code 1 where the cluster failed a check: Ansible's own 2 then means that it could not be
judged."""

from __future__ import annotations

import atexit
import os
import sys
from typing import ClassVar

from ansible.executor.stats import AggregateStats
from ansible.plugins.callback import CallbackBase

DOCUMENTATION = """
name: operations_verdict
type: aggregate
short_description: exit code 1 where validate.yml found that the cluster fails
description: A playbook asks for it by ansible.builtin.set_stats with `operations_failed`, the number of checks that failed.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION: ClassVar = 2.0
    CALLBACK_TYPE: ClassVar = "aggregate"
    CALLBACK_NAME: ClassVar = "operations_verdict"

    def v2_playbook_on_stats(self, stats: AggregateStats) -> None:
        # Ansible has no code of one's own, and to exit here would leave callbacks after this one untold: reports as
        # junit's.
        if int(stats.custom.get("_run", {}).get("operations_failed", 0)):
            atexit.register(_exit)


def _exit() -> None:
    """End with 1 when all others that asked for it have tidied up."""
    atexit.unregister(_exit)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
