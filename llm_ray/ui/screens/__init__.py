"""The screens: each has a URL and a module with a function `build(site)`.

To add a screen, add a line to `SCREENS` and a module whose `build(site)` creates components and connects them with
`llm_ray.ui.handlers.on`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llm_ray.ui.screens import ask, cluster, data, deploy, runs, train

if TYPE_CHECKING:
    from llm_ray.ui.uploads import Uploads
    from llm_ray.ui.watch import Watch
    from llm_ray.ui.work import Works


@dataclass(frozen=True)
class Site:
    """What screens are built with."""

    home: Path
    uploads: Uploads
    address: str | None = None
    """The cluster that serves; None means this machine's own Ray."""

    @cached_property
    def watch(self) -> Watch:
        from llm_ray.ui.watch import Watch

        return Watch(self.home, self.address)

    @cached_property
    def works(self) -> Works:
        from llm_ray.ui.work import Works

        return Works()


@dataclass(frozen=True)
class Screen:
    """A page with its own URL."""

    path: str
    """URL path, without slashes."""
    title: str
    build: Callable[[Site], None]
    step: bool = False
    """Whether it is a step on the way from data to answers."""


SCREENS = (
    Screen("data", "Data", data.build, step=True),
    Screen("train", "Train", train.build, step=True),
    Screen("deploy", "Deploy", deploy.build, step=True),
    Screen("ask", "Ask", ask.build, step=True),
    Screen("runs", "Runs", runs.build),
    Screen("cluster", "Cluster", cluster.build),
)
