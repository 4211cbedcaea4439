"""What runs in a replica before its engine starts: cores of its own, and no download."""

from __future__ import annotations

import os

from ray.llm._internal.common.callbacks.base import CallbackBase

from llm_ray.cores import claim_cores


class OwnCores(CallbackBase):
    """Binds the engine's threads to as many cores as the replica was given.

    vLLM's own binding takes the host's first cores whatever Ray granted, so that two replicas would share them. The engine runs in
    processes that inherit this environment. The model is a folder that is there: Ray's task that would fetch it on every node (a
    process that imports vLLM for that) is left out.
    """

    async def on_before_node_init(self) -> None:
        self.ctx.run_init_node = False
        count = int(self.kwargs["cpus"])
        cores = {core.core: core.cpu for core in reversed(claim_cores(count))}  # one thread a physical core
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(cores.values()))) or "nobind"
        os.environ["OMP_NUM_THREADS"] = str(len(cores) or count)
