"""The network interface that workers communicate over.

gloo listens on the address that the host's name resolves to. On many hosts that is loopback, which workers on other
hosts cannot reach. So each worker sets the interface named in the conf, or else the one with its Ray node's address,
before torch's process group is created.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import psutil
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend
from ray.util import get_node_ip_address

from llm_ray.errors import ClusterError


def set_interface(wanted: str | None) -> None:
    """Sets gloo's interface on this worker; None: the one with the Ray node's address. Raises ClusterError if `wanted`
    does not exist."""
    addresses = psutil.net_if_addrs()
    if wanted and wanted not in addresses:
        raise ClusterError(
            f"runtime.interface is {wanted}, but {os.uname().nodename} has {', '.join(sorted(addresses))}"
        )
    node_address = get_node_ip_address()
    matching = (name for name, bound in addresses.items() if any(a.address == node_address for a in bound))
    if interface := wanted or next(matching, None):
        os.environ["GLOO_SOCKET_IFNAME"] = interface


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: GlooConfig) -> None:
        worker_group.execute(set_interface, backend_config.interface)
        super().on_start(worker_group, backend_config)


@dataclass
class GlooConfig(TorchConfig):
    """Ray Train's torch backend with gloo over a chosen interface."""

    backend: str | None = "gloo"
    interface: str | None = None

    @property
    def backend_cls(self) -> type[_Backend]:
        return _Backend
