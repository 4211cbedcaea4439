"""The UI's view of the cluster, refreshed every few seconds and shared by all open pages."""

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
"""Seconds between two updates of an open screen; a user's own actions are shown at once."""
_LOOK_EVERY = 5.0  # seconds
_LOOK_TIMEOUT = 40.0
_UNWATCHED = 30.0  # seconds without a reader after which refreshing stops


@dataclass(frozen=True)
class Seen:
    """A snapshot. `overview` is None if nothing serves on this machine, or if the cluster is unreachable: `away` then
    holds the reason."""

    overview: cluster.Overview | None
    away: str = ""
    at: float = field(default_factory=time.monotonic)

    @property
    def models(self) -> dict[str, serving.ModelStatus]:
        return self.overview.serving.models if self.overview else {}


class Watch:
    """Refreshes a shared view of the cluster every few seconds while any page is open."""

    def __init__(self, home: Path, address: str | None) -> None:
        self._home, self._address, self._apart = home, address, Apart()
        self._changed = threading.Condition()
        self._seen: Seen | None = None
        self._asked = self._wanted = 0.0
        self._looking = False

    def seen(self, *, fresh: bool = False) -> Seen:
        """Returns the latest snapshot; with `fresh` one that began after this call."""
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


# State of the child process, in which `look` is called.
_JOINED = contextlib.ExitStack()
atexit.register(_JOINED.close)
_joined_to: list[object] = []


def look(home: Path, address: str | None, reporter: Reporter) -> cluster.Overview:
    """Returns the overview over a persistent connection. Called in the child process."""
    now = cluster.place(home, address)
    if _joined_to and _joined_to[0] != now:
        _JOINED.close()
        _joined_to.clear()
    if not _joined_to:
        _JOINED.enter_context(cluster.joined(home, reporter, address))
        _joined_to.append(now)
    return cluster.overview(home, reporter, address)
