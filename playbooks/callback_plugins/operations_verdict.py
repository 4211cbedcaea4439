"""Ends validate.yml with exit code 1 if the cluster failed a check, as opposed to Ansible's own 2, which then means
that it could not be checked."""

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
short_description: exit code 1 if a check of validate.yml failed
description: Enabled by a playbook that sets `operations_failed`, the number of failed checks, with ansible.builtin.set_stats.
"""


class CallbackModule(CallbackBase):
    CALLBACK_VERSION: ClassVar = 2.0
    CALLBACK_TYPE: ClassVar = "aggregate"
    CALLBACK_NAME: ClassVar = "operations_verdict"

    def v2_playbook_on_stats(self, stats: AggregateStats) -> None:
        # Ansible supports no custom exit codes, and exiting here would skip later callbacks, such as junit's report.
        if int(stats.custom.get("_run", {}).get("operations_failed", 0)):
            atexit.register(_exit)


def _exit() -> None:
    """Exits with 1 after all other exit handlers."""
    atexit.unregister(_exit)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)
