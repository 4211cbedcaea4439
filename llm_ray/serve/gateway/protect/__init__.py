"""Protection of the endpoint: API keys, limits, timeouts, size limits.

app = protect(app, Protection.of(conf.endpoint, home), Limiter())
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from llm_ray.conf.serve import Endpoint, Limits
from llm_ray.serve.gateway.protect.keys import keys_file

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from llm_ray.serve.gateway.protect.limits import Limiter


@dataclass(frozen=True)
class Protection:
    """The part of an endpoint's conf that protects the gateway. It can change while the gateway runs."""

    keys_file: Path | None
    """None: no key is required."""
    max_body_bytes: int
    body_timeout_s: float
    request_timeout_s: float
    cors_origins: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    max_upload_bytes: int = 0
    """Limit for bodies that are streamed to disk; 0: no uploads."""

    @classmethod
    def of(cls, endpoint: Endpoint, home: Path) -> Protection:
        """Returns the protection from an endpoint's conf, with the keys of `home`."""
        return cls(
            keys_file(home) if endpoint.needs_keys else None,
            int(endpoint.max_body_mib * 2**20),
            endpoint.body_timeout_s,
            endpoint.request_timeout_s,
            endpoint.cors_origins,
            endpoint.limits,
            int(endpoint.finetuning.max_file_mib * 2**20) if endpoint.finetuning.enabled else 0,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the settings as JSON values, for a deployment's user_config."""
        document: dict[str, Any] = TypeAdapter(Protection).dump_python(self, mode="json")
        return document

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Protection:
        return TypeAdapter(Protection).validate_python(document)


def protect(app: ASGIApp, settings: Protection, limiter: Limiter) -> ASGIApp:
    """Returns the app wrapped in middleware; the last one applied is the outermost. `limiter` keeps its counts when the
    settings change."""
    from starlette.middleware.cors import CORSMiddleware

    from llm_ray.serve.gateway.protect.keys import Keys
    from llm_ray.serve.gateway.protect.middleware import Access, Body, Deadline, Headed

    app = Deadline(app, settings.request_timeout_s)
    app = Body(app, settings.max_body_bytes, settings.body_timeout_s, settings.max_upload_bytes)
    app = Access(app, Keys(settings.keys_file) if settings.keys_file else None, settings.limits, limiter)
    if settings.cors_origins:
        exposed = ["Retry-After", *(f"x-ratelimit-{part}-requests" for part in ("limit", "remaining", "reset"))]
        app = CORSMiddleware(
            app, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"], expose_headers=exposed
        )
    return Headed(app)
