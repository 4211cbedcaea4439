# Placeholder of the lead until the real package lands: overwrite freely.
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Protection:
    @classmethod
    def of(cls, endpoint):
        return cls()

    def to_json(self):
        return {}

    @classmethod
    def from_json(cls, d):
        return cls()


def protect(app, settings):
    return app
