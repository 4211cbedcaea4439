"""A model's endpoint: its URL, the kind of URL, and the API key.

endpoint = parse("http://127.0.0.1:8000/v1", find_key(None, None, os.environ))
"""

from __future__ import annotations

import functools
import ipaddress
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from llm_ray.errors import ConfError

if TYPE_CHECKING:
    import httpx

KEY_VARIABLES = ("LLM_RAY_API_KEY", "OPENAI_API_KEY")
CONNECT_SECONDS = 10.0
"""Timeout for connecting to a host."""


@dataclass(frozen=True, slots=True)
class Key:
    """An API key and its source; errors name the source, never the key."""

    value: str = field(repr=False)
    source: str


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`url` has no trailing slash. `openai` is True for the base of an OpenAI API (…/v1), False for a model's own
    route."""

    url: str
    openai: bool
    key: Key | None

    @property
    def name(self) -> str:
        """The model of a model's own route; may contain a slash."""
        return urlsplit(self.url).path.removeprefix("/")

    @property
    def base(self) -> str:
        """The base URL of the OpenAI API at this address."""
        return self.url if self.openai else f"{self.url.removesuffix(self.name)}v1"

    @property
    def trust_env(self) -> bool:
        """Whether to use proxies from the environment: never for loopback, which proxies cannot reach."""
        host = urlsplit(self.url).hostname or ""
        try:
            return not ipaddress.ip_address(host).is_loopback
        except ValueError:
            return not (host == "localhost" or host.endswith(".localhost"))

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key.value}"} if self.key else {}

    def http(self, timeout: float) -> httpx.AsyncClient:
        """Returns a new client with `timeout` seconds for each step of a request. Send :attr:`headers` for the key."""
        import httpx

        limits = httpx.Limits(max_connections=None)
        connect = min(timeout, CONNECT_SECONDS)
        return httpx.AsyncClient(
            timeout=httpx.Timeout(timeout, connect=connect),
            limits=limits,
            trust_env=self.trust_env,
            verify=certificates(self.trust_env),
        )


@functools.cache
def certificates(trust_env: bool) -> ssl.SSLContext:
    """Returns a TLS context with the trusted CAs, cached because loading them takes 40 ms."""
    import httpx

    return httpx.create_ssl_context(trust_env=trust_env)


def parse(url: str, key: Key | None = None) -> Endpoint:
    """Returns the endpoint at `url`. Raises ConfError unless it is an http(s) URL with the path of an API or of a
    model."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfError(f"--model_endpoint {url}: not a URL of the form http://HOST:PORT/v1 or http://HOST:PORT/MODEL")
    if parts.query or parts.fragment:
        raise ConfError(f"--model_endpoint {url}: remove everything after the path")
    whole = url.rstrip("/")
    path = parts.path.rstrip("/")
    if not path:
        raise ConfError(f"--model_endpoint {url}: add /v1 (OpenAI API, with --model) or /MODEL (a model's own route)")
    before, version, after = f"{path}/".partition("/v1/")
    if version and after:
        raise ConfError(
            f"--model_endpoint {url}: use only the base of the API, {parts.scheme}://{parts.netloc}{before}/v1"
        )
    return Endpoint(whole, bool(version), key)


def find_key(given: str | None, file: Path | None, environment: Mapping[str, str]) -> Key | None:
    """Returns the API key from `given` (`--api-key`), else `file` (`--api-key-file`), else LLM_RAY_API_KEY or
    OPENAI_API_KEY in `environment`; None if there is none.

    Raises ConfError if both options are given, the file cannot be read, or the key is malformed.
    """
    if given is not None and file is not None:
        raise ConfError("--api-key and --api-key-file cannot be combined")
    if given is not None:
        return _checked(given, "--api-key")
    if file is not None:
        try:
            return _checked(file.read_text(encoding="utf-8"), f"--api-key-file {file}")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfError(f"--api-key-file {file} cannot be read: {error}") from error
    for variable in KEY_VARIABLES:
        if environment.get(variable):
            return _checked(environment[variable], variable)
    return None


def _checked(text: str, source: str) -> Key:
    key = text.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfError(
            f"{source}: an API key is one word of ASCII characters, but this is "
            f"{'empty' if not key else 'something else'}"
        )
    return Key(key, source)
