"""The fine-tuning API on a real server, with real use cases behind it, without Ray Serve."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import httpx
import openai
import pytest

from llm_ray.app import jobs as queue
from llm_ray.app.api_service import open_service
from llm_ray.conf.serve import Endpoint, FinetuningApi, Limits
from llm_ray.serve.gateway.api import Api
from llm_ray.serve.gateway.protect import Protection, protect
from llm_ray.serve.gateway.protect.keys import Scope, add_key, keys_file
from llm_ray.serve.gateway.protect.limits import Limiter
from tests.runs import conf_of, opened_run
from tests.server import serving

ROWS = (
    json.dumps({"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}]}) + "\n"
) * 3


class Alone(Api):
    """A gateway without Ray Serve, and so without models."""

    async def _look(self, age: float) -> None:
        self._looked = time.monotonic()


class Site:
    """An endpoint with the API, and clients of it by the names of their keys."""

    def __init__(self, url: str, secrets: dict[str, str], home: Path) -> None:
        self.url, self.secrets, self.home = url, secrets, home

    def client(self, name: str) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=self.secrets[name],
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=False),
            _strict_response_validation=True,
        )

    def http(self, name: str = "alice") -> httpx.Client:
        return httpx.Client(
            base_url=self.url, headers={"Authorization": f"Bearer {self.secrets[name]}"}, trust_env=False, timeout=60
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2: Path) -> Iterator[Site]:
    """While a run of the command line is at work, so that jobs wait."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    (home / "models" / "base").symlink_to(smollm2)
    (rows := home / "rows.jsonl").write_text(ROWS)
    conf = conf_of(home, "busy", rows)
    secrets = {name: add_key(keys_file(home), name, Limits())[1] for name in ("alice", "bob")}
    for scope in get_args(Scope):
        secrets[scope] = add_key(keys_file(home), scope, Limits(), scopes=(scope,))[1]
    secrets["narrow"] = add_key(keys_file(home), "narrow", Limits(), models=("other",))[1]
    settings = FinetuningApi(enabled=True, max_file_mib=0.1, max_jobs=2)
    endpoint = Endpoint(api_keys="on", finetuning=settings, body_timeout_s=5)
    api = Alone()
    api.offer(open_service(home, settings), True)
    with opened_run(conf, force=False), serving(protect(api.app, Protection.of(endpoint, home), Limiter())) as url:
        yield Site(url, secrets, home)
        for job in queue.queue(home / "runs"):
            queue.cancel(home / "runs", job.name)
