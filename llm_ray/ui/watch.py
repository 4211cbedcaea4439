"""The page's view of the cluster, refreshed every few seconds for all open pages."""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from llm_ray.apart import Apart
from llm_ray.app import cluster, serving
from llm_ray.errors import LlmRayError
from llm_ray.progress import Reporter

_LOG = logging.getLogger("llm_ray.ui")
LOOK_AGAIN = 10
"""Seconds between two looks of a screen that is open; what somebody does there is shown at once."""
_LOOK_EVERY = 5.0  # seconds
_LOOK_TIMEOUT = 40.0
_UNWATCHED = 30.0  # seconds after which nobody looks any more


@dataclass(frozen=True)
class Seen:
    """`overview` is None where nothing serves on this machine, and where the cluster is away: then `away` says why."""

    overview: cluster.Overview | None
    away: str = ""
    at: float = field(default_factory=time.monotonic)

    @property
    def models(self) -> dict[str, serving.ModelStatus]:
        return self.overview.serving.models if self.overview else {}


class Watch:
    """Looks at the cluster every few seconds, once for everybody who looks at the page; not at all while nobody
    does."""

    def __init__(self, home: Path, address: str | None) -> None:
        self._home, self._address, self._apart = home, address, Apart()
        self._changed = threading.Condition()
        self._seen: Seen | None = None
        self._asked = self._wanted = 0.0
        self._looking = False

    def seen(self, *, fresh: bool = False) -> Seen:
        """How it stands; with `fresh` not before this call was made."""
        with self._changed:
            now = self._asked = time.monotonic()
            if not self._looking:
                self._looking, self._seen = True, None
                threading.Thread(target=self._look, daemon=True).start()
            if fresh:
                self._wanted = now
                self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._seen is not None and (not fresh or self._seen.at >= now), timeout=2 * _LOOK_TIMEOUT
            )
            return self._seen or Seen(None, "it has not answered yet")

    def _look(self) -> None:
        while True:
            began = time.monotonic()
            seen = self._now(began)
            with self._changed:
                self._seen = seen
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._wanted > began, timeout=_LOOK_EVERY)  # noqa: B023
                if time.monotonic() - self._asked > _UNWATCHED:
                    self._looking = False
                    break
        self._apart.close()

    def _now(self, at: float) -> Seen:
        if not self._address and not serving.serves_here(self._home):
            self._apart.close()
            return Seen(None, at=at)
        try:
            return Seen(self._apart.call(look, self._home, self._address, timeout=_LOOK_TIMEOUT), at=at)
        except LlmRayError as error:
            return Seen(None, str(error), at)
        except Exception:
            _LOG.exception("checking the cluster")
            return Seen(None, "see the log of llm-ray ui", at)


# Of the other process, in which `look` is called.
_JOINED = contextlib.ExitStack()
atexit.register(_JOINED.close)
_joined_to: list[object] = []


def look(home: Path, address: str | None, reporter: Reporter) -> cluster.Overview:
    """The overview, over a connection that stays. Called in the other process."""
    now = cluster.place(home, address)
    if _joined_to and _joined_to[0] != now:
        _JOINED.close()
        _joined_to.clear()
    if not _joined_to:
        _JOINED.enter_context(cluster.joined(home, reporter, address))
        _joined_to.append(now)
    return cluster.overview(home, reporter, address)
